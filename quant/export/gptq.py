"""The GPTQ checkpoint, version 1 (auto-gptq: zero points less one) and version 2 (zero points as they are).

For a linear with I inputs, O outputs and G groups: ``qweight`` int32 [I·bits/32, O] packed along the inputs, ``qzeros``
int32 [G, O·bits/32] packed along the outputs, ``scales`` float16 [G, O], ``g_idx`` int32 [I].
(AutoGPTQ 0.7.1, nn_modules/qlinear; GPTQModel, docs of the format)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quant.core.actquant import ActSpec
from quant.core.errors import InputError
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from quant.export.formats import Content, Layers, Read, half_scales, plain_groups
from quant.export.packing import pack, unpack

BITS = (2, 3, 4, 8)
MULTIPLE = 32
PARTS = ("qweight", "qzeros", "scales", "g_idx")


class Gptq:
    """Version 1 or 2."""

    def __init__(self, name: str, offset: int) -> None:
        self.name, self.offset = name, offset

    def refuses(self, content: Content) -> str | None:
        """Bits, shapes, sparse parts, activations."""
        if content.spec is None:
            return f"{self.name} holds quantized weights, and these stay in full precision: use --format dequantized"
        if content.outliers or content.online:
            what = "sparse outliers" if content.outliers else "matrices behind norms"
            return f"{self.name} cannot hold {what}: use --format bitplane"
        if content.act.active:
            return f"{self.name} is weight-only and cannot hold activation quantization: use --format bitplane"
        if content.bits not in BITS:
            return f"{self.name} holds 2, 3, 4 or 8 bits, not {content.bits}: use --format compressed-tensors"
        for name, shape in content.shapes.items():
            if any(n % MULTIPLE for n in shape):
                return f"{self.name} needs inputs and outputs in multiples of {MULTIPLE}, {name} is {shape[0]}x{shape[1]}: use --format compressed-tensors"
        return None

    def encode(self, weight: QuantizedWeight, content: Content) -> dict[str, Tensor]:
        """Raises InputError for a zero point of 0 in version 1, which readers take for 2^bits or damage."""
        bits, zero = content.bits, weight.grid.zero
        if self.offset and bool((zero < self.offset).any()):
            raise InputError("gptq stores zero points less one and cannot hold 0: use --format gptq_v2")
        return {
            "qweight": pack(weight.codes, bits).t().contiguous(),
            "qzeros": pack((zero - self.offset).t(), bits),
            "scales": half_scales(weight, self.name).t().contiguous(),
            "g_idx": weight.grid.g_idx.to(torch.int32),
        }

    def config(self, content: Content, layers: Layers) -> dict[str, Any]:
        """The fields that every reader knows; both spellings of the version."""
        assert content.spec is not None
        found: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": content.bits,
            "group_size": content.spec.group_size,
            "desc_act": content.reordered,
            "sym": content.centered,
            "static_groups": False,
            "true_sequential": True,
            "damp_percent": 0.01,
            "lm_head": False,
            "checkpoint_format": self.name,
            "format": self.name,
            "pack_dtype": "int32",
            "model_name_or_path": "",
            "model_file_base_name": "model",
            "meta": {"quantizer": ["llm-quantizer:0.1.0"]},
        }
        if not content.whole:
            left = sorted({int(n.removeprefix(layers.blocks + ".").split(".")[0]) for n in layers.untouched
                           if n.startswith(layers.blocks + ".")})  # fmt: skip
            prefix = layers.blocks.replace(".", r"\.")
            found["dynamic"] = {rf"-:{prefix}\.({'|'.join(map(str, left))})\..*": {}}
        return found

    def linears(self, names: Iterable[str], config: Mapping[str, Any]) -> list[str]:
        """Those with a qweight."""
        return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]

    def parts(self, weight: str) -> tuple[str, ...]:
        """Four tensors."""
        return PARTS

    def decode(self, name: str, read: Read, names: Iterable[str], config: Mapping[str, Any]) -> QuantizedWeight:
        """The bits come from the shapes, as per-layer settings (``dynamic``) may differ from the config's."""
        words, scales = read(f"{name}.qweight"), read(f"{name}.scales")
        group_size, bits = int(config["group_size"]), int(config["bits"])
        n_in = words.shape[0] * 32 // bits
        g_idx = plain_groups(n_in, scales.shape[0])
        if f"{name}.g_idx" in set(names):
            g_idx = read(f"{name}.g_idx").long()
            n_in = g_idx.numel()
            bits = words.shape[0] * 32 // n_in
        n_out, n_groups = words.shape[1], scales.shape[0]
        zeros = read(f"{name}.qzeros")
        asked = {
            "qweight": (n_in * bits // 32, n_out),
            "scales": (n_groups, n_out),
            "qzeros": (n_groups, n_out * bits // 32),
        }
        for part, shape in (("qweight", words.shape), ("scales", scales.shape), ("qzeros", zeros.shape)):
            if tuple(shape) != asked[part] or bits not in BITS:
                raise InputError(
                    f"{name}.{part} is {tuple(shape)}, which does not fit {bits} bits, {n_in} inputs, {n_out} outputs"
                )
        if group_size > 0 and n_groups != -(-n_in // group_size):
            raise InputError(
                f"{name} has {n_groups} groups of {n_in} inputs, but config.json says group_size {group_size}"
            )
        zero = unpack(zeros, bits, n_out).t().to(torch.int32) + self.offset
        if int(zero.max()) > 2**bits - 1:
            raise InputError(
                f"{name}.qzeros holds {2**bits} less one: readers of version 1 disagree what that is; convert it to gptq_v2 with the software that made it"
            )
        spec = QuantSpec(bits, group_size if group_size > 0 else -1, bool(config.get("sym", False)))
        grid = Grid(scales.t().float().contiguous(), zero.contiguous(), g_idx, spec.qmax)
        return QuantizedWeight(unpack(words.t().contiguous(), bits, n_in), grid, spec)

    def act(self, config: Mapping[str, Any]) -> ActSpec:
        """None."""
        return ActSpec()
