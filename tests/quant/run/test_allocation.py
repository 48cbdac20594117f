"""Mixed bits: within the average, ties kept, better than a uniform width by what was measured, and the same when resumed."""

from __future__ import annotations

import json

import pytest
import torch

import model_quantizer
from data.demo import text as stories
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.report.plots import bits_plot
from quant.report.runs import open_run
from quant.run.content import candidate_widths, expected_bits
from quant.run.directory import PLAN, RunDirectory
from quant.run.session import open_session
from quant.tune.config import Tuning
from tests.helpers import CPU, DEMO, called, config_for, perform


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "stories.txt"
    path.write_text(stories("test")[:60_000])
    return path


def mixed(demo_text, tmp_path, **options):
    """A small run of the demo model with mixed bits."""
    small = {"nsamples": 16, "limit": 8, "wbits": 2, "avg_bits": 2.75, "solver": "rtn", "options": {}}
    return config_for(DEMO / "llama", demo_text, tmp_path, **(small | options))


def plan_of(path):
    return json.loads((path / PLAN).read_text())


def test_widths_keep_to_the_average_and_to_the_ties(demo_text, tmp_path):
    config = mixed(demo_text, tmp_path)
    results = perform(config)
    plan, directory = plan_of(tmp_path / "run"), RunDirectory(tmp_path / "run")
    assert plan["candidates"] == [2, 3, 4]
    assert results["bits_per_weight"] == pytest.approx(plan["bits_per_weight"], abs=1e-12)
    assert 2.6 < results["bits_per_weight"] <= 2.75
    assert results["avg_bits"] == 2.75
    assert 2 < results["entropy_bits"] < results["bits_per_weight"]
    for index, own in enumerate(plan["bits"]):
        assert own["self_attn.q_proj"] == own["self_attn.k_proj"] == own["self_attn.v_proj"]
        assert own["mlp.gate_proj"] == own["mlp.up_proj"]
        solved = directory.read_weights(index)
        assert {name: answer.spec.bits for name, answer in solved.items()} == own
        assert {r.name: r.bits for r in directory.read_summary(index).records} == own
    assert len({bits for own in plan["bits"] for bits in own.values()}) > 1
    by_width = [sum(own[name][k] for own in plan["costs"] for name in own) for k in range(3)]
    assert by_width[0] > by_width[1] > by_width[2], "a wider grid costs less"
    assert plan["cost"] < by_width[0]
    svg, png = bits_plot(open_run(tmp_path / "run"))
    assert "3 bits" in svg and png[:4] == b"\x89PNG"
    again = config.but(run_dir=tmp_path / "again")
    perform(again)
    assert plan_of(tmp_path / "again") == plan


def test_at_equal_size_the_plan_costs_no_more_than_a_uniform_width(demo_text, tmp_path):
    session = open_session(mixed(demo_text, tmp_path))
    shapes = session.model.linear_shapes()
    weights = sum(out * n_in for out, n_in in shapes.values())
    config = mixed(demo_text, tmp_path)
    equal = config.but(avg_bits=expected_bits(config.run, shapes, 3) / weights)
    perform(equal)
    plan = plan_of(tmp_path / "run")
    assert plan["candidates"] == [2, 3, 4, 5]
    assert plan["cost"] <= sum(own[name][1] for own in plan["costs"] for name in own)


CASES = {
    "folded": {"column_scales": True, "true_sequential": True},
    "tuned": {"tuning": Tuning("model", 2), "solver": "quantease", "options": {"num_iter": 3}},
    "tuned block": {"tuning": Tuning("block", 2)},
    "outliers": {"solver": "quantease", "options": {"num_iter": 3, "outlier": 0.01}, "avg_bits": 3.2, "num_layers": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_with_its_plan_and_is_saved_as_it_was_measured(case, demo_text, tmp_path, monkeypatch):
    config = mixed(demo_text, tmp_path, save=tmp_path / "saved", format="bitplane", **CASES[case])
    results = perform(config)
    other = config.but(run_dir=tmp_path / "killed", save=None, format="dequantized")
    usual = RunDirectory.write_block

    def write(self, index, *given, **more):
        if index == 1:
            raise KeyboardInterrupt
        return usual(self, index, *given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDirectory, "write_block", write)
        open_session(other).quantize(other.run, other.output)
    made = (tmp_path / "killed" / PLAN).stat().st_mtime_ns
    assert perform(other)["codes_sha256"] == results["codes_sha256"]
    assert (tmp_path / "killed" / PLAN).stat().st_mtime_ns == made
    stored = config.but(model=str(tmp_path / "saved"), wbits=16, avg_bits=None, tuning=None, column_scales=False,
                        save=None, format="dequantized", run_dir=tmp_path / "again")  # fmt: skip
    measured = perform(stored)
    assert measured["perplexity"]["stories"]["fp"] == pytest.approx(
        results["perplexity"]["stories"]["quantized"], rel=1e-6
    )
    assert measured["bits_per_weight"] == pytest.approx(results["bits_per_weight"], rel=1e-9)


def test_costs_are_of_the_block_as_it_was_whatever_was_folded(demo_text, tmp_path):
    """At 8 bits and folded: the errors that the backward pass sees are those of the folded codes, taken back."""
    from quant.learn.column_scales import unfold
    from quant.run.folding import fold_block

    session = open_session(mixed(demo_text, tmp_path))
    stream = session.calibration_stream(mixed(demo_text, tmp_path).run, tmp_path)
    weights = BlockWeights.read(session.model, 0, CPU)
    folded = fold_block(stream, 0, weights)
    back = unfold(session.model, folded.weights, folded.parameters)
    for name in session.model.linear_shapes():
        assert not torch.allclose(folded.weights.weight(name), weights.weight(name), rtol=1e-3)
        torch.testing.assert_close(back.weight(name), weights.weight(name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("average", "widths"),
    [(2.2, (2, 3, 4)), (3.2, (2, 3, 4, 5)), (4.05, (2, 3, 4, 5)), (8.15, (6, 7, 8)), (8.1875, (7, 8))],
)
def test_candidates_are_around_the_average(average, widths, demo_text, tmp_path):
    shapes = {"a": (64, 128), "b": (32, 128)}  # 18 bits a row of 128 at 2 bits: 2.14; 19 at 3: 3.15; 20 at 4: 4.16
    assert candidate_widths(mixed(demo_text, tmp_path, avg_bits=average).run, shapes) == widths


@pytest.mark.parametrize("average", [2.01, 9.0])
def test_an_average_out_of_reach_is_refused_with_the_range(average, demo_text, tmp_path):
    with pytest.raises(
        InputError, match=r"--avg-bits .*: with scales and zero points, linears of 2 to 8 bits take 2\.\d+ to 8\.\d+"
    ):
        perform(mixed(demo_text, tmp_path, avg_bits=average))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "compressed-tensors"])
def test_formats_of_one_width_are_refused_before_work(kind, demo_text, tmp_path):
    config = mixed(demo_text, tmp_path, save=tmp_path / "saved", format=kind, group_size=32)
    with pytest.raises(InputError, match=rf"{kind} holds one number of bits.*bitplane or dequantized"):
        perform(config.but(avg_bits=3.5))
    assert not (tmp_path / "run").exists()


def test_a_damaged_plan_is_refused(demo_text, tmp_path):
    config = mixed(demo_text, tmp_path)
    session = open_session(config)
    session.quantize(config.run, config.output)
    for file in (tmp_path / "run" / "blocks").iterdir():
        file.unlink()
    for wrong in (
        {"bits": []},
        {"bits": [{"x": 2}] * 4},
        {"bits": [dict.fromkeys(session.model.linear_shapes(), 9)] * 4},
    ):
        (tmp_path / "run" / PLAN).write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"bits\.json is damaged; --overwrite"):
            session.quantize(config.run, config.output)
    anew = config.but(overwrite=True)
    session.quantize(anew.run, anew.output)
    assert len(plan_of(tmp_path / "run")["bits"]) == 4


def test_the_command_line(small, tmp_path, monkeypatch, capsys):
    words = [*small, "--dataset", small[3], "--quantization-method", "rtn"]
    code, out, _ = called(model_quantizer, monkeypatch, capsys, *words, "--avg-bits", 3.9, "--dry-run")
    assert code == 0 and "w3.9" in out and "3.900" in out
    code, _, err = called(model_quantizer, monkeypatch, capsys, *words, "--avg-bits", 3.9, "--wbits", 3)
    assert code == 2 and "drop --wbits 3" in err
    code, _, err = called(model_quantizer, monkeypatch, capsys, *words, "--avg-bits", "nan")
    assert code == 2 and "--avg-bits nan" in err
    code, _, err = called(model_quantizer, monkeypatch, capsys, *words, "--avg-bits", 2.1)
    assert code == 2 and "use a number between them" in err
    code, out, _ = called(model_quantizer, monkeypatch, capsys, *words, "--avg-bits", 3.9)
    assert code == 0 and "3.9 bits on average" in out
    assert "Bits of every linear" in (tmp_path / "run" / "report.html").read_text()
