"""Our checkpoints in transformers with compressed-tensors: the same perplexity and logits as in our evaluator."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from benchmarks import loaders
from benchmarks.loaders import Case, reference_logits, request
from quant.core.actquant import ActSpec
from quant.core.run import Session
from quant.core.types import QuantSpec
from quant.export.convert import convert
from quant.export.formats import Content
from quant.export.loadable import loadability, objections

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

    monkeypatch.setattr(loaders, "prepared", made)
    monkeypatch.setattr(loaders, "ours", lambda *given: (2.0, None, None))
    monkeypatch.setattr(loaders, "ask", lambda *given: "")
    monkeypatch.setattr(loaders, "compared", lambda *given: {"ours": 2.0, "theirs": 2.0, "logits": 0.0, "said": "same"})
    rows = loaders.of_family("python", family, cases, tmp_path)
    assert sorted(row["said"] for _, row in rows) == sorted(said)
    for _, row in rows:
        assert loaders.shown(row).startswith("- | - | - | ") == (row["said"] in ("refused", "REFUSED"))


def test_refusals_that_the_table_expects_are_those_of_the_rules():
    for family in loaders.FAMILIES:
        for case in loaders.EVERY_FAMILY:
            spec = QuantSpec(case.bits, case.group, case.symmetric)
            content = Content(spec, {"a": (128, 128)}, case.act, model_type=family)
            takes = not objections("transformers", case.format, content) or case.format == "gptq"
            assert takes != (case.kind in loaders.EXPECTED_REFUSED.get(family, ())), (family, case)
