"""What a model takes in storage: the linears of its blocks, and the whole of it with embedding, head, norms and biases."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from models.load import LazyModel
from quant.export.read import QuantizedCheckpoint
from quant.run.linear import LinearRecord


def block_storage(model: LazyModel, checkpoint: QuantizedCheckpoint) -> tuple[int, int]:
    """Bits that the quantized weights in the blocks take, and their number."""
    held = [weight for index in range(len(model.blocks)) for weight in checkpoint.solved(model, index).values()]
    return sum(weight.storage_bits() for weight in held), sum(weight.codes.numel() for weight in held)


def plain_storage(model: LazyModel, n_blocks: int) -> tuple[int, int]:
    """Bits that the linears of the first blocks take in the source's dtype, and the number of their weights."""
    bits = count = 0
    for index in range(n_blocks):
        for name, (out, n_in) in model.linear_shapes(index).items():
            width = torch.finfo(model.storage_of(f"{name}.weight", index)).bits
            bits, count = bits + out * n_in * width, count + out * n_in
    return bits, count


def whole_storage(model: LazyModel, records: Iterable[LinearRecord], online: int) -> tuple[int, int]:
    """Bits of all parameters of the model, a tied one once, and their number. records: of what was solved, the rest has the
    dtype of the source; a source that is quantized itself says what it takes. online: bits of numbers beside parameters."""
    checkpoint, bits, count = model.checkpoint, online, 0
    for name, parameter in model.module.named_parameters():
        packed = None
        if isinstance(checkpoint, QuantizedCheckpoint):
            packed = checkpoint.storage_bits(model.key(name))
        bits += parameter.numel() * torch.finfo(model.storage_of(name)).bits if packed is None else packed
        count += parameter.numel()
    for record in records:
        own = model.storage_of(f"{record.name}.weight", record.block if record.block < len(model.blocks) else None)
        bits += record.storage_bits - record.n_weights * torch.finfo(own).bits
    return bits, count
