"""Which software takes a checkpoint: rules as data, asked before work begins.

``tried``: rows that tests or benchmarks/results/loaders.md have run; the others were read in the software's source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from quant.core.types import QuantSpec
from quant.export import DEQUANTIZED, FORMATS, PACKED
from quant.export.formats import Content

GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)
MARLIN_GROUPS = (-1, 32, 64, 128)


@dataclass(frozen=True)
class Rule:
    """What a runtime takes of a format. None: anything. inputs, outputs: multiples of. families: model types that it
    reads without an error but computes wrongly."""

    runtime: str
    format: str
    bits: tuple[int, ...] | None = None
    symmetric: bool = False
    groups: tuple[int, ...] | None = None
    inputs: int = 1
    outputs: int = 1
    partial: bool = True
    reordered: bool = True
    activations: bool = False
    families: tuple[str, ...] = ()
    needs: str = ""
    tried: bool = False

    def objections(self, content: Content) -> Iterator[str]:
        """What it does not take, in words."""
        if self.format == DEQUANTIZED:
            if content.act.active:
                yield "runs without activation quantization"
            return
        if content.model_type in self.families:
            yield f"gives {content.model_type} models random weights without a word (it replaces plain nn.Linear only)"
        spec = content.spec
        if spec is None:
            yield "takes quantized weights only"
            return
        if self.bits is not None and content.bits not in self.bits:
            yield f"takes {_listed(self.bits)} bits, not {content.bits}"
        if self.symmetric and not content.centered:
            yield "takes symmetric grids only (--sym)"
        if self.groups is not None and spec.group_size not in self.groups:
            yield f"takes groups of {_listed(self.groups)}"
        for name, (n_out, n_in) in content.shapes.items():
            if n_in % self.inputs or n_out % self.outputs:
                yield f"needs inputs in multiples of {self.inputs} and outputs of {self.outputs} ({name} is {n_out}x{n_in})"
                break
        if not self.partial and not content.whole:
            yield "needs every block quantized"
        if not self.reordered and content.reordered:
            yield "takes columns in order only (no --act-order without --static-groups)"
        if content.act.active and not self.activations:
            yield "runs without activation quantization"


RULES = (
    Rule("transformers", DEQUANTIZED, tried=True),
    Rule("transformers", "gptq", (2, 3, 4, 8), groups=GPTQMODEL_GROUPS, inputs=32, outputs=32, partial=False,
         families=("falcon",), needs="optimum and gptqmodel", tried=True),
    Rule("transformers", "gptq_v2", (2, 3, 4, 8), groups=GPTQMODEL_GROUPS, inputs=32, outputs=32, partial=False,
         families=("falcon",), needs="optimum and gptqmodel", tried=True),
    Rule("transformers", "compressed-tensors", activations=True, tried=True,
         needs="compressed-tensors>=0.18; CompressedTensorsConfig(dequantize=True) where asymmetric"),
    Rule("gptqmodel", "gptq", (2, 3, 4, 8), symmetric=True, groups=GPTQMODEL_GROUPS, inputs=32, outputs=32, tried=True),
    Rule("gptqmodel", "gptq_v2", (2, 3, 4, 8), groups=GPTQMODEL_GROUPS, inputs=32, outputs=32, tried=True),
    Rule("vllm", DEQUANTIZED),
    Rule("vllm", "gptq", (4, 8), symmetric=True, groups=MARLIN_GROUPS, inputs=128, outputs=64),
    Rule("vllm", "compressed-tensors", (4, 8), symmetric=True, groups=MARLIN_GROUPS, inputs=128, outputs=64,
         activations=True),
    Rule("vllm", "compressed-tensors", (2, 3, 5, 6, 7), symmetric=True, groups=MARLIN_GROUPS, inputs=128, outputs=64,
         needs="a version with the Humming kernels (2026)"),
    Rule("llama.cpp", DEQUANTIZED),
    Rule("llama.cpp", "gptq", (2, 4, 8)),
    Rule("llama.cpp", "gptq_v2", (2, 4, 8)),
    Rule("llama.cpp", "compressed-tensors", (2, 4, 8), groups=(16, 32, 64, 128, 256)),
    Rule("auto-gptq", "gptq", (2, 3, 4, 8), outputs=32, inputs=32, reordered=False, partial=False),
    Rule("this toolkit", DEQUANTIZED, tried=True),
    *(Rule("this toolkit", name, activations=True, tried=True) for name in PACKED),
)  # fmt: skip
RUNTIMES = tuple(dict.fromkeys(rule.runtime for rule in RULES))


def objections(runtime: str, kind: str, content: Content) -> list[str]:
    """Why a runtime does not take this content in this format; empty if it does."""
    if kind in PACKED and (refusal := PACKED[kind].refuses(content)):
        return [refusal]
    found = [list(rule.objections(content)) for rule in RULES if (rule.runtime, rule.format) == (runtime, kind)]
    return min(found, key=len, default=[f"does not read {kind}"])


def needs(runtime: str, kind: str, content: Content) -> str:
    """What has to be installed beside the runtime."""
    rules = [r for r in RULES if (r.runtime, r.format) == (runtime, kind) and not list(r.objections(content))]
    return rules[0].needs if rules else ""


def nearest(runtime: str, kind: str, content: Content) -> str | None:
    """Flags of the choice closest to what is asked for that the runtime takes: format, then grid, then bits."""
    spec = content.spec
    if spec is None:
        return None
    kinds = [kind, *(f for f in FORMATS if f not in (kind, DEQUANTIZED))]
    grids = [(sym, group) for group in (spec.group_size, 128, 64, 32, -1) for sym in (spec.symmetric, True)]
    for bits in dict.fromkeys((spec.bits, 4, 8)):
        for sym, group in dict.fromkeys(grids):
            for other in kinds:
                if bits == 1 and sym:
                    continue
                asked = replace(content, spec=QuantSpec(bits, group, sym), reordered=False, outliers=False)
                if _divides(asked) and not objections(runtime, other, asked):
                    return f"--wbits {bits} --group-size {group}{' --sym' if sym else ''} --format {other}"
    return None


def _divides(content: Content) -> bool:
    assert content.spec is not None
    group = content.spec.group_size
    return group == -1 or all(n_in % group == 0 for _, n_in in content.shapes.values())


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def loadability(kind: str, content: Content) -> list[tuple[str, bool, str]]:
    """Every runtime, whether it takes the content in this format, and why not or what it needs."""
    found = []
    for runtime in RUNTIMES:
        against = objections(runtime, kind, content)
        found.append((runtime, not against, "; ".join(against) or needs(runtime, kind, content)))
    return found
