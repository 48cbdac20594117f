"""compressed-tensors: ``pack-quantized`` (weights of 1 to 8 bits) and ``int-quantized`` (W8A8); floats are in `float_tensors`.

For a linear [O, I]: ``weight_packed`` int32 [O, ceil(I·bits/32)] packed along the inputs (dense, as from version 0.18),
``weight_scale`` [O, G], ``weight_shape`` int64 [2], and for asymmetric grids ``weight_zero_point`` int32
[ceil(O·bits/32), G] packed along the outputs. Their codes are signed, stored plus 2^(bits-1): what is stored is ours.
int-quantized: ``weight`` int8 [O, I], ``weight_scale`` [O, 1]. (compressed_tensors 0.19, compressors/)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models import layout_for
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.core.types import Grid, QuantizedWeight, QuantSpec, group_index
from quant.export import float_tensors
from quant.export.formats import (
    Content,
    Layers,
    StoredLinear,
    check_encodable,
    half_scales,
    matches,
    misfit_linear,
    refuses_codes,
    refuses_grid,
    refuses_outside,
    uneven_groups,
)
from quant.export.packing import pack, unpack


class CompressedTensors:
    """Either of the two; which, the activations decide."""

    name = "compressed-tensors"
    parts: tuple[str, ...] = (
        "weight_scale",
        "weight_packed",
        "weight",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        float_tensors.UNIT,
    )

    def refuses(self, content: Content) -> str | None:
        """Sparse parts, act-order, activations other than W8A8; models whose linears other software has as something else."""
        if layout_for(content.model_type).transposed:
            return (
                f"{self.name} describes linears, and those of {content.model_type} models are none in other software "
                "(Conv1D): use format gptq, gptq_v2 or bitplane"
            )
        if against := refuses_codes(content, self.name) or refuses_grid(
            content, self.name, *float_tensors.FLOAT_FORMATS
        ):
            return against
        if against := refuses_outside(content, self.name):
            return against
        if content.reordered:
            return f"{self.name} cannot hold groups in act-order: use format gptq, or --group-aware or --static-groups"
        if content.act.active and not (_is_w8a8(content) or _is_fp8(content)):
            if content.act.kind != "integer":
                return (
                    f"{self.name} is written with activations in fp8 beside weights of --grid fp8 in whole rows, and not with "
                    f"--act-grid {content.act.kind} here: leave it out of what is saved, or use format dequantized"
                )
            return (
                f"{self.name} holds activations of 8 bits per token with symmetric 8-bit weights per row only, and no "
                "quantized queries, keys and values: use --kvbits 16, or format bitplane"
            )
        return uneven_groups(content, self.name) or misfit_linear(content, self.name)

    def encode(self, weight: QuantizedWeight, content: Content) -> dict[str, Tensor]:
        """Scales in float16, as every reader casts them to the model's dtype."""
        if weight.spec.kind in float_tensors.FLOAT_FORMATS:
            check_encodable(weight, content, self.name)
            return float_tensors.encode(weight)
        bits, scale = content.bits, half_scales(weight, self.name)
        check_encodable(weight, content, self.name)
        if content.act.active:
            return {"weight": (weight.codes.to(torch.int16) - 128).to(torch.int8), "weight_scale": scale}
        tensors = {
            "weight_packed": pack(weight.codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
        }
        if not content.centered:
            tensors["weight_zero_point"] = pack(weight.grid.zero.t(), bits).t().contiguous()
        return tensors

    def config(self, content: Content, layers: Layers) -> dict[str, Any]:
        """One group of settings for all linears, and one of its own for a head of other bits; linears that are left alone are
        named in ``ignore``."""
        assert content.spec is not None
        group = content.spec.group_size if content.spec.group_size > 0 else None
        weights = {"num_bits": content.bits, "type": "int", "symmetric": content.centered, "dynamic": False, "actorder": None,
                   "strategy": "group" if group else "channel", "group_size": group}  # fmt: skip
        inputs = {
            "num_bits": 8,
            "type": "int",
            "symmetric": content.act.symmetric,
            "strategy": "token",
            "dynamic": True,
        }
        kind, quantized = ("int-quantized", inputs) if content.act.active else ("pack-quantized", None)
        if content.spec.kind in float_tensors.FLOAT_FORMATS:
            kind, weights = float_tensors.FLOAT_FORMATS[content.spec.kind], float_tensors.weights_config(content.spec)
            quantized = inputs | {"type": "float", "symmetric": True} if content.act.active else None
        settings = {"targets": ["Linear"], "weights": weights, "input_activations": quantized, "output_activations": None,
                    "format": kind}  # fmt: skip
        return {
            "quant_method": self.name,
            "format": kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": settings, **_of_outside(content, settings)},
            "ignore": [*layers.untouched, *layers.gates],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def shape(self, linear: StoredLinear) -> tuple[int, int]:
        """As written beside packed weights, else of the integers."""
        if _is_float(_settings_of(linear)):
            return float_tensors.shape(linear)
        n_out, n_in = map(int, linear["weight_shape"]) if "weight_shape" in linear else linear.header("weight")
        return n_out, n_in

    def decode(self, linear: StoredLinear) -> QuantizedWeight:
        """Raises InputError for settings that are no uniform integer grid, or that the tensors contradict."""
        settings, name = _settings_of(linear), linear.name
        if _is_float(settings):
            return float_tensors.decode(linear, settings)
        bits, symmetric = int(settings["num_bits"]), bool(settings.get("symmetric", True))
        if settings.get("type", "int") != "int" or "weight_g_idx" in linear:
            raise InputError(f"{name}: only integers and floats without act-order are read")
        codes = _codes_of(linear, bits)
        n_out, n_in = codes.shape
        scale = linear["weight_scale"].float()
        scale = scale.view(-1, scale.shape[-1] if scale.dim() == 2 else 1).expand(n_out, -1).contiguous()
        zero = _zeros_of(linear, bits, symmetric, scale)
        if zero.shape != scale.shape or n_in % scale.shape[1]:
            raise InputError(
                f"{name}: scales {tuple(scale.shape)} and zero points {tuple(zero.shape)} do not fit {n_out}x{n_in}"
            )
        group_size = int(settings.get("group_size") or -1)
        if scale.shape[1] != (n_in // group_size if group_size > 0 else 1):
            raise InputError(
                f"{name} has {scale.shape[1]} groups of {n_in} inputs, but config.json says group_size {settings.get('group_size')}"
            )
        spec = QuantSpec(bits, group_size, symmetric and bits > 1)
        return QuantizedWeight(codes, Grid(scale, zero, group_index(n_in, group_size), spec.qmax), spec)

    def act(self, config: Mapping[str, Any]) -> ActSpec:
        """Of all groups. Raises InputError for activations that are not quantized per token, or not by all groups alike,
        and for every other setting that changes what the checkpoint computes.
        """
        _refuse_what_is_not_read(config)
        first, *others = (group.get("input_activations") or None for group in config["config_groups"].values())
        for other in others:
            if _grid_of(other) != _grid_of(first):
                raise InputError("config.json: config_groups disagree on input_activations, which is not read")
        if first is None:
            return ActSpec()
        per_token = first.get("strategy") == "token" and first.get("dynamic") is True
        if per_token and _is_float(first) and first.get("num_bits") == 8:
            return ActSpec.on("fp8")
        if not per_token or first.get("type", "int") != "int":
            raise InputError(
                "config.json: input_activations are not integers or fp8 per token (dynamic), which is all that is read"
            )
        bits = int(first["num_bits"])
        if not 2 <= bits <= 8:
            raise InputError(f"config.json: input_activations of {bits} bits; 2 to 8 are read")
        return ActSpec(bits, symmetric=bool(first.get("symmetric", True)))


def _of_outside(content: Content, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of settings, by name, for what has bits of its own outside the blocks: a name goes before a class."""
    own = [(name, matrix.bits) for name, matrix in content.outside.items() if matrix.bits != content.bits]
    return {
        f"group_{number}": {**settings, "targets": [name], "weights": {**settings["weights"], "num_bits": bits}}
        for number, (name, bits) in enumerate(own, 1)
    }


def _codes_of(linear: StoredLinear, bits: int) -> Tensor:
    """uint8 [out, in], from packed words or int8."""
    if "weight_packed" not in linear:
        integers = linear["weight"]
        wide = integers.to(torch.int16) + 2 ** (bits - 1)
        if integers.dtype != torch.int8 or int(wide.min()) < 0 or int(wide.max()) >= 2**bits:
            raise InputError(f"{linear.name}.weight is {integers.dtype}, or holds more than {bits} bits")
        return wide.to(torch.uint8)
    (n_out, n_in), words = map(int, linear["weight_shape"]), linear["weight_packed"]
    if words.dtype != torch.int32 or tuple(words.shape) != (n_out, -(-n_in * bits // 32)):
        raise InputError(
            f"{linear.name}.weight_packed is {tuple(words.shape)}, which does not fit {bits} bits of {n_out}x{n_in} (files of compressed-tensors before 0.18 pad 3, 5, 6 and 7 bits and are not read)"
        )
    return unpack(words, bits, n_in)


def _zeros_of(linear: StoredLinear, bits: int, symmetric: bool, scale: Tensor) -> Tensor:
    """Zero points of unsigned codes, int32: of symmetric grids of the scales' shape [out, G], of others as they are stored.
    Raises InputError where there are some and none should be, or none and some should be."""
    name, stored, packed = linear.name, "weight_zero_point" in linear, "weight_packed" in linear
    if symmetric and stored and (packed or bool(linear["weight_zero_point"].any())):
        raise InputError(f"{name}: config.json says symmetric, but a zero point is stored")
    if not symmetric and not stored:
        raise InputError(f"{name}: config.json says asymmetric, but no zero point is stored")
    middle = 2 ** (bits - 1)
    if symmetric:
        return torch.full(scale.shape, middle, dtype=torch.int32)
    zero = linear["weight_zero_point"]
    if packed:
        return unpack(zero.t().contiguous(), bits, scale.shape[0]).t().to(torch.int32).contiguous()
    return zero.int() + middle


def _refuse_what_is_not_read(config: Mapping[str, Any]) -> None:
    """Raise InputError that names a setting which changes the numbers and that no reader here follows."""
    sparsity = config.get("sparsity_config")
    dense = isinstance(sparsity, dict) and sparsity.get("format") == "dense"  # nothing is left out of the tensors
    groups = config["config_groups"].items()
    for entry, value in (
        ("transform_config", config.get("transform_config")),
        ("kv_cache_scheme", config.get("kv_cache_scheme")),
        ("sparsity_config", None if dense else sparsity),
        *((f"config_groups.{name}.output_activations", group.get("output_activations")) for name, group in groups),
    ):
        if value:
            raise InputError(
                f"config.json: quantization_config.{entry} is set, which is not read: it changes the model"
            )


def _grid_of(inputs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What of a group's input_activations decides numbers, apart from how its ranges were observed."""
    defaults = {
        "num_bits": None,
        "type": "int",
        "symmetric": True,
        "strategy": None,
        "dynamic": False,
        "group_size": None,
    }
    return None if inputs is None else {key: inputs.get(key, default) for key, default in defaults.items()}


def _is_float(settings: Mapping[str, Any]) -> bool:
    return settings.get("type", "int") == "float"


def _is_fp8(content: Content) -> bool:
    spec, act = content.spec, content.act
    assert spec is not None
    return (spec.kind, spec.group_size, act.kind, act.kv_bits) == ("fp8", -1, "fp8", 16)


def _is_w8a8(content: Content) -> bool:
    spec, act = content.spec, content.act
    assert spec is not None
    rows = act.kind == "integer" and spec.bits == 8 and content.centered and spec.group_size == -1
    return rows and (act.bits, act.kv_bits, act.method) == (8, 16, "per_token")


def _settings_of(linear: StoredLinear) -> Mapping[str, Any]:
    """Weight settings of a linear: of the group that names it, by a pattern or as a class."""
    name, groups = linear.name, linear.config["config_groups"].values()
    for fits in (
        lambda target: target == name or name.endswith("." + target),
        lambda target: target.startswith("re:") and matches(target[3:], name),
        lambda target: target == "Linear",
    ):
        for group in groups:
            if group.get("weights") and any(fits(target) for target in group["targets"]):
                return group["weights"]
    raise InputError(f"config.json names no group of settings for {name}")
