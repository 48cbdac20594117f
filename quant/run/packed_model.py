"""What was quantized, by block: from a run directory or a checkpoint; and a whole model in memory with its linears packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.family import Groups
from models.load import LazyModel, Weights, load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.linears import LinearRef
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.names import FULL_BITS, UNPACKED
from quant.core.types import QuantizedWeight
from quant.export.read import QuantizedCheckpoint, open_checkpoint
from quant.kernels.matmul.pack import pack_block, rounding_layout
from quant.kernels.matmul.weight import PackedWeight, side_by_side
from quant.learn.rotation import rotated
from quant.run.directory import OUTSIDE, ROTATION, RunDirectory, check_manifest
from quant.run.likeness import check_family
from quant.run.outside import packed_bytes as held_by
from quant.run.outside import packed_outside
from quant.run.request import Request
from quant.run.rotating import kept_matrices
from quant.run.stored import Allowed


@dataclass(frozen=True)
class Quantized:
    """A quantized model: answers of a block's linears by name, what else a block deploys otherwise, activations, and
    answers of what is quantized outside the blocks, by module."""

    model: LazyModel
    solved: Callable[[int], Mapping[str, QuantizedWeight]]
    changed: Callable[[int], BlockWeights]
    act: ActSpec
    outside: Callable[[], Mapping[str, QuantizedWeight]] = dict


@dataclass(frozen=True)
class FinishedRun:
    """A run directory with results, and its model."""

    request: Request
    model: LazyModel
    directory: RunDirectory
    n_blocks: int
    results: dict[str, Any]

    def quantized(self) -> Quantized:
        """Its answers; none for blocks that were left alone."""
        directory = self.directory
        return Quantized(
            self.model,
            lambda index: directory.read_weights(index) if index < self.n_blocks else {},
            lambda index: directory.read_changed(index) if index < self.n_blocks else BlockWeights(),
            self.request.run.act,
            lambda: directory.read_weights(OUTSIDE) if self.request.run.beyond_blocks else {},
        )


def open_run(
    source: Path, cache_dir: Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> FinishedRun:
    """A finished run. Raises InputError where it is not finished, or its model is not the same any more.

    The run says which model it was made of (the hash is checked); cache_dir and trust_remote_code are the caller's.
    """
    directory = RunDirectory(source)
    directory.check_links()
    manifest, results = directory.read("manifest.json"), directory.read("results.json")
    origin = source / "manifest.json"
    if manifest is None:
        raise InputError(f"{source} is no run directory: it has no manifest.json")
    check_manifest(manifest, origin)
    if results is None:
        raise InputError(f"{source} has no results.json: the run is not finished; the same command continues it")
    try:
        # Nothing of what a request names but the model is read here.
        allowed = Allowed(trust_remote_code, paths=True)
        request = Request.from_json(manifest["request"], str(origin), allowed)
        expected, n_blocks = manifest["model"]["sha256"], int(manifest["configuration"]["blocks"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{origin} is no manifest of a run ({error}); run it again") from error
    if request.run.wbits == FULL_BITS:
        raise InputError(f"{source}: no weight was quantized there")
    name = request.session.model
    if not Path(name).exists() and (name.startswith(("/", ".")) or name.count("/") > 1):
        raise InputError(f"{source} was made of {name}, which is not here: run this where that run was made")
    model = load_model(name, dtype=dtype, cache_dir=cache_dir, biases=request.session.biases,
                       trust_remote_code=request.session.trust_remote_code, family=request.session.family)  # fmt: skip
    if model.checkpoint.sha256() != expected:
        raise InputError(f"{name} is not the model of the run any more: its weights have another hash")
    if request.run.rotation is not None:
        trusted = request.session.trust_remote_code
        matrices = kept_matrices(source / ROTATION, request.run.rotation)
        model = rotated(model, request.run.rotation, torch.device("cpu"), trusted, matrices)
    if not 0 <= n_blocks <= len(model.blocks):
        raise InputError(f"{origin} is no manifest of a run (it has {n_blocks} blocks); run it again")
    return FinishedRun(request, model, directory, n_blocks, results)


def is_run(path: Path) -> bool:
    """Whether a path is meant as a run directory. A model may hold another program's manifest.json."""
    return (path / "manifest.json").exists() and ((path / "blocks").is_dir() or not (path / "config.json").is_file())


def open_quantized(
    source: str,
    cache_dir: Path,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    family: str | None = None,
) -> Quantized:
    """A run directory, a quantized checkpoint, or a plain one, of which nothing is packed. family: what a checkpoint of an
    unknown model type is taken for; a run says it itself."""
    if is_run(Path(source)):
        return open_run(Path(source), cache_dir, dtype, trust_remote_code).quantized()
    model = load_model(source, dtype=dtype, cache_dir=cache_dir, opener=open_checkpoint,
                       trust_remote_code=trust_remote_code, family=family)  # fmt: skip
    if family is not None:
        check_family(model, trust_remote_code)
    return of_checkpoint(model)


def of_checkpoint(model: LazyModel) -> Quantized:
    """The answers in the model's own checkpoint; none if it is plain."""
    checkpoint = model.checkpoint
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return Quantized(model, lambda index: {}, lambda index: BlockWeights(), ActSpec())
    return Quantized(
        model,
        lambda index: checkpoint.solved(model, index),
        lambda index: BlockWeights(),
        checkpoint.act,
        lambda: checkpoint.solved_outside(model),
    )


@dataclass(frozen=True)
class Resident:
    """A model in memory. weights: of all its blocks by ``<index>.<name>``, as `instrument` takes them.

    packed_bytes: of the packed linears; stored_bytes: what they would take in storage; other_bytes: everything else.
    round_inputs: whether products round what they read.
    """

    module: nn.Module
    blocks: nn.Module
    weights: BlockWeights
    act: ActSpec
    packed_bytes: int
    stored_bytes: int
    other_bytes: int
    round_inputs: bool = False


def load_resident(quantized: Quantized, device: torch.device, round_inputs: bool = False) -> Resident:
    """Bring a model into memory, block by block, with its linears packed (those of fp8 are written out), and embedding and head
    where they are quantized. round_inputs: packed products round what they read to 8 bits
    (codes of several fields that of a few tokens).

    Raises InputError where inputs cannot be rounded: on a device without such products, or where they are quantized already.
    """
    model, layout = quantized.model, rounding_layout(device) if round_inputs else None
    if round_inputs and quantized.act.bits < FULL_BITS:
        raise InputError(
            f"--round-inputs: this model rounds activations to {quantized.act.bits} bits itself; leave it out"
        )
    weights = BlockWeights()
    beyond = quantized.outside()
    form = packed_outside(model, beyond, model.outside_weights(device, without=beyond), layout)
    outside = form.weights
    packed_bytes = held_by(form.modules)
    stored_bits = sum(weight.storage_bits() for weight in beyond.values())
    for index in range(len(model.blocks)):
        solved = quantized.solved(index)
        own = BlockWeights.read(model, index, device, without=solved) | quantized.changed(index).to(device, model.dtype)
        whole = {name: weight for name, weight in solved.items() if weight.spec.kind in UNPACKED}
        written = {
            LinearRef.of_module(name).parameter: weight.to(device).dequantize() for name, weight in whole.items()
        }
        own = own.with_parameters({name: tensor.to(model.dtype) for name, tensor in written.items()})
        packed = pack_block({name: weight for name, weight in solved.items() if name not in whole}, device, layout)
        if quantized.act.bits >= FULL_BITS:  # else every linear rounds its own inputs
            packed |= _beside(packed, model.groups_at(index))
        packed_bytes += sum(weight.nbytes() for weight in packed.values())
        stored_bits += sum(weight.storage_bits() for weight in solved.values())
        weights |= own.with_packed(packed).within(index)
    blocks = model.blocks
    for name, module in form.modules.items():
        model.module.set_submodule(name, module)
    _assign(model.module, outside)
    held = {name for name, _ in [*blocks.named_parameters(), *blocks.named_buffers()]}
    _assign(blocks, {name: tensor for name, tensor in weights.parameters.items() if name in held})
    others = sum(t.nbytes for t in {t.data_ptr(): t for t in [*outside.values(), *weights.named().values()]}.values())
    return Resident(model.module, blocks, weights, quantized.act, packed_bytes, (stored_bits + 7) // 8, others,
                    round_inputs)  # fmt: skip


def _beside(packed: Mapping[str, PackedWeight], groups: Groups) -> dict[str, PackedWeight]:
    """The packed linears that read one tensor, with one product for all of them."""
    joined: dict[str, PackedWeight] = {}
    for group in groups:
        names = [name for name in group if name in packed]
        if names:
            joined |= zip(names, side_by_side([packed[name] for name in names]), strict=True)
    return joined


def _assign(module: nn.Module, tensors: Weights) -> None:
    """Put tensors where parameters and buffers of these names are; tied ones stay tied."""
    tied: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            tied.setdefault(id(parameter), []).append((owner, name))
    for full, tensor in tensors.items():
        owner_name, _, name = full.rpartition(".")
        owner = module.get_submodule(owner_name)
        if name in owner._buffers:
            owner._buffers[name] = tensor
            continue
        parameter = nn.Parameter(tensor, requires_grad=False)
        for place, own_name in tied[id(owner._parameters[name])]:
            place._parameters[own_name] = parameter
