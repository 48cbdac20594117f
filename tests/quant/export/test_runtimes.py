"""Who loads what, and which format is taken where none is named."""

from dataclasses import replace

import pytest

from quant.blocks.fake_quant import ActSpec
from quant.core.names import FORMATS, RUNTIMES
from quant.core.types import QuantSpec
from quant.export import first_holding
from quant.export.formats import Content, Layers
from quant.export.runtimes import loadability, nearest, objections

LAYERS = Layers(["layer"], ["lm_head"], "model.layers", 1)


PACKS = {
    "symmetric": (Content(QuantSpec(4, 32, True), {"a": (64, 64)}), "gptq"),
    "asymmetric": (Content(QuantSpec(4, 32), {"a": (64, 64)}), "gptq_v2"),
    "five bits": (Content(QuantSpec(5, 32, True), {"a": (64, 64)}), "compressed-tensors"),
    "odd shapes": (Content(QuantSpec(4), {"a": (64, 100)}), "compressed-tensors"),
    "outliers": (Content(QuantSpec(4), {"a": (64, 64)}, outliers=True), "bitplane"),
    "W4A4": (Content(QuantSpec(4), {"a": (64, 64)}, ActSpec(4, 4)), "bitplane"),
    "W8A8": (Content(QuantSpec(8, -1, True), {"a": (64, 64)}, ActSpec(8)), "compressed-tensors"),
}


def test_experts_of_a_mixture():
    """Transformers fuses them as it loads; vLLM's fused kernels take columns in order only."""
    content = Content(QuantSpec(4, 128, True), {"mlp.experts.0.up_proj": (256, 256)}, model_type="qwen3_moe")
    assert content.has_experts and not replace(content, shapes={"mlp.up_proj": (256, 256)}).has_experts
    assert objections("vllm", "gptq", content) == [] and objections("transformers", "dequantized", content) == []
    (against,) = objections("vllm", "gptq", replace(content, reordered=True))
    assert "experts with columns in order only" in against
    (against,) = objections("transformers", "gptq", content)
    assert against.startswith("fuses a mixture's experts")


@pytest.mark.parametrize("case", PACKS)
def test_real_quant_takes_the_first_format_that_holds_it(case):
    content, expected = PACKS[case]
    assert first_holding(content) == expected


def test_loadability_and_the_nearest_choice():
    content = Content(QuantSpec(3, 128), {"a": (256, 256)})
    assert {row[0] for row in loadability("gptq_v2", content)} == set(RUNTIMES)
    (against,) = objections("vllm", "gptq_v2", content)
    assert against == "does not read gptq_v2"
    assert "symmetric" in " ".join(objections("gptqmodel", "gptq", content))
    for runtime in RUNTIMES:
        for kind in FORMATS:
            near = nearest(runtime, kind, content)
            words = near.split()
            assert "without" not in words and "--abits" not in words, "nothing but the grid is in the way"
            flags = dict(zip(words, words[1:], strict=False))
            asked = replace(
                content, spec=QuantSpec(int(flags["--wbits"]), int(flags["--group-size"]), "--sym" in words)
            )
            assert objections(runtime, flags["--format"], asked) == []


NEAREST = {
    "order": ("vllm", "compressed-tensors", {"reordered": True}, "--format gptq"),
    "order, 3 bits": ("vllm", "compressed-tensors", {"reordered": True, "spec": QuantSpec(3, 128, True)},
                      "--wbits 3 --group-size 128 --sym --format compressed-tensors without --act-order"),
    "outliers": ("transformers", "gptq", {"outliers": True}, "--format gptq without --outlier"),
    "matrices": ("gptqmodel", "gptq", {"online": ("--use_ln_matrix",)}, "--format gptq without --use_ln_matrix"),
    "rotations": ("vllm", "gptq", {"online": ("--method flatquant", "--rotate qk")},
                  "--format gptq without --method flatquant and --rotate qk"),
    "widths": ("vllm", "gptq", {"mixed": True}, "--wbits 4 --group-size 128 --sym --format gptq without --avg-bits"),
    "minima": ("vllm", "gptq", {"spec": QuantSpec(4, 128, kind="real")},
               "--wbits 4 --group-size 128 --grid integer --format compressed-tensors"),
    "minima, ours": ("this toolkit", "gptq", {"spec": QuantSpec(4, 128, kind="real")},
                     "--wbits 4 --group-size 128 --format bitplane"),
    "activations": ("vllm", "gptq", {"act": ActSpec(4)}, "--format gptq --abits 16"),
    "several": ("vllm", "gptq", {"act": ActSpec(4), "outliers": True}, "--format gptq without --outlier --abits 16"),
    "W8A8": ("vllm", "compressed-tensors", {"act": ActSpec(8), "spec": QuantSpec(8)},
             "--wbits 8 --group-size -1 --sym --format compressed-tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAREST)
def test_the_nearest_choice_says_what_has_to_go(case):
    runtime, kind, changes, expected = NEAREST[case]
    content = replace(Content(QuantSpec(4, 128, True), {"a": (256, 256)}), **changes)
    assert objections(runtime, kind, content)
    near = nearest(runtime, kind, content)
    assert near is not None and near.endswith(expected)


def test_rules_of_vllm():
    """Asymmetric compressed-tensors of 4 and 8 bits load; W8A8 has not the shapes of Marlin's kernels."""
    asymmetric = Content(QuantSpec(4, 128), {"a": (256, 256)})
    assert objections("vllm", "compressed-tensors", asymmetric) == []
    integers = Content(QuantSpec(8, -1, True), {"a": (48, 96)}, ActSpec(8))
    assert objections("vllm", "compressed-tensors", integers) == []
    assert objections("vllm", "compressed-tensors", replace(integers, act=ActSpec()))
    known = {row[0]: row[3] for row in loadability("compressed-tensors", asymmetric)}
    assert known["vllm"] == "read in its source" and known["transformers"] == "ran" and known["auto-gptq"] == ""


@pytest.mark.parametrize(
    ("runtime", "kind", "model_type", "known", "needs"),
    [
        ("transformers", "gptq", "llama", "ran", "optimum and gptqmodel"),
        ("transformers", "gptq", "qwen2", "read in its source", "optimum and gptqmodel"),
        ("transformers", "dequantized", "qwen2", "ran", ""),
        ("transformers", "dequantized", "gemma2", "ran", 'attn_implementation="eager" in transformers 4'),
        ("gptqmodel", "gptq", "qwen3", "read in its source", ""),
        ("llama.cpp", "gptq", "gemma2", "read in its source", "tokenizer.model beside the weights"),
        ("llama.cpp", "gptq", "llama", "read in its source", ""),
        ("llama.cpp", "gguf", "gemma2", "ran", ""),
        ("mlx-lm", "mlx", "qwen3", "ran", ""),
        ("this toolkit", "gptq", "gemma2", "ran", ""),
    ],
)
def test_what_was_run_was_run_for_that_family(runtime, kind, model_type, known, needs):
    content = Content(QuantSpec(4, 32, True), {"a": (256, 256)}, model_type=model_type)
    ((_, takes, words, how),) = [row for row in loadability(kind, content) if row[0] == runtime]
    assert takes and how == known and (words.startswith(needs) if needs else words == "")


# FORMATS §3 (who accepts what) row by row, as (runtime, format, what of W4 sym g128 256x256 llama is otherwise, accepted).
V1, V2, CT, PLAIN = "gptq", "gptq_v2", "compressed-tensors", "dequantized"


def bits(n, symmetric=True, group=128):
    return {"spec": QuantSpec(n, group, symmetric)}


def dims(n_out, n_in, **more):
    return {"shapes": {"a": (n_out, n_in)}, **more}


def of(model_type):
    return {"model_type": model_type}


ACCEPTED = [
    # AutoGPTQ 0.7.1, torch: 2, 3, 4, 8 bits, both, any group, outputs in 32s; a closed list of models; no v2; act-order
    # and layers that are left alone are not for it
    *(("auto-gptq", V1, bits(n, sym, group), True) for n in (2, 3, 4, 8) for sym in (True, False) for group in (-1, 48, 128)
      if 256 % group == 0 or group == -1),
    ("auto-gptq", V2, {}, False), ("auto-gptq", V1, bits(5), False), ("auto-gptq", V1, {"reordered": True}, False),
    ("auto-gptq", V1, {"whole": False}, False), ("auto-gptq", CT, {}, False),
    *(("auto-gptq", V1, of(name), True) for name in ("opt", "bloom", "falcon", "llama", "mistral", "qwen2", "gpt_neox", "gpt2", "")),
    *(("auto-gptq", V1, of(name), False) for name in ("qwen3", "gemma2", "gemma3_text", "phi3")),
    # GPTQModel 7: groups of a list, or of as many columns as the inputs have; asymmetric v1 is refused
    *(("gptqmodel", V2, bits(n, sym), True) for n in (2, 3, 4, 8) for sym in (True, False)),
    *(("gptqmodel", kind, bits(4, True, group), True) for kind in (V1, V2) for group in (-1, 16, 32, 64, 128, 256)),
    ("gptqmodel", V2, dims(96, 96, **bits(4, True, 96)), True), ("gptqmodel", V2, bits(4, True, 8), False),
    ("gptqmodel", V2, {"shapes": {"a": (96, 96), "b": (96, 192)}, **bits(4, True, 96)}, False),
    ("gptqmodel", V1, bits(4, False), False), ("gptqmodel", V1, {"whole": False}, True), ("gptqmodel", CT, {}, False),
    # transformers with optimum: both versions, both symmetries; Falcon's own linear class is not replaced
    *(("transformers", kind, bits(n, sym), True) for kind in (V1, V2) for n in (2, 3, 4, 8) for sym in (True, False)),
    ("transformers", V1, dims(96, 96, **bits(4, True, 96)), True), ("transformers", V1, bits(4, True, 8), False),
    ("transformers", V1, of("falcon"), False), ("transformers", CT, bits(5), True), ("transformers", CT, bits(1, False), True),
    # vLLM after PR 38288: as Marlin, 4 and 8 bits, symmetric, v1
    *(("vllm", V1, bits(n, True, group), True) for n in (4, 8) for group in (-1, 32, 64, 128)),
    ("vllm", V1, bits(3), False), ("vllm", V1, bits(2), False), ("vllm", V1, bits(4, False), False), ("vllm", V2, {}, False),
    ("vllm", V1, bits(4, True, 16), False), ("vllm", V1, dims(96, 256), False), ("vllm", V1, dims(64, 192, **bits(4, True, 64)), False),
    ("vllm", CT, bits(3), True), ("vllm", CT, bits(4, False), True), ("vllm", CT, bits(3, False), True),
    ("vllm", CT, {"act": ActSpec(8), **bits(8, True, -1)}, True), ("vllm", CT, {"act": ActSpec(8), **bits(8, False, -1)}, False),
    # llama.cpp's converter: 2, 4, 8 bits, both, any group, both versions; 3 bits are not implemented; compressed-tensors in
    # groups of any size only; it has no OPT
    *(("llama.cpp", kind, bits(n, sym, group), True) for kind in (V1, V2) for n in (2, 4, 8) for sym in (True, False)
      for group in (-1, 8, 128)),
    ("llama.cpp", V1, bits(3), False), ("llama.cpp", V2, bits(3, False), False),
    ("llama.cpp", CT, bits(4, True, 8), True), ("llama.cpp", CT, bits(4, True, 512), True), ("llama.cpp", CT, bits(4, True, -1), False),
    ("llama.cpp", CT, bits(3), False),
    *(("llama.cpp", kind, of(name), False) for kind in (V1, V2, CT, PLAIN) for name in ("opt", "ministral")),
    *(("llama.cpp", kind, of(name), True) for kind in (V1, PLAIN) for name in ("llama", "qwen3", "gemma2", "bloom", "gemma3_text", "phi3")),
    ("llama.cpp", PLAIN, of("gpt2"), True), ("llama.cpp", V1, of("gpt2"), False), ("llama.cpp", CT, of("gpt2"), False),
    ("transformers", CT, of("gpt2"), False), ("this toolkit", V1, of("gpt2"), True), ("vllm", PLAIN, of("opt"), True), ("transformers", PLAIN, {"act": ActSpec(8)}, False),
]  # fmt: skip


@pytest.mark.parametrize("row", ACCEPTED, ids=str)
def test_every_row_of_who_accepts_what(row):
    runtime, kind, changes, accepted = row
    content = Content(
        **({"spec": QuantSpec(4, 128, True), "shapes": {"a": (512, 512)}, "model_type": "llama"} | changes)
    )
    against = objections(runtime, kind, content)
    assert (against == []) == accepted, against
