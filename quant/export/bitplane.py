"""Our own format, for what the others cannot hold: 1 to 8 bits, five levels, outliers, act-order, two-level scales,
activation settings and clips, matrices behind norms and in front of linears.

For a linear [O, I]: ``planes`` int32 [bits, O, ceil(I/32)] (plane b holds bit b of 32 codes a word), ``scales`` [O, G]
float16 or float32, or ``scale_codes``, ``scale_base`` and ``scale_step``; ``zeros`` uint8 [O, G] for asymmetric grids
of integer zero points, ``minima`` [O, G] float16 or float32 of real ones, or for fractional zero points ``scale_zeros`` in
the place of scales, O * G numbers of 16 + bits bits one behind the other: a float16 scale's bits without sign and last four,
then the zero point in 1/32 of a step (scales and minima where a scale has no such form);
``in_features`` where I is no multiple of 32;
``scale_layout``: bits and rows of two-level scales; ``g_idx`` int32 [I] where columns are not in order; outliers as compressed rows (``outlier_rows`` int32 [O + 1],
``outlier_columns`` int32, ``outlier_values`` float16 or float32) or as whole columns. config.json names the grid of every linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant.blocks.fake_quant import METHODS, ActSpec
from quant.core.errors import InputError
from quant.core.names import FULL_BITS
from quant.core.types import (
    CUT,
    BilevelScales,
    Grid,
    Outliers,
    QuantizedWeight,
    QuantSpec,
    group_index,
    is_short,
    minimum_at,
    most_steps,
    short_bits,
    zero_steps,
)
from quant.export.formats import (
    Content,
    Layers,
    StoredLinear,
    check_grid,
    in_order,
    refuses_codes,
    refuses_grid,
    uneven_groups,
)
from quant.export.packing import pack, pack_planes, unpack, unpack_planes

VERSION = 1
SCALES = ("scale_codes", "scale_base", "scale_step")
OUTLIERS = ("outlier_rows", "outlier_columns", "outlier_values")
PARTS = (
    "planes", "in_features", "scales", *SCALES, "scale_layout", "scale_zeros", "zeros", "minima", "g_idx", *OUTLIERS,
)  # fmt: skip


class Bitplane:
    """Holds every answer of every solver, but those on the grids of another format."""

    name = "bitplane"
    parts: tuple[str, ...] = PARTS

    def refuses(self, content: Content) -> str | None:
        """What is not quantized at all, groups of others that do not divide the inputs, and levels that are not those of all."""
        if content.outside and content.spec is not None and content.spec.levels is not None:
            return (
                f"{self.name} holds one number of levels, and head or embedding have others than the blocks: use "
                "--bit-balance off, or format dequantized"
            )
        if content.spec is not None and content.spec.super_kind is not None:
            return f"{self.name} has no super-blocks of --grid {content.spec.kind}: use format gguf"
        if content.spec is not None and content.spec.level_kind is not None:
            return refuses_grid(content, self.name)
        return refuses_codes(replace(content, outliers=False, online=(), mixed=False), self.name) or uneven_groups(
            content, self.name
        )

    def encode(self, weight: QuantizedWeight, content: Content) -> dict[str, Tensor]:
        """Everything that `QuantizedWeight.storage_bits` counts, and nothing else."""
        grid = weight.grid
        check_grid(weight, content, self.name)
        tensors = {"planes": pack_planes(weight.codes, weight.spec.code_bits)}
        if weight.codes.shape[1] % 32:
            tensors["in_features"] = torch.tensor(weight.codes.shape[1])
        tensors |= _encode_grid(grid, weight.spec)
        if not in_order(weight):
            tensors["g_idx"] = grid.g_idx.to(torch.int32)
        if weight.outliers is not None:
            tensors |= _encode_outliers(weight.outliers, *weight.codes.shape)
        return tensors

    def config(self, content: Content, layers: Layers) -> dict[str, Any]:
        """Grid and activations; mixed: every linear has as many bits as planes."""
        assert content.spec is not None
        return {
            "quant_method": self.name,
            "version": VERSION,
            "spec": content.spec.to_json(),
            **({"mixed": True} if content.mixed or content.has_other_bits else {}),
            "activations": content.act.to_json(),
            "ignore": [*layers.untouched, *layers.gates],
        }

    def shape(self, linear: StoredLinear) -> tuple[int, int]:
        """Of the planes, and the inputs where they fill no whole words."""
        _, n_out, n_words = linear.header("planes")
        return n_out, int(linear["in_features"]) if "in_features" in linear else n_words * 32

    def decode(self, linear: StoredLinear) -> QuantizedWeight:
        """Raises InputError where config.json and tensors disagree, or another version wrote them."""
        config, name = linear.config, linear.name
        if config.get("version") != VERSION:
            raise InputError(f"bitplane of version {config.get('version')} is not read, only version {VERSION}")
        spec = QuantSpec(**config["spec"])
        part = {part: linear[part] for part in PARTS if part in linear}
        if config.get("mixed") is True:
            spec = replace(spec, bits=part["planes"].shape[0])
        n_out = part["planes"].shape[1]
        n_in = int(part["in_features"]) if "in_features" in part else part["planes"].shape[2] * 32
        grid = _decode_grid(part, spec, n_out, n_in, name)
        codes = unpack_planes(part["planes"], n_in)
        return QuantizedWeight(codes, grid, spec, outliers=_decode_outliers(part, n_out, n_in))

    def act(self, config: Mapping[str, Any]) -> ActSpec:
        """As written. Raises InputError for settings that are none."""
        act = ActSpec(**config["activations"])
        bits = all(isinstance(n, int) and 2 <= n <= FULL_BITS for n in (act.bits, act.kv_bits))
        if not bits or act.method not in METHODS or not isinstance(act.symmetric, bool):
            raise InputError(f"config.json: activations {config['activations']} are none that a run can have")
        return act


def _encode_grid(grid: Grid, spec: QuantSpec) -> dict[str, Tensor]:
    if grid.bilevel is not None:
        level = grid.bilevel
        tensors = dict(zip(SCALES, (level.codes, level.base, level.step), strict=True))
        tensors["scale_layout"] = torch.tensor([level.bits, level.rows])
    elif is_short(grid, spec):
        scales = grid.scale.half().view(torch.int16).int() >> CUT
        both = (scales * most_steps(spec)) | zero_steps(grid).int()
        return {"scale_zeros": pack(both.view(1, -1), short_bits(spec))}
    else:
        tensors = {"scales": grid.scale.half() if grid.scale_bits == 16 else grid.scale}
    if grid.minimum is not None:
        tensors["minima"] = grid.minimum.half() if grid.minimum_bits == 16 else grid.minimum
    elif not spec.symmetric:
        tensors["zeros"] = grid.zero.to(torch.uint8)
    return tensors


def _decode_grid(part: Mapping[str, Tensor], spec: QuantSpec, n_out: int, n_in: int, name: str) -> Grid:
    """Raises InputError where its tensors are not those of the grid that config.json names."""
    bilevel, zeros, minima = None, part.get("zeros"), part.get("minima")
    if "scale_codes" in part:
        bits, rows = part["scale_layout"].tolist()
        bilevel = BilevelScales(part["scale_codes"], part["scale_base"], part["scale_step"], bits, rows)
        scale = bilevel.expand(n_out)
    elif "scale_zeros" in part and spec.kind == "fractional":
        scale, minima = _decode_short(part["scale_zeros"], spec, n_out, spec.n_groups(n_in), name)
    else:
        scale = part["scales"].float()
    if part["planes"].shape[0] != spec.code_bits or scale.shape[0] != n_out:
        raise InputError(
            f"{name}: planes {tuple(part['planes'].shape)} and scales {tuple(scale.shape)} do not fit {spec.code_bits} bits"
        )
    has_zeros = not spec.symmetric and not spec.has_minimum
    if (
        scale.shape[1] != spec.n_groups(n_in)
        or has_zeros != (zeros is not None)
        or spec.has_minimum != (minima is not None)
    ):
        told = {"zero points": zeros} | ({"minima": minima} if spec.has_minimum or minima is not None else {})
        held = [what if one is not None else f"no {what}" for what, one in told.items()]
        kind = "symmetric" if spec.symmetric else "asymmetric"
        kind += f", of {spec.kind} kind" if "minima" in told else ""
        raise InputError(
            f"{name} has {scale.shape[1]} groups of {n_in} inputs and {', and '.join(held)}, "
            f"but config.json says group_size {spec.group_size} and {kind}"
        )
    g_idx = part["g_idx"].long() if "g_idx" in part else group_index(n_in, spec.group_size)
    if minima is not None:
        return Grid.real(scale, minima.float(), g_idx, spec.qmax)
    middle = torch.full(scale.shape, spec.numbers.middle, dtype=torch.int32)
    return Grid(scale, middle if zeros is None else zeros.int(), g_idx, spec.qmax, bilevel)


def _decode_short(words: Tensor, spec: QuantSpec, n_out: int, n_groups: int, name: str) -> tuple[Tensor, Tensor]:
    """Scales and minima [O, G] of short scales and fractional zero points. Raises InputError where there are not as many."""
    bits, count = short_bits(spec), n_out * n_groups
    if words.shape != (1, -(-count * bits // 32)):
        raise InputError(f"{name}: scale_zeros {tuple(words.shape)} do not hold {count} numbers of {bits} bits")
    both = unpack(words, bits, count, torch.int32).view(n_out, n_groups)
    scale = ((both // most_steps(spec)) << CUT).to(torch.int16).view(torch.float16).float()
    return scale, minimum_at(scale, both % most_steps(spec))


def _encode_outliers(outliers: Outliers, n_out: int, n_in: int) -> dict[str, Tensor]:
    if outliers.whole_columns:
        columns = outliers.index[: outliers.index.numel() // n_out]
        return {"outlier_columns": columns.to(torch.int32), "outlier_values": outliers.value.view(n_out, -1)}
    rows = torch.bincount(outliers.index // n_in, minlength=n_out).cumsum(0)
    return {
        "outlier_rows": torch.cat([rows.new_zeros(1), rows]).to(torch.int32),
        "outlier_columns": (outliers.index % n_in).to(torch.int32),
        "outlier_values": outliers.value,
    }


def _decode_outliers(part: Mapping[str, Tensor], n_out: int, n_in: int) -> Outliers | None:
    if "outlier_values" not in part:
        return None
    columns, value = part["outlier_columns"].long(), part["outlier_values"]
    if "outlier_rows" not in part:
        index = (torch.arange(n_out)[:, None] * n_in + columns).flatten()
        return Outliers(index, value.flatten(), whole_columns=True)
    counts = part["outlier_rows"].long().diff()
    return Outliers(torch.repeat_interleave(torch.arange(n_out), counts) * n_in + columns, value)
