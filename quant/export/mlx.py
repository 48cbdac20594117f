"""MLX's affine quantization: a value is scale·q + bias, which holds every grid of groups exactly.

For a linear [O, I]: ``weight`` uint32 [O, I·bits/32], codes packed along the inputs as one little-endian bit stream a row;
``scales`` and ``biases`` [O, I/group]: float16 where both are float16 numbers, as those of real minima and of symmetric grids
are, else float32, which holds the product of a scale and a zero point. config.json names bits and group under
``quantization``, also of linears that differ. (mlx, python/mlx/nn/layers/quantized.py; mlx-lm, utils.py)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.core.errors import InputError
from quant.core.names import MLX
from quant.core.types import QuantizedWeight, QuantSpec
from quant.export.formats import Content, check_shape, in_order, real_minimum, refuses_codes
from quant.export.packing import pack

WIDTHS, GROUPS = (2, 3, 4, 5, 6, 8), (128, 64, 32)
MODELS = (
    "gemma2",
    "gemma3_text",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
    "starcoder2",
)  # of mlx-lm, whose names are those of transformers
Json = dict[str, Any]


class Mlx:
    """What it can hold, and how."""

    name = MLX

    def refuses(self, content: Content) -> str | None:
        """Groups that are no multiples of 32 columns, act-order, sparse parts, activations, models that mlx-lm has not."""
        if against := refuses_codes(replace(content, mixed=False), self.name):
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
        assert content.spec is not None
        if content.spec.level_kind is not None:
            return real_minimum(content, self.name)
        for linear, (_, n_in) in content.shapes.items():
            if group_of(content.spec, n_in) is None:
                return (
                    f"{self.name} has groups of 32, 64 or 128 columns, which do not divide {content.spec.described()} on "
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


def mlx_tensors(
    stream: Iterable[tuple[str, Tensor | QuantizedWeight]], content: Content, quantization: Json
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model, under its own names. quantization: the entry of config.json, which is filled on the way: of
    the first linear for all, and of those that differ by name."""
    for name, value in stream:
        if not isinstance(value, QuantizedWeight):
            yield name, value
            continue
        linear = name.removesuffix(".weight")
        check_shape(linear, value, content)
        try:
            tensors, entry = Mlx().encode(value)
        except InputError as error:
            raise InputError(f"{linear}: {error}") from error
        if not quantization:
            quantization.update(entry)
        elif any(quantization[key] != entry[key] for key in entry):
            quantization[linear] = entry
        yield from ((f"{linear}.{part}", tensor) for part, tensor in tensors.items())
