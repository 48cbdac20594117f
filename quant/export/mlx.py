"""MLX's affine quantization: a value is scale·q + bias, which holds every grid of groups exactly.

For a linear [O, I]: ``weight`` uint32 [O, I·bits/32], codes packed along the inputs as one little-endian bit stream a row;
``scales`` and ``biases`` [O, I/group]: float16 where both are float16 numbers, as those of real minima and of symmetric grids
are, else float32, which holds the product of a scale and a zero point. config.json names bits and group under
``quantization``, also of linears that differ. (mlx, python/mlx/nn/layers/quantized.py; mlx-lm, utils.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.core.errors import InputError
from quant.core.names import MLX
from quant.core.types import QuantizedWeight, QuantSpec
from quant.export.formats import Content, check_shape, in_order, refuses_codes, refuses_grid
from quant.export.packing import pack

WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (128, 64, 32)
MODELS = (
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "starcoder2",
)  # of mlx-lm, whose names are those of transformers but for experts
Json = dict[str, Any]


class Mlx:
    """What it can hold, and how."""

    name = MLX

    def refuses(self, content: Content) -> str | None:
        """Groups that are no multiples of 32 columns, act-order, sparse parts, activations, models that mlx-lm has not."""
        if against := refuses_codes(replace(content, mixed=False), self.name):
            return against
        if against := self._no_groups(content):
            return against
        if content.outside:
            return f"{self.name} is written without quantized head and embedding: use format bitplane or dequantized"
        if content.act.active:
            return f"{self.name} is weight-only and cannot hold activation quantization: use format bitplane"
        if content.reordered:
            return f"{self.name} cannot hold groups in act-order: use format gptq, or --group-aware or --static-groups"
        if content.model_type and content.model_type not in MODELS:
            return (
                f"{self.name} is written for {', '.join(MODELS)} models, not {content.model_type}: use format bitplane"
            )
        return None

    def _no_groups(self, content: Content) -> str | None:
        """Why a grid does not fit; None where all do."""
        for linear, n_in, spec in content.grids:
            if spec.level_kind is None and group_of(spec, n_in) is not None:
                continue
            return refuses_grid(content, self.name, "real", "fractional") or (
                f"{self.name} has groups of 32, 64 or 128 columns, which do not divide {spec.described()} on "
                f"{n_in} inputs of {linear} (--group-size 32 does where 32 divides the inputs): use format bitplane"
            )
        return None

    def encode(self, weight: QuantizedWeight) -> tuple[dict[str, Tensor], Json]:
        """The tensors of a linear by the last part of their names, and its entry of config.json. Raises InputError for an
        answer that is more than codes in order on a grid."""
        group, (_, n_in) = group_of(weight.spec, weight.codes.shape[1]), weight.codes.shape
        if group is None or weight.outliers is not None or not in_order(weight):
            raise InputError(f"{self.name} holds codes in order, in groups of whole 32 columns: use format bitplane")
        bits = next(width for width in WIDTHS if width >= weight.spec.code_bits)
        grid, first = weight.grid, weight.grid.g_idx.view(n_in // group, group)[:, 0]
        bias = -grid.scale * grid.zero if grid.minimum is None else grid.minimum
        scales, biases = grid.scale[:, first], bias[:, first]
        if all(torch.equal(part.half().float(), part) for part in (scales, biases)):
            scales, biases = scales.half(), biases.half()
        tensors = {"weight": pack(weight.codes, bits).view(torch.uint32), "scales": scales, "biases": biases}
        return tensors, {"group_size": group, "bits": bits}


def group_of(spec: QuantSpec, n_in: int) -> int | None:
    """The largest of MLX's groups that lie in those of a grid and divide the inputs; None where none does."""
    whole = n_in if spec.group_size == -1 else spec.group_size
    return next((group for group in GROUPS if whole % group == 0 and n_in % group == 0), None)


EXPERT = re.compile(r"(.*\.)experts\.\d+\.(\w+\.weight)")  # a linear of one expert, as transformers names it
RENAMED = {"mixtral": (".mlp.", ".block_sparse_moe.")}  # by model type, where mlx-lm's name differs
Entry = tuple[str, Tensor | QuantizedWeight]


def mlx_tensors(
    stream: Iterable[Entry], content: Content, quantization: Json, experts: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, under mlx-lm's names. quantization: the entry of config.json, which is filled on the way: of
    the first linear for all, and of those that differ by name. experts: of a block, whose linears are one tensor there
    (``switch_mlp``, [experts, out, in])."""
    waiting: dict[str, list[dict[str, Tensor]]] = {}
    old, new = RENAMED.get(content.model_type, ("", ""))
    for name, value in stream:
        tensors, entry = _tensors_of(name, value, content)
        own = name.replace(old, new) if old else name
        if expert := EXPERT.fullmatch(own):
            own = f"{expert[1]}switch_mlp.{expert[2]}"
            waiting.setdefault(own, []).append(tensors)
            if len(waiting[own]) < experts:
                continue
            parts = waiting.pop(own)
            if any(
                part.keys() != parts[0].keys() or part["weight"].shape != parts[0]["weight"].shape for part in parts
            ):
                raise InputError(f"{own}: mlx holds experts of one number of bits: use format bitplane or dequantized")
            tensors = {part: torch.stack(_alike([one[part] for one in parts])) for part in parts[0]}
        linear = own.removesuffix(".weight")
        if entry and not quantization:
            quantization.update(entry)
        elif any(quantization[key] != entry[key] for key in entry):
            quantization[linear] = entry
        yield from ((own if part == "weight" and not entry else f"{linear}.{part}", t) for part, t in tensors.items())


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    """In the widest of their dtypes."""
    wide = max((one.dtype for one in tensors), key=lambda dtype: dtype.itemsize)
    return [one.to(wide) for one in tensors]


def _tensors_of(name: str, value: Tensor | QuantizedWeight, content: Content) -> tuple[dict[str, Tensor], Json]:
    """The tensors of one entry by the last part of their names, and its settings; of a plain one, itself and none."""
    if not isinstance(value, QuantizedWeight):
        return {"weight": value}, {}
    linear = name.removesuffix(".weight")
    check_shape(linear, value, content)
    try:
        return Mlx().encode(value)
    except InputError as error:
        raise InputError(f"{linear}: {error}") from error
