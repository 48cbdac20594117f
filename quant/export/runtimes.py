"""Which software takes a checkpoint: rules as data, asked before work begins.

``tried``: the bits for which tests or benchmarks/results/loaders.md have run a rule, for models of ``models_tried`` (None: all); the rest
was read in the software's source or its pull requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from models import layout_for
from models.gguf_architectures import MODEL_TYPES as GGUF_MODELS
from quant.blocks.fake_quant import ActSpec
from quant.core.names import DEQUANTIZED, FORMATS, GGUF, MLX, RUNTIMES
from quant.core.types import QuantSpec
from quant.export import PACKED, refusal
from quant.export.formats import Content, uneven_groups
from quant.export.mlx import MODELS as MLX_MODELS

GPTQMODEL: dict[str, Any] = {
    "groups": (-1, 16, 32, 64, 128, 256, 512, 1024),
    "row_by_size": True,
    "inputs": 32,
    "outputs": 32,
}
MARLIN: dict[str, Any] = {
    "groups": (-1, 32, 64, 128),
    "inputs": 128,
    "outputs": 64,
    "head": True,
    "experts_reordered": False,
}
FUSED = "fuses a mixture's experts as it loads them, and is not known to do so with codes"
ALL_BITS = tuple(range(1, 9))
# Model types that a runtime knows, of those that this toolkit quantizes (auto_gptq/modeling/_const.py of 0.7.1; the
# converters of llama.cpp, conversion/__init__.py, which have no Ministral of 2024)
AUTO_GPTQ_MODELS = ("bloom", "falcon", "gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2")
LLAMA_CPP_MODELS = (
    "bloom", "cohere2", "falcon", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "granite", "llama", "ministral3", "mistral",
    "olmo2", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
# Their converters transpose weights, which those read from codes are already
LLAMA_CPP_PACKED = tuple(name for name in LLAMA_CPP_MODELS if not layout_for(name).transposed)
# Of which benchmarks/results/loaders.md has run checkpoints
TRIED_MODELS = ("bloom", "falcon", "llama", "mistral", "opt")
FILE_MODELS = tuple(sorted(GGUF_MODELS))  # of GGUF files that are written here
TRIED_FILES = tuple(sorted({*FILE_MODELS, *MLX_MODELS}))  # those of benchmarks/results/runtimes.md
# What a runtime needs for models of a type, besides what its rule says (llama.cpp's conversion/gemma.py; transformers 4
# was run)
MODELS_NEED = {
    ("llama.cpp", "gemma2"): "tokenizer.model beside the weights, as the model has it: tokenizer.json is not read",
    ("transformers", "gemma2"): 'attn_implementation="eager" in transformers 4, whose default leaves out the soft cap',
}
# What it needs to read a quantized head, besides
HEAD_NEEDS = {("vllm", "compressed-tensors"): "for the head a version with its pull request 37291"}
HEADS_TRIED = (("transformers", "compressed-tensors"), *(("this toolkit", name) for name in PACKED))
NONE, ONLY, ANY = "none", "only", "any"  # what a rule says of quantized activations


@dataclass(frozen=True)
class Rule:
    """What a runtime takes of a format. None: anything. groups: sizes, -1 for one scale a row. row_by_size: also groups of
    as many columns as the inputs have. grouped: any size, but not whole rows. inputs, outputs: multiples of.
    activations: whether it takes none, only quantized ones, or any. models: the types that it knows (a model whose type is
    not known passes). families: model types that it reads without an error but computes wrongly. head: whether it reads a
    quantized head, that is no embedding too; embedding: a quantized embedding. experts_reordered: whether it takes a
    mixture's experts in act-order; experts: why it takes none at all. levels: kinds of grids of levels that are not evenly spaced;
    a rule is of these, or of all others."""

    runtime: str
    format: str
    bits: tuple[int, ...] | None = None
    symmetric: bool = False
    groups: tuple[int, ...] | None = None
    row_by_size: bool = False
    grouped: bool = False
    inputs: int = 1
    outputs: int = 1
    partial: bool = True
    reordered: bool = True
    activations: str = NONE
    models: tuple[str, ...] | None = None
    families: tuple[str, ...] = ()
    experts_reordered: bool = True
    experts: str = ""
    needs: str = ""
    tried: tuple[int, ...] = ()
    models_tried: tuple[str, ...] | None = TRIED_MODELS
    head: bool = False
    embedding: bool = False
    levels: tuple[str, ...] = ()

    def objections(self, content: Content) -> Iterator[str]:
        """What it does not take, in words."""
        if self.models is not None and content.model_type and content.model_type not in self.models:
            yield f"does not know {content.model_type} models"
        if content.model_type in self.families:
            yield f"does not compute {content.model_type} models as they are (benchmarks/results/loaders.md)"
        if self.format == DEQUANTIZED:
            if content.act.active:
                yield "runs without activation quantization"
            return
        spec = content.spec
        if spec is None:
            yield "takes quantized weights only"
            return
        yield from self._objections_outside(content)
        yield from self._objections_to_sizes(content)
        if (spec.level_kind is not None) != bool(self.levels) or (self.levels and spec.kind not in self.levels):
            yield f"takes {_list(self.levels)} only" if self.levels else f"does not take --grid {spec.kind}"
        if self.symmetric and not content.centered:
            yield "takes symmetric grids only (--sym)"
        whole = self.row_by_size and all(n_in == spec.group_size for _, n_in in content.shapes.values())
        if self.groups is not None and spec.group_size not in self.groups and not whole:
            yield f"takes groups of {_list(self.groups)}"
        if self.grouped and spec.group_size == -1:
            yield "takes groups, not one scale a row"
        if not self.partial and not content.whole:
            yield "needs every block quantized"
        if not self.reordered and content.reordered:
            yield "takes columns in order only (no --act-order without --static-groups)"
        if content.has_experts and self.experts:
            yield self.experts
        elif content.has_experts and content.reordered and not self.experts_reordered:
            yield "takes a mixture's experts with columns in order only (no --act-order without --static-groups)"
        if content.act.active and self.activations == NONE:
            yield "runs without activation quantization"
        if not content.act.active and self.activations == ONLY:
            yield "takes 8-bit weights with 8-bit activations"

    def _objections_to_sizes(self, content: Content) -> Iterator[str]:
        """What it does not take of bits and shapes."""
        if self.bits is not None and content.bits not in self.bits:
            yield f"takes {_list(self.bits)} bits, not {content.bits}"
        for name, (n_out, n_in) in content.shapes.items():
            if n_in % self.inputs or n_out % self.outputs:
                yield f"needs inputs in multiples of {self.inputs} and outputs of {self.outputs} ({name} is {n_out}x{n_in})"
                break

    def _objections_outside(self, content: Content) -> Iterator[str]:
        """What it does not take of head and embedding."""
        for name, matrix, own in content.of_outside():
            if matrix.looked_up and not self.embedding:
                yield f"takes no quantized embedding ({name})"
            elif not self.head:
                yield f"takes no quantized head ({name})"
            else:
                yield from (f"{name}: {line}" for line in self._objections_to_sizes(own))


RULES = (
    Rule("transformers", DEQUANTIZED, tried=ALL_BITS, models_tried=None),
    *(Rule("transformers", name, (2, 3, 4, 8), **GPTQMODEL,
           families=("falcon",), experts=FUSED, needs="optimum and gptqmodel", tried=tried) for name, tried in (("gptq", (2, 3, 4, 8)), ("gptq_v2", (3, 4)))),
    Rule("transformers", "compressed-tensors", symmetric=True, families=("falcon",), experts=FUSED, tried=(2, 3, 4, 8), head=True,
         needs="compressed-tensors>=0.18"),
    Rule("transformers", "compressed-tensors", experts=FUSED, tried=(3, 4), head=True,
         needs="compressed-tensors>=0.18 and CompressedTensorsConfig(dequantize=True)"),
    # OPT flattens tokens before its fully connected part, and then one scale serves all of them
    Rule("transformers", "compressed-tensors", (8,), symmetric=True, groups=(-1,), activations=ONLY,
         families=("falcon", "opt"), experts=FUSED, tried=(8,), needs="compressed-tensors>=0.18"),
    Rule("transformers", "compressed-tensors", levels=("nvfp4", "mxfp4"), families=("falcon",), experts=FUSED,
         tried=(4, 8), needs="compressed-tensors>=0.18 and dtype=torch.bfloat16"),
    Rule("transformers", "compressed-tensors", levels=("fp8",), activations=ANY, families=("falcon",), experts=FUSED,
         tried=(4, 8), needs="compressed-tensors>=0.18"),
    Rule("gptqmodel", "gptq", (2, 3, 4, 8), symmetric=True, **GPTQMODEL, tried=(3, 4), head=True),
    Rule("gptqmodel", "gptq_v2", (2, 3, 4, 8), **GPTQMODEL, tried=(3, 4), head=True),
    Rule("vllm", DEQUANTIZED),
    Rule("vllm", "gptq", (4, 8), symmetric=True, **MARLIN),
    Rule("vllm", "compressed-tensors", (4, 8), **MARLIN),
    Rule("vllm", "compressed-tensors", (2, 3, 5, 6, 7), symmetric=True, **MARLIN,
         needs="a version with the Humming kernels (2026)"),
    Rule("vllm", "compressed-tensors", (2, 3, 5, 6, 7), **MARLIN,
         needs="a version with asymmetric grids of these bits (its pull request 46528)"),
    Rule("vllm", "compressed-tensors", (8,), symmetric=True, groups=(-1,), activations=ONLY,
         needs="a GPU before Blackwell"),
    Rule("vllm", "compressed-tensors", levels=("nvfp4",), inputs=16, outputs=64, needs="a GPU of compute capability 7.5 or above"),
    Rule("vllm", "compressed-tensors", levels=("mxfp4",), inputs=32, outputs=64, needs="a GPU of compute capability 7.5 or above"),
    Rule("vllm", "compressed-tensors", levels=("fp8",), activations=ANY, inputs=16, outputs=16,
         needs="a GPU of compute capability 7.5 or above, 8.9 for inputs in fp8"),
    Rule("llama.cpp", GGUF, levels=("iq4_nl",), models=FILE_MODELS, tried=(4,), models_tried=TRIED_FILES, head=True, embedding=True),
    Rule("llama.cpp", GGUF, models=FILE_MODELS, tried=(2, 3, 4, 5, 6, 8), models_tried=TRIED_FILES, head=True, embedding=True),
    Rule("llama.cpp", DEQUANTIZED, models=LLAMA_CPP_MODELS),
    Rule("llama.cpp", "gptq", (2, 4, 8), models=LLAMA_CPP_PACKED),
    Rule("llama.cpp", "gptq_v2", (2, 4, 8), models=LLAMA_CPP_PACKED),
    Rule("llama.cpp", "compressed-tensors", (2, 4, 8), grouped=True, models=LLAMA_CPP_PACKED),
    *(Rule("auto-gptq", "gptq", bits, outputs=32, inputs=32, reordered=False, partial=False, models=AUTO_GPTQ_MODELS, needs=needs)
      for bits, needs in (((2, 3, 4), ""), ((8,), "its torch kernels: those in CUDA cut the zero points of 8 bits"))),
    Rule("this toolkit", DEQUANTIZED, tried=ALL_BITS, models_tried=None),
    *(Rule("this toolkit", name, activations=ANY, tried=ALL_BITS, models_tried=None, head=True, embedding=True) for name in PACKED),
    Rule("this toolkit", "compressed-tensors", levels=("nvfp4", "mxfp4", "fp8"), activations=ANY, tried=ALL_BITS, models_tried=None,
         head=True),
    Rule("mlx-lm", MLX, models=MLX_MODELS, tried=(2, 3, 4, 5, 6, 8), models_tried=TRIED_FILES),
    Rule("this toolkit", GGUF, levels=("iq4_nl",), head=True, embedding=True, tried=ALL_BITS, models_tried=None,
         needs="the file as --model: its weights, dequantized"),
    Rule("this toolkit", GGUF, head=True, embedding=True, tried=ALL_BITS, models_tried=None, needs="the file as --model: its weights, dequantized"),
)  # fmt: skip


def objections(runtime: str, kind: str, content: Content) -> list[str]:
    """Why a runtime does not take this content in this format; empty if it does."""
    if against := refusal(kind, content):
        return [against]
    by_rule = [list(rule.objections(content)) for rule in RULES if (rule.runtime, rule.format) == (runtime, kind)]
    return min(by_rule, key=len, default=[f"does not read {kind}"])


def _rule(runtime: str, kind: str, content: Content) -> Rule:
    """The rule by which a runtime takes this content."""
    return next(r for r in RULES if (r.runtime, r.format) == (runtime, kind) and not list(r.objections(content)))


RELAXED: dict[str, tuple[Any, str]] = {
    "reordered": (False, "without --act-order"),
    "outliers": (False, "without --outlier"),
    "online": ((), "without {online}"),
    "mixed": (False, "without --avg-bits"),
    "outside": ({}, "without --head-bits and --embedding-bits"),
    "act": (ActSpec(), "--abits 16"),
}


def nearest(runtime: str, kind: str, content: Content) -> str | None:
    """Flags of the choice closest to what is asked for that the runtime takes: format, then grid, then what the format
    holds besides, then bits.
    """
    spec = content.spec
    if spec is None:
        return None
    kinds = [kind, *(f for f in FORMATS if f not in (kind, DEQUANTIZED))]
    sizes = (spec.group_size, 128, 64, 32, -1)
    grids = [(False, group, spec.kind) for group in sizes if spec.has_minimum and spec.super_kind is None]
    grids += [(sym, group, "integer") for group in sizes for sym in (spec.symmetric, True)]
    for bits in dict.fromkeys((spec.bits, 4, 8)):
        for relax in (False, True):
            for sym, group, kind_of_grid in dict.fromkeys(grids):
                if bits == 1 and sym:
                    continue
                for other in kinds:
                    asked = replace(content, spec=QuantSpec(bits, group, sym, kind=kind_of_grid))
                    given_up = _given_up(runtime, other, asked) if relax else []
                    if (
                        uneven_groups(asked, other) is None
                        and given_up is not None
                        and (relax or not objections(runtime, other, asked))
                    ):
                        grid = (" --sym" if sym else "") + (" --grid integer" if kind_of_grid != spec.kind else "")
                        flags = f"--wbits {bits} --group-size {group}{grid} --format {other}"
                        return " ".join([flags, *given_up])
    return None


def _given_up(runtime: str, kind: str, content: Content) -> list[str] | None:
    """What of a content besides the grid has to go, in flags; None where that does not help."""
    taken = replace(content, **{name: value for name, (value, _) in RELAXED.items()})
    if objections(runtime, kind, taken):
        return None
    words = []
    for name, (_, flag) in RELAXED.items():
        with_it = replace(taken, **{name: getattr(content, name)})
        if objections(runtime, kind, with_it):
            words.append(flag.format(online=" and ".join(content.online)))
        else:
            taken = with_it
    return words


def _list(values: tuple[int, ...] | tuple[str, ...]) -> str:
    return ", ".join(map(str, values))


def loadability(kind: str, content: Content) -> list[tuple[str, bool, str, str]]:
    """Every runtime, whether it takes the content in this format, why not or what it needs, and how that is known."""
    rows = []
    for runtime in RUNTIMES:
        if against := objections(runtime, kind, content):
            rows.append((runtime, False, "; ".join(against), ""))
            continue
        rule = _rule(runtime, kind, content)
        ran = content.spec is None or content.spec.code_bits in rule.tried
        ran = ran and (rule.models_tried is None or content.model_type in ("", *rule.models_tried))
        ran = ran and (not content.outside or (runtime, kind) in HEADS_TRIED)
        head = HEAD_NEEDS.get((runtime, kind)) if content.outside else None
        of_model = MODELS_NEED.get((runtime, content.model_type)) if kind != GGUF else None  # converters need it
        needs = "; ".join(filter(None, (rule.needs, of_model, head)))
        rows.append((runtime, True, needs, "ran" if ran and rule.tried else "read in its source"))
    return rows
