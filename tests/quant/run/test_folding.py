"""Column scales in a run: kept with the block, resumed with the same bits, learned and tuned on, saved, and useful."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from data.demo import text as stories
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.learn.column_scales import KEY
from quant.run import loop
from quant.run.directory import RunDirectory
from quant.run.folding import folded_before
from quant.run.session import open_session
from quant.tune.config import Tuning
from tests.helpers import CPU, DEMO, asked, config_for, in_float32, learned_config, perform


class Killed(BaseException):
    """What a kill is here: nothing catches it."""


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "stories.txt"
    path.write_text(stories("test")[:60_000])
    return path


def blocks_of(path):
    return [load_file(file) for file in sorted((path / "blocks").iterdir())]


def same(one, two):
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, two, strict=True)
    )


def killed_at(block, config, monkeypatch):
    """Quantize and be killed right before that block is written."""
    usual = RunDirectory.write_block

    def write(self, index, *given, **more):
        if index == block:
            raise Killed
        return usual(self, index, *given, **more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDirectory, "write_block", write)
        open_session(config).quantize(config.run, config.output)


CASES = {
    "sequential": {"true_sequential": True},
    "outliers": {"options": {"num_iter": 3, "outlier": 0.02}},
    "tuned block": {"tuning": Tuning("block", 3)},
    "tuned model": {"tuning": Tuning("model", 3, norms=True)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_ends_with_the_same_bits_and_what_it_saves_is_what_it_measured(
    case, demo_text, tmp_path, monkeypatch
):
    options = {"column_scales": True, "nsamples": 16, "limit": 8, **CASES[case]}
    config = config_for(DEMO / "llama", demo_text, tmp_path, save=tmp_path / "saved", **options)
    results = perform(config)
    other = config.but(run_dir=tmp_path / "killed", save=None)
    killed_at(2, other, monkeypatch)
    assert perform(other)["codes_sha256"] == results["codes_sha256"]
    blocks = blocks_of(tmp_path / "run")
    assert same(blocks, blocks_of(tmp_path / "killed"))
    assert {"changed/input_layernorm.weight", f"learned/{KEY}mul.mlp.up_proj"} <= blocks[1].keys()
    again = config.but(model=str(tmp_path / "saved"), wbits=16, tuning=None, column_scales=False, save=None,
                       run_dir=tmp_path / "again")  # fmt: skip
    measured = perform(again)["perplexity"]["stories"]["fp"]
    assert measured == pytest.approx(results["perplexity"]["stories"]["quantized"], rel=1e-6)


def test_learning_goes_on_from_the_folded_block(model_dir, text, tmp_path, monkeypatch):
    config = learned_config(model_dir("opt"), text, tmp_path, column_scales=True, learning=asked(epochs=2, batch=2))
    results = perform(config)
    other = config.but(run_dir=tmp_path / "killed")
    killed_at(2, other, monkeypatch)
    assert perform(other)["codes_sha256"] == results["codes_sha256"]
    plain = perform(config.but(column_scales=False, run_dir=tmp_path / "plain"))
    assert plain["codes_sha256"] != results["codes_sha256"]
    for log in results["learning"]:
        assert log["loss_end"] <= log["loss_start"]
    kept = RunDirectory(tmp_path / "run").read_learned(0)
    assert {k.split(".")[0] for k in kept} >= {"columns", "norm", "clip"}


@pytest.mark.parametrize("name", ["opt post-norm, projected", "falcon 7b", "gemma2"])
def test_families_without_some_seams(name, model_dir, text, tmp_path):
    results = perform(config_for(model_dir(name), text, tmp_path, column_scales=True, wbits=8))
    measured = results["perplexity"]["words"]
    assert measured["quantized"] == pytest.approx(measured["fp"], rel=0.02)


def test_the_weights_that_a_block_was_solved_from_are_read_again(demo_text, tmp_path, monkeypatch):
    config = config_for(DEMO / "llama", demo_text, tmp_path, column_scales=True, num_layers=2)
    seen = {}
    usual = loop.fold_block

    def watched(stream, index, weights):
        seen[index] = usual(stream, index, weights)
        return seen[index]

    monkeypatch.setattr(loop, "fold_block", watched)
    session = open_session(config)
    session.quantize(config.run, config.output)
    target = RunDirectory(config.output.run_dir)
    for index, folded in seen.items():
        again = folded_before(session.model, target, index, BlockWeights.read(session.model, index, CPU))
        assert same([again.parameters], [folded.weights.parameters])


def test_planted_outliers_are_folded_away(demo_text, tmp_path):
    """The demo models have planted channels of norms. Measured at 2 bits: see the assertion."""
    planted = in_float32("llama", tmp_path / "planted")
    scores = {}
    for fold in (False, True):
        config = config_for(planted, demo_text, tmp_path, column_scales=fold, wbits=2, nsamples=32, limit=16,
                            run_dir=tmp_path / f"run-{fold}")  # fmt: skip
        scores[fold] = perform(config)["perplexity"]["stories"]["quantized"]
    assert scores[True] < 0.97 * scores[False], scores


def test_another_configuration_has_another_name(demo_text, tmp_path):
    config = config_for(DEMO / "llama", demo_text, tmp_path, run_dir=None)
    session, folded = open_session(config), config.but(column_scales=True)
    assert session.run_path(config.run, config.output) != session.run_path(folded.run, folded.output)
    assert "column_scales" not in session.configuration(config.run)


def test_what_was_learned_on_other_columns_is_refused(model_dir, text, tmp_path):
    config = learned_config(model_dir("opt"), text, tmp_path, column_scales=True)
    perform(config)
    other = config.but(column_scales=False, resume=tmp_path / "run", run_dir=tmp_path / "other")
    with pytest.raises(InputError, match=r"column_scales: True, here False"):
        perform(other)
