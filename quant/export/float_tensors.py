"""Weights whose levels are floats, as compressed-tensors keeps them: ``nvfp4-pack-quantized``, ``mxfp4-pack-quantized`` and
``float-quantized``.

For a linear [O, I]. E2M1: ``weight_packed`` uint8 [O, I/2], two numbers a byte, the first in the low half, as sign, two bits of
exponent and one of mantissa; ``weight_scale`` [O, I/16] in E4M3 with ``weight_global_scale`` float32 [1], by which it is divided,
or [O, I/32] uint8, the exponent of two plus 127. FP8: ``weight`` in E4M3 [O, I], ``weight_scale`` float32 [O, 1], or of blocks
[ceil(O/128), I/128]. (compressed_tensors 0.20, compressors/nvfp4, mxfp4, naive_quantized)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.core.errors import InputError
from quant.core.level_grid import tensor_unit
from quant.core.levels import TABLES, level_codes, levels_of
from quant.core.names import LEVEL_GRIDS
from quant.core.types import Grid, QuantizedWeight, QuantSpec, group_index
from quant.export.formats import StoredLinear

FLOAT_FORMATS = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "fp8": "float-quantized"}
ZERO, BIAS = 7, 127  # the code of 0 in E2M1; what is added to an exponent of two
UNIT = "weight_global_scale"


def encode(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of an answer, whose columns are in order and which has no sparse parts. Raises InputError for scales that
    E4M3 and a power of two do not give: other software's tensors have other units."""
    kind, scale = weight.spec.kind, weight.grid.scale
    if kind == "fp8":
        rows = weight.spec.shared_rows
        levels = levels_of(weight.codes, TABLES[kind]).to(torch.float8_e4m3fn)
        return {"weight": levels, "weight_scale": scale[::rows].contiguous()}
    packed = {"weight_packed": _pack(weight.codes)}
    if kind == "mxfp4":
        return packed | {"weight_scale": (torch.frexp(scale)[1] - 1 + BIAS).to(torch.uint8)}
    unit = tensor_unit(scale)
    stored = (scale / unit).to(torch.float8_e4m3fn)
    if not torch.equal(stored.float() * unit, scale):
        raise InputError(
            f"{UNIT} of the source is no power of two, and scales are not rounded again: use the checkpoint as it is, or "
            "format dequantized"
        )
    return packed | {"weight_scale": stored, UNIT: torch.tensor([1 / unit])}


def _pack(codes: Tensor) -> Tensor:
    """Codes uint8 [O, I] of E2M1 in ascending order as bytes of two numbers."""
    magnitude = (codes.int() - ZERO).abs()
    bits = (magnitude | (codes < ZERO).int() << 3).to(torch.uint8)
    return bits[:, ::2] | bits[:, 1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    """The codes again; -0 is 0."""
    bits = torch.stack((packed & 15, packed >> 4), 2).flatten(1).int()
    magnitude = bits & 7
    return torch.where(bits >= 8, ZERO - magnitude, ZERO + magnitude).to(torch.uint8)


def weights_config(spec: QuantSpec) -> dict[str, Any]:
    """The entry ``weights`` of a group of config.json."""
    strategy = {"nvfp4": "tensor_group", "mxfp4": "group", "fp8": "block" if spec.group_size > 0 else "channel"}
    dtype = {"nvfp4": "torch.float8_e4m3fn", "mxfp4": "torch.uint8"}.get(spec.kind)
    size = spec.group_size if spec.kind != "fp8" else None
    return {"num_bits": spec.bits, "type": "float", "symmetric": True, "dynamic": False, "actorder": None,
            "strategy": strategy[spec.kind], "group_size": size, "scale_dtype": dtype,
            "block_structure": [spec.shared_rows, spec.group_size] if strategy[spec.kind] == "block" else None}  # fmt: skip


def spec_in(settings: Mapping[str, Any], name: str) -> QuantSpec:
    """The grid that the entry ``weights`` describes. Raises InputError for one that is not read."""
    bits, strategy, size = settings.get("num_bits"), settings.get("strategy"), settings.get("group_size")
    if settings.get("symmetric", True) and not settings.get("dynamic"):
        if (bits, strategy, size) == (4, "tensor_group", 16):
            return QuantSpec(4, 16, kind="nvfp4")
        if (bits, strategy, size) == (4, "group", 32):
            return QuantSpec(4, 32, kind="mxfp4")
        if bits == 8 and strategy == "channel":
            return QuantSpec(8, kind="fp8")
        if bits == 8 and strategy == "block" and list(settings.get("block_structure") or ()) == [128, 128]:
            return QuantSpec(8, 128, kind="fp8")
    raise InputError(
        f"{name}: config.json says floats of {bits} bits by {strategy} of {size}; read are nvfp4 (tensor_group of 16), mxfp4 "
        "(group of 32) and fp8 (channel, or block of 128x128)"
    )


def shape(linear: StoredLinear) -> tuple[int, int]:
    """(out, in), from the headers."""
    if "weight_packed" in linear:
        n_out, half = linear.header("weight_packed")
        return n_out, 2 * half
    n_out, n_in = linear.header("weight")
    return n_out, n_in


def decode(linear: StoredLinear, settings: Mapping[str, Any]) -> QuantizedWeight:
    """Raises InputError where tensors and config.json disagree."""
    name, spec = linear.name, spec_in(settings, linear.name)
    stored, scale = linear["weight" if spec.kind == "fp8" else "weight_packed"], linear["weight_scale"]
    codes = _codes(stored, spec, name)
    n_out, n_in = codes.shape
    rows, groups = -(-n_out // spec.shared_rows), spec.n_groups(n_in)
    if scale.numel() != rows * groups or len(scale) != rows:
        raise InputError(f"{name}: scales {tuple(scale.shape)} do not fit {n_out}x{n_in} in {spec.described()}")
    values = _scales(scale.view(rows, groups), spec, linear).repeat_interleave(spec.shared_rows, 0)[:n_out]
    zero = torch.zeros(values.shape, dtype=torch.int32)
    grid = Grid(values.contiguous(), zero, group_index(n_in, spec.group_size), spec.qmax, table=TABLES[spec.kind])
    return QuantizedWeight(codes, grid, spec)


def _codes(stored: Tensor, spec: QuantSpec, name: str) -> Tensor:
    wanted = torch.float8_e4m3fn if spec.kind == "fp8" else torch.uint8
    if stored.dtype != wanted or stored.dim() != 2:
        raise InputError(f"{name}: {spec.kind} is kept in {wanted} [out, in], not {stored.dtype} {tuple(stored.shape)}")
    if spec.kind != "fp8":
        return _unpack(stored)
    values = stored.float()
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name}.weight holds what is no number")
    return level_codes(values, TABLES["fp8"]).to(torch.uint8)


def _scales(scale: Tensor, spec: QuantSpec, linear: StoredLinear) -> Tensor:
    if LEVEL_GRIDS[spec.kind].scale == "e8m0":
        if scale.dtype != torch.uint8:
            raise InputError(f"{linear.name}.weight_scale is {scale.dtype}, and mxfp4 keeps exponents in uint8")
        return torch.ldexp(torch.ones(scale.shape), scale.int() - BIAS)
    if spec.kind != "nvfp4":
        return scale.float()
    if UNIT not in linear or linear[UNIT].numel() != 1 or not bool(linear[UNIT] > 0):
        raise InputError(f"{linear.name}: nvfp4 needs one positive {UNIT}")
    return scale.float() / linear[UNIT].float().view(1, 1)
