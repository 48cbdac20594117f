"""Writing a checkpoint directory that appears under its name only when all of it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import RESULTS
from models.container import SafetensorsWriter, Writer
from models.load import LazyModel
from models.mixtures import expert_count
from models.stored import Layout
from quant.blocks.weights import is_input_range
from quant.core.errors import InputError
from quant.core.files import json_sha256, sha256_of_file, write_json
from quant.core.names import GGUF, MLX
from quant.core.types import QuantizedWeight
from quant.export import PACKED
from quant.export.carried import about_writer, carried_config, drop_about, side_file_writer
from quant.export.formats import Content, Layers, check_shape
from quant.export.gguf import Gguf
from quant.export.gguf_model import GgufModel
from quant.export.mlx import mlx_tensors
from quant.export.target import OWN, hashes_of, others_in, replacing

TIE = "tie_word_embeddings"
Entry = tuple[str, Tensor | QuantizedWeight]
Tensors = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """A model in a format, before anything is written. tensors: what it is made of, anew at every call; config: of
    config.json; side_files: writes what else there is; writer_in: what takes the tensors, in a directory."""

    tensors: Callable[[], Tensors]
    config: Mapping[str, Any]
    side_files: Callable[[Path], None]
    writer_in: Callable[[Path], Writer] = SafetensorsWriter


def form_of(
    model: LazyModel,
    kind: str,
    content: Content,
    layers: Layers,
    stream: Callable[[], Iterator[Entry]],
    *,
    dtype_of: Callable[[str], torch.dtype],
    layout: Layout,
    side_files: Callable[[Path], None],
    tokenizer: Any,
    results: Mapping[str, Any],
) -> Form:
    """A model's entries in a format; tokenizer and results go into the one file of GGUF. Raises InputError where that cannot
    be, as far as it is known before codes are read."""
    if kind == GGUF:
        file = GgufModel.of(model, tokenizer, stream, results)
        return Form(file.tensors, {}, about_writer(model.checkpoint.path), file.writer)
    config = model_config(model, kind, content, layers)
    if kind == MLX:
        settings: dict[str, Any] = {}
        experts = expert_count(model.config) if content.has_experts else 0
        return Form(
            lambda: mlx_tensors(stream(), content, settings, experts), config | {"quantization": settings}, side_files
        )
    return Form(
        lambda: packed_entries(stream(), kind, content, dtype_of, layout),
        config,
        side_files,
    )


def size_of(model: LazyModel, kind: str, content: Content, layers: Layers) -> int:
    """Bytes of a checkpoint's tensors, without scales and what else is small."""
    width = torch.finfo(model.storage_dtype).bits
    numbers = {name: model.module.get_parameter(f"{name}.weight").numel() for name in layers.quantized}
    rest = sum(parameter.numel() for parameter in model.module.parameters()) - sum(numbers.values())

    def bits(own: Content) -> float:
        return Gguf().bits(own) if kind == GGUF else own.bits if kind in (*PACKED, MLX) else width

    packed = sum(count * bits(content.of(name)) for name, count in numbers.items())
    return int(rest * width + packed) // 8


def entries(
    model: LazyModel,
    replaced: Callable[[int], Mapping[str, Tensor | QuantizedWeight]],
    outside: Mapping[str, QuantizedWeight] | None = None,
) -> Iterator[Entry]:
    """Every tensor of the checkpoint in order, a block at a time, under the names of the module's parameters and as they are
    there.

    replaced(index): what a block deploys otherwise than the original, by name; empty for blocks left alone. outside: what
    is quantized outside the blocks, by module.
    """
    inside = f"{model.family.blocks}."
    solved = {f"{name}.weight": weight for name, weight in (outside or {}).items()}
    for name, _ in model.module.named_parameters():
        if name in solved:
            yield name, solved[name]
        elif not name.startswith(inside):
            yield name, model.checkpoint.stored(model.key(name))
    for name in model.carried:
        yield name, model.checkpoint.stored(name)
    for index, block in enumerate(model.blocks):
        new = dict(replaced(index))
        for name, parameter in block.named_parameters():
            full, tensor = f"{inside}{index}.{name}", new.pop(name, None)
            if isinstance(tensor, QuantizedWeight):
                yield full, tensor
            elif tensor is not None:
                yield full, tensor.to(model.storage_of(full))
            elif full in model.added:
                yield full, torch.zeros(parameter.shape, dtype=model.storage_of(full))
            else:
                yield full, model.checkpoint.stored(model.key(full))
        prefix = f"{inside}{index}."
        held = [name for name in model.checkpoint.extra if name.startswith(prefix)]
        yield from ((name, model.checkpoint.stored(name)) for name in held if name.removeprefix(prefix) not in new)
        for name, extra in new.items():  # what no module of the library holds: matrices behind norms, input ranges
            assert isinstance(extra, Tensor)
            yield f"{inside}{index}.{name}", extra


def layers_of(model: LazyModel, quantized_blocks: int, content: Content) -> Layers:
    """Which linears are quantized when the first blocks are, and what the content has outside of them; and which are left
    alone. A tied head is its embedding."""
    inside = f"{model.family.blocks}."
    linears = linears_of(model)
    done = [n for n in linears if n.startswith(inside) and int(n.removeprefix(inside).split(".")[0]) < quantized_blocks]
    done += list(content.outside)
    held = [model.module.get_parameter(f"{name}.weight") for name in content.outside]
    parameters = {name: model.module.get_parameter(f"{name}.weight") for name in linears if name not in set(done)}
    rest = [name for name, own in parameters.items() if not any(own is weight for weight in held)]
    return Layers(done, rest, model.family.blocks, len(model.blocks), gates_of(model))


def linears_of(model: LazyModel) -> list[str]:
    """All linears by their full names, those of the head too."""
    return [name for name, module in model.module.named_modules() if isinstance(module, nn.Linear)]


def gates_of(model: LazyModel) -> list[str]:
    """Routers and other gates of a mixture by their full names: linears to other software, which are never quantized."""
    inside, gates = model.family.blocks, set(model.family.gates)
    return [
        f"{inside}.{index}.{name}"
        for index, block in enumerate(model.blocks if gates else ())
        for name, module in block.named_modules()
        if name in gates and "weight" in module._parameters
    ]


def packed_entries(
    stream: Iterable[Entry], kind: str, content: Content, dtype_of: Callable[[str], torch.dtype], layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a format, as files hold them. dtype_of: by name, what a linear that is written out has. layout: how the
    family's checkpoints store tensors. Raises InputError, with the linear's name, where it cannot hold one, or where one is
    not of the shape that the content announced.
    """
    for name, value in stream:
        if not isinstance(value, QuantizedWeight):
            if kind in PACKED or not is_input_range(name):
                yield layout.written(name, value)
            continue
        linear = name.removesuffix(".weight")
        check_shape(linear, value, content)
        if kind not in PACKED:
            yield layout.written(name, value.dequantize().to(dtype_of(name)))
        else:
            try:
                parts = PACKED[kind].encode(value, content.of(linear))
            except InputError as error:
                raise InputError(f"{linear}: {error}") from error
            yield from ((layout.on_disk(f"{linear}.{part}"), tensor) for part, tensor in parts.items())


def save_checkpoint(
    stream: Tensors,
    target: Path,
    config: Mapping[str, Any],
    side_files: Callable[[Path], None],
    results: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    writer_in: Callable[[Path], Writer] = SafetensorsWriter,
) -> None:
    """Write config.json, side files, weights (sharded above 5 GB), results.json with hashes of all that was written.

    results.json also holds the hash of config.json, which says what the tensors mean (and one of its quantization_config
    alone). Nothing is left behind where anything fails, and a checkpoint that was there before is then still there.
    Raises InputError for values that are not finite in the dtype in which they are written.
    """
    with replacing(target, overwrite) as directory:
        writer = writer_in(directory)
        for name, tensor in finite(stream):
            writer.put(name, tensor)
        side_files(directory)
        drop_about(directory, others_in(target))
        writer.finish(config)
        quantization = config.get("quantization_config")
        weights = sorted(
            (*directory.glob("*.safetensors"), *directory.glob("quantize_config.json"), *directory.glob("*.gguf"))
        )
        written = {
            "files_sha256": {file.name: sha256_of_file(file) for file in weights},
            "quantization_sha256": json_sha256(quantization) if quantization else None,
            "config_sha256": json_sha256(config),
            OWN: hashes_of(directory),
        }
        write_json(directory / RESULTS, dict(results or {}) | written)


def finite(stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors. Raises InputError for one with values that its dtype does not hold: no loader takes them."""
    for name, tensor in stream:
        wide = tensor.float() if tensor.itemsize == 1 else tensor  # torch does not ask 8 bits
        if tensor.is_floating_point() and not bool(torch.isfinite(wide).all()):
            raise InputError(
                f"{name} has values that {str(tensor.dtype).removeprefix('torch.')} does not hold; nothing was saved"
            )
        yield name, tensor


def model_config(model: LazyModel, kind: str, content: Content, layers: Layers) -> dict[str, Any]:
    """config.json of a model in a format: the source's, but for what was changed as it was opened."""
    declared = model.checkpoint.reader.metadata()
    declared.pop("quantization_config", None)
    changes: dict[str, Any] = dict(model.family.biases) if model.added else {}
    tied = bool(getattr(model.config, TIE, False))
    if tied != declared.get(TIE, getattr(type(model.config)(), TIE, False)):
        changes[TIE] = tied
    if kind in PACKED:
        changes["quantization_config"] = PACKED[kind].config(content, layers.renamed(model.family.layout.on_disk))
    return carried_config(declared, model.storage_dtype, changes)


def model_side_files(model: LazyModel, tokenizer: Any) -> Callable[[Path], None]:
    """Writes the side files of a model: tokenizer, generation config, licence, the classes that it brings."""
    return side_file_writer(model.checkpoint.path, model.config.to_dict(), tokenizer)
