"""The GPTQ checkpoint, version 1 (auto-gptq: zero points less one) and version 2 (zero points as they are).

For a linear with I inputs, O outputs and G groups: ``qweight`` int32 [I·bits/32, O] packed along the inputs, ``qzeros``
int32 [G, O·bits/32] packed along the outputs, ``scales`` float16 [G, O], ``g_idx`` int32 [I].
(AutoGPTQ 0.7.1, nn_modules/qlinear; GPTQModel, docs of the format)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.core.types import Grid, QuantizedWeight, QuantSpec, group_index
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
)
from quant.export.packing import pack, unpack

BITS = (2, 3, 4, 8)
MULTIPLE = 32
PARTS = ("qweight", "scales", "qzeros", "g_idx")


class Gptq:
    """Version 1 or 2."""

    parts: tuple[str, ...] = PARTS

    def __init__(self, name: str, offset: int) -> None:
        self.name, self.offset = name, offset

    def refuses(self, content: Content) -> str | None:
        """Bits, shapes, sparse parts, activations."""
        if against := refuses_codes(content, self.name) or refuses_grid(content, self.name):
            return against
        if against := refuses_outside(content, self.name):
            return against
        if content.act.active:
            return f"{self.name} is weight-only and cannot hold activation quantization: use format bitplane"
        if content.bits not in BITS:
            return f"{self.name} holds 2, 3, 4 or 8 bits, not {content.bits}: use format compressed-tensors"
        for name, shape in content.shapes.items():
            if any(n % MULTIPLE for n in shape):
                return f"{self.name} needs inputs and outputs in multiples of {MULTIPLE}, {name} is {shape[0]}x{shape[1]}: use format compressed-tensors"
        return misfit_linear(content, self.name)

    def encode(self, weight: QuantizedWeight, content: Content) -> dict[str, Tensor]:
        """Raises InputError for a zero point of 0 in version 1, which readers take for 2^bits or damage."""
        bits, zero = content.bits, weight.grid.zero
        check_encodable(weight, content, self.name)
        if self.offset and bool((zero < self.offset).any()):
            raise InputError("gptq stores zero points less one and cannot hold 0: use format gptq_v2")
        return {
            "qweight": pack(weight.codes, bits).t().contiguous(),
            "qzeros": pack((zero - self.offset).t(), bits),
            "scales": half_scales(weight, self.name).t().contiguous(),
            "g_idx": weight.grid.g_idx.to(torch.int32),
        }

    def config(self, content: Content, layers: Layers) -> dict[str, Any]:
        """The fields that every reader knows; both spellings of the version."""
        assert content.spec is not None
        settings: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": content.bits,
            "group_size": content.spec.group_size,
            "desc_act": content.reordered,
            "sym": content.centered,
            "static_groups": content.static_groups,
            "true_sequential": content.true_sequential,
            "damp_percent": 0.01,
            "lm_head": any(not name.startswith(f"{layers.blocks}.") for name in layers.quantized),
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "model_name_or_path": "",
            "model_file_base_name": "model",
            "meta": {"quantizer": ["llm-quantizer:0.1.0"]},
        }
        # Of a head with bits of its own; by the first pattern that fits a name
        own = {
            f"+:{re.escape(name)}$": {"bits": m.bits} for name, m in content.outside.items() if m.bits != content.bits
        }
        if own:
            settings["dynamic"] = own
        if not content.whole:
            # GPTQModel and vLLM read the first, optimum (which compares the ends of names) the second
            settings["dynamic"] = own | {pattern: {} for pattern in _skipping(layers)}
            inside = f"{layers.blocks}."
            settings["modules_in_block_to_quantize"] = [[name for name in layers.quantized if name.startswith(inside)]]
        return settings

    def shape(self, linear: StoredLinear) -> tuple[int, int]:
        """The inputs from ``g_idx``, else from the words."""
        rows, n_out = linear.header("qweight")
        if "g_idx" in linear:
            return n_out, linear.header("g_idx")[0]
        return n_out, rows * 32 // int(_settings_of(linear)["bits"])

    def decode(self, linear: StoredLinear) -> QuantizedWeight:
        """Raises InputError where config.json says other bits, groups, versions or symmetry than the tensors hold."""
        settings, name = _settings_of(linear), linear.name
        group_size, bits, symmetric = int(settings["group_size"]), int(settings["bits"]), bool(settings.get("sym"))
        words, scales, zeros, g_idx = _tensors_of(linear, bits, group_size)
        n_in = g_idx.numel()
        if settings.get("desc_act") and "g_idx" not in linear:
            raise InputError(f"{name}: config.json says desc_act, but there is no g_idx that gives the order")
        if not settings.get("desc_act") and not torch.equal(g_idx, group_index(n_in, group_size)):
            raise InputError(
                f"{name}: config.json says desc_act false, but g_idx is not in order, which readers would ignore: "
                "set desc_act to true if the software that made it ordered by activations"
            )
        zero = unpack(zeros, bits, words.shape[1]).t().to(torch.int32) + self.offset
        if symmetric and bool((zero != 2 ** (bits - 1)).any()):
            raise InputError(
                f"{name}: config.json says sym and {self.name}, but the zero points are not {2 ** (bits - 1)}"
            )
        if int(zero.max()) > 2**bits - 1:
            raise InputError(
                f"{name}.qzeros holds {2**bits} less one: readers of version 1 disagree what that is; convert it to gptq_v2 with the software that made it"
            )
        spec = QuantSpec(bits, group_size, symmetric)
        grid = Grid(scales.t().float().contiguous(), zero.contiguous(), g_idx, spec.qmax)
        return QuantizedWeight(unpack(words.t().contiguous(), bits, n_in), grid, spec)

    def act(self, config: Mapping[str, Any]) -> ActSpec:
        """None."""
        return ActSpec()


def _skipping(layers: Layers) -> list[str]:
    """Patterns of ``dynamic`` for the blocks, and the linears of other blocks, that are not quantized."""
    inside = f"{layers.blocks}."
    of_block = {name: int(name.removeprefix(inside).split(".")[0]) for name in (*layers.quantized, *layers.untouched)
                if name.startswith(inside)}  # fmt: skip
    begun = {of_block[name] for name in layers.quantized if name in of_block}  # a head belongs to no block
    left = sorted(set(of_block.values()) - begun)
    singly = [n for n in layers.untouched if n in of_block and of_block[n] in begun]
    whole = [rf"-:{re.escape(layers.blocks)}\.({'|'.join(map(str, left))})\..*"] if left else []
    return whole + [f"-:{re.escape(name)}$" for name in singly]


def _settings_of(linear: StoredLinear) -> Mapping[str, Any]:
    """Settings of a linear: the config's, or those that ``dynamic`` gives it (``+:`` or no sign before the pattern)."""
    for pattern, more in (linear.config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), linear.name):
            return {**linear.config, **more}
    return linear.config


def _tensors_of(linear: StoredLinear, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``qweight``, ``scales``, ``qzeros`` and ``g_idx`` (int64 [in]). Raises InputError where their shapes and dtypes do not
    fit the bits and groups of config.json, or each other."""
    name, (words, scales, zeros) = linear.name, (linear[part] for part in ("qweight", "scales", "qzeros"))
    if group_size < 1 and group_size != -1:
        raise InputError(f"{name}: config.json says group_size {group_size}")
    if linear.config.get("pack_dtype", "int32") != "int32" or words.dtype != torch.int32 or zeros.dtype != torch.int32:
        raise InputError(f"{name}: only codes packed in words of int32 are read")
    n_in = words.shape[0] * 32 // bits
    g_idx = linear["g_idx"].long() if "g_idx" in linear else group_index(n_in, group_size)
    n_in, n_out, n_groups = g_idx.numel(), words.shape[1], scales.shape[0]
    fitting = ((n_in * bits // 32, n_out), (n_groups, n_out), (n_groups, n_out * bits // 32))
    for part, tensor, shape in zip(PARTS, (words, scales, zeros), fitting, strict=False):
        if tuple(tensor.shape) != shape or bits not in BITS:
            raise InputError(
                f"{name}.{part} is {tuple(tensor.shape)}, which does not fit {bits} bits, {n_in} inputs, {n_out} outputs"
            )
    if n_groups != (-(-n_in // group_size) if group_size > 0 else 1):
        raise InputError(f"{name} has {n_groups} groups of {n_in} inputs, but config.json says group_size {group_size}")
    return words, scales, zeros, g_idx
