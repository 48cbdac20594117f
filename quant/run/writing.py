"""Calibration text that the full-precision model writes itself (``--dataset self``).

Every token is drawn from what the model says comes next, temperature 1, from a first token that is given. One uniform
number for every window and position decides, drawn from the seed before anything is computed: neither batches nor memory
change which. (Self-calibration: Williams et al., NAACL 2025, arXiv 2410.17170; LLM-QAT, arXiv 2305.17888.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from data.calibration import Author
from models.load import LazyModel, Weights
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import env

BATCH = 64  # windows that are written together
SHARE = 0.8  # of the free memory that model and cache may take


@dataclass(frozen=True)
class Writer:
    """A model that writes windows of tokens. progress: windows done, all windows."""

    model: LazyModel
    device: torch.device
    temperature: float = 1.0
    progress: Callable[[int, int], None] = lambda done, total: None

    def write(self, first: Tensor, length: int, seed: int) -> Tensor:
        """Windows int64 [n, length] on the CPU that begin with the tokens ``first`` [n]."""
        n = len(first)
        chance = torch.rand(n, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        write = self._with_cache if self.fits(min(n, BATCH), length) else self._streamed
        return write(first, chance)

    def fits(self, windows: int, length: int) -> bool:
        """Whether the model and its keys and values are held in memory together."""
        model, size = self.model, self.model.dtype.itemsize
        weights = sum(p.numel() for p in model.module.parameters())
        cache = 2 * windows * length * model.config.hidden_size * len(model.blocks)
        logits = windows * model.config.vocab_size
        return size * (weights + cache) + 24 * logits < SHARE * env.free_bytes(self.device)

    @torch.inference_mode()
    def _with_cache(self, first: Tensor, chance: Tensor) -> Tensor:
        """The whole model in memory, keys and values kept."""
        module, state = self.model.module, whole_weights(self.model, self.device)
        takes = inspect.signature(module.forward).parameters
        argument = "cache" if "cache" in takes else "past_key_values"  # transformers before 5.24
        written = []
        for start in range(0, len(first), BATCH):
            part = slice(start, start + BATCH)
            ids = [first[part]]
            kept: dict[str, Any] = {}
            for place in range(1, chance.shape[1]):
                given = ids[-1].unsqueeze(1).to(self.device)
                output = functional_call(module, state, (given,), {"use_cache": True, **kept})
                kept = {argument: output[argument]}
                ids.append(draw(output.logits[:, -1], self.temperature, chance[part, place]))
            written.append(torch.stack(ids, 1))
            self.progress(min(start + BATCH, len(first)), len(first))
        return torch.cat(written)

    def _streamed(self, first: Tensor, chance: Tensor) -> Tensor:
        """Block by block, every token with the whole window before it again: slow, in the memory of one block."""
        ids, (n, length) = first.unsqueeze(1), chance.shape
        for place in range(1, length):
            outside = self.model.outside_weights(self.device)
            stream = BlockStream(self.model, ids, device=self.device, batch=BATCH).capture(outside)
            for index in range(len(self.model.blocks)):
                stream.run(index, BlockWeights.read(self.model, index, self.device), advance=True)
            drawn = [
                draw(stream.logits(rows, outside)[:, -1], self.temperature, chance[rows, place]) for rows in stream.rows
            ]
            ids = torch.cat([ids, torch.cat(drawn).unsqueeze(1)], 1)
            self.progress(place * n // length, n)
        return ids


def author_of(model: LazyModel, device: torch.device) -> Author:
    """The model as the author of calibration text."""
    writer = Writer(model, device)
    key = [model.checkpoint.sha256(), writer.temperature, str(model.dtype), device.type]
    return Author(writer.write, key)


def whole_weights(model: LazyModel, device: torch.device) -> Weights:
    """Every weight of the model in full precision, under its name in the model."""
    weights = model.outside_weights(device)
    for index in range(len(model.blocks)):
        prefix = f"{model.family.blocks}.{index}."
        weights |= {prefix + name: tensor for name, tensor in model.block_weights(index, device).items()}
    return weights


def draw(logits: Tensor, temperature: float, chance: Tensor) -> Tensor:
    """One token for each row of logits [n, vocabulary], int64 [n] on the CPU: where the cumulated probabilities, in
    float64, pass the number ``chance`` [n] in [0, 1)."""
    p = torch.softmax(logits.cpu().double() / temperature, -1).cumsum(-1)
    tokens = torch.searchsorted(p, (chance * p[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return tokens.clamp_(max=logits.shape[-1] - 1)
