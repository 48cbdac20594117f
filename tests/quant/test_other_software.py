"""Our checkpoints in transformers with compressed-tensors, and checkpoints in the layout of llm-compressor in our
evaluator: the same perplexity and logits."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from benchmarks import loaders
from benchmarks.loaders import Case, reference_logits, request
from quant.blocks.fake_quant import ActSpec
from quant.core.types import QuantSpec
from quant.export.formats import Content
from quant.export.runtimes import loadability, objections
from quant.run.convert import convert
from quant.run.session import Session
from tests.quant.test_export import demo_config, perplexity

DEMO = Path(__file__).parents[2] / "models/demo"
CT = "compressed-tensors"
W8A8 = {"bits": 8, "symmetric": True, "group": -1}
# Relative distance of the logits. SAME: measured 0. DEQUANTIZED: transformers rounds scales, measured 1.3e-4.
# ASYMMETRIC_INPUTS: their range always includes zero and their sums differ, measured 2.7e-3.
SAME, DEQUANTIZED, ASYMMETRIC_INPUTS = 1e-6, 5e-4, 1e-2
CASES = {
    "W4": ("llama", Case(4, True, CT, "transformers")),
    "W4, asymmetric": ("llama", Case(4, False, CT, "transformers")),
    "W3": ("opt", Case(3, True, CT, "transformers")),
    "W3, asymmetric": ("bloom", Case(3, False, CT, "transformers")),
    "W3, Falcon": ("falcon", Case(3, True, CT, "transformers")),
    "W8A8": ("mistral", Case(format=CT, how="transformers", act=ActSpec(8, symmetric=True), **W8A8)),
    "W8A8, asymmetric inputs": ("llama", Case(format=CT, how="transformers", act=ActSpec(8), **W8A8)),
}


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_we_compute(name, tmp_path):
    """From a model in float32: in float16 the two sides round weights differently, and inputs on the edge between two
    levels of their grid turn that into a step (relative distance of the logits then 2e-2 with W8A8).
    """
    family, case = CASES[name]
    whole = AutoModelForCausalLM.from_pretrained(DEMO / family, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "whole")
    for file in DEMO.joinpath(family).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "whole")
    config = request(tmp_path / "whole", tmp_path / "run", case)
    Session(config).run(config)
    content = convert(tmp_path / "run", CT, tmp_path / "checkpoint")
    (needs,) = (row[2] for row in loadability(CT, content) if row[0] == "transformers")
    evaluation = request(tmp_path / "checkpoint", tmp_path / "eval", None, windows=4)
    session = Session(evaluation)
    perplexity = session.run(evaluation)["perplexity"]["demo"]["fp"]
    ids = session.evaluation["demo"].ids
    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "dequantize" in needs else {}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32, **more)
    with torch.inference_mode():
        logits = theirs(ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    ours = reference_logits(session, ids)
    distance = float((logits - ours).norm() / ours.norm())
    bound = ASYMMETRIC_INPUTS if case.act.active and not case.act.symmetric else DEQUANTIZED if more else SAME
    assert distance < bound, distance
    assert float(losses.double().mean().exp()) == pytest.approx(perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "refused", "said"),
    [
        ("opt", {"W8A8"}, ["same", "refused"]),
        ("opt", set(), ["same", "NOT REFUSED"]),
        ("llama", {"W4"}, ["same", "REFUSED"]),
        ("llama", set(), ["same", "same"]),
    ],
)
def test_refused_checkpoints_are_rows_of_the_table(family, refused, said, monkeypatch, tmp_path):
    """By our rules, in the table of benchmarks/loaders.py: expected, missing, unexpected, none."""
    cases = [Case(4, True, CT, "transformers"), Case(format=CT, how="transformers", act=ActSpec(8), **W8A8)]

    def made(family, case, base):
        return replace(case, how=loaders.REFUSED if case.kind in refused else case.how), base / case.name

    monkeypatch.setattr(loaders, "prepare", made)
    monkeypatch.setattr(loaders, "ours", lambda *given: (2.0, None, None))
    monkeypatch.setattr(loaders, "ask", lambda *given: "")
    monkeypatch.setattr(loaders, "compare", lambda *given: {"ours": 2.0, "theirs": 2.0, "logits": 0.0, "said": "same"})
    rows = loaders.of_family("python", family, cases, tmp_path)
    assert sorted(row["said"] for _, row in rows) == sorted(said)
    for _, row in rows:
        assert loaders.cells(row).startswith("- | - | - | ") == (row["said"] in ("refused", "REFUSED"))


def test_refusals_that_the_table_expects_are_those_of_the_rules():
    for family in loaders.FAMILIES:
        for case in loaders.EVERY_FAMILY:
            spec = QuantSpec(case.bits, case.group, case.symmetric)
            content = Content(spec, {"a": (128, 128)}, case.act, model_type=family)
            takes = not objections("transformers", case.format, content) or case.format == "gptq"
            assert takes != (case.kind in loaders.EXPECTED_REFUSED.get(family, ())), (family, case)


def foreign_words(codes, bits):
    """Codes [rows, n] in int32 words along the row, first code lowest, by numpy: dense, for widths that divide a word."""
    per = 32 // bits
    padded = np.pad(codes.numpy().astype(np.uint64), ((0, 0), (0, -codes.shape[1] % per)))
    shifts = (np.arange(per) * bits).astype(np.uint64)
    words = (padded.reshape(len(padded), -1, per) << shifts).sum(-1).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32))


def foreign_args(bits, symmetric, group):
    """Weight settings with every entry that llm-compressor writes."""
    return {"actorder": None, "block_structure": None, "dynamic": False, "group_size": group, "num_bits": bits,
            "observer": "memoryless_minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "group" if group else "channel",
            "symmetric": symmetric, "type": "int", "zp_dtype": None if symmetric else "torch.int8"}  # fmt: skip


def foreign_checkpoint(path, reference, groups, ignore):
    """A checkpoint of the demo model in llm-compressor's layout, and beside it what it stands for in float32.

    groups: (targets, bits, symmetric, group) in order; the first whose pattern fits a linear counts.
    """
    for target in (path, reference):
        shutil.copytree(DEMO / "llama", target, ignore=shutil.ignore_patterns("model.safetensors"))
    packed, plain = {}, {}
    for name, tensor in load_file(DEMO / "llama" / "model.safetensors").items():
        linear = name.removesuffix(".weight")
        wanted = [
            g for g in groups if any(re.match(t[3:], linear) if t.startswith("re:") else t == "Linear" for t in g[0])
        ]
        if ".layers." not in name or tensor.dim() != 2 or linear in ignore:
            packed[name], plain[name] = tensor, tensor.float()
            continue
        _, bits, symmetric, group = wanted[0]
        n_out, n_in = tensor.shape
        w = tensor.float().view(n_out, -1, group or n_in)
        top = 2 ** (bits - 1) - 1
        if symmetric:
            scale, zero = (w.abs().amax(-1) / (top + 0.5)).clamp(min=1e-4), torch.zeros(w.shape[:2])
        else:
            low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
            scale = ((high - low) / (2**bits - 1)).clamp(min=1e-4)
            zero = (-top - 1 - low / scale).round().clamp(-top - 1, top)
        scale = scale.half().float()
        codes = ((w / scale[..., None]).round() + zero[..., None]).clamp(-top - 1, top)
        plain[name] = ((codes - zero[..., None]) * scale[..., None]).view(n_out, n_in)
        packed[f"{linear}.weight_packed"] = foreign_words(codes.view(n_out, n_in).long() + top + 1, bits)
        packed[f"{linear}.weight_scale"] = scale.to(tensor.dtype)
        packed[f"{linear}.weight_shape"] = torch.tensor([n_out, n_in])
        if not symmetric:
            packed[f"{linear}.weight_zero_point"] = foreign_words(zero.long().T + top + 1, bits).T.contiguous()
    save_file(packed, path / "model.safetensors", {"format": "pt"})
    save_file(plain, reference / "model.safetensors", {"format": "pt"})
    config = json.loads((DEMO / "llama" / "config.json").read_text())
    (reference / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    settings = {
        "config_groups": {
            f"group_{i}": {"format": "pack-quantized", "input_activations": None, "output_activations": None,
                           "targets": targets, "weights": foreign_args(bits, symmetric, group)}
            for i, (targets, bits, symmetric, group) in enumerate(groups)
        },
        "format": "pack-quantized", "global_compression_ratio": None, "ignore": ["lm_head", *ignore], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.12.2",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (path / "recipe.yaml").write_text("default_stage: {}\n")


FOREIGN = {
    "W4A16": ([(["Linear"], 4, True, 32)], []),
    "W4A16 asymmetric": ([(["Linear"], 4, False, 64)], []),
    "W8A16 by rows": ([(["Linear"], 8, True, None)], []),
    "mixed": ([(["re:.*down_proj$"], 8, False, None), (["re:.*(q|k|v|o|gate|up)_proj$"], 4, True, 32)],
              ["model.layers.3.mlp.up_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_checkpoints_in_the_layout_of_llm_compressor_are_read(case, tmp_path):
    """Written by hand, without any of our writer: evaluated written out and packed as the weights it stands for."""
    groups, ignore = FOREIGN[case]
    foreign_checkpoint(tmp_path / "foreign", tmp_path / "plain", groups, ignore)
    expected = perplexity(tmp_path / "plain", tmp_path)[0]
    assert perplexity(tmp_path / "foreign", tmp_path)[0] == expected
    config = replace(demo_config(tmp_path, tmp_path / "foreign"), wbits=16, packed=True, run_dir=tmp_path / "packed")
    assert Session(config).run(config)["perplexity"]["text"]["fp"] == pytest.approx(expected, rel=1e-5)
    if case != "mixed":
        convert(tmp_path / "foreign", "bitplane", tmp_path / "planes")
        assert perplexity(tmp_path / "planes", tmp_path)[0] == expected
