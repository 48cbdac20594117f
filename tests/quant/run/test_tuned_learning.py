"""Tuning behind what main.py learns: the start is the solved answer, activations are quantized in every step, and what was
trained is what is deployed, evaluated and saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import main
from quant.blocks.fake_quant import ActSpec
from quant.blocks.weights import BlockWeights
from quant.learn.config import Rotation
from quant.run import tuning as stage
from quant.run.directory import RunDirectory
from quant.run.folding import targets_before
from quant.run.loop import read_block
from quant.run.session import open_session
from quant.tune.config import AUTOROUND_TUNING, Tuning, batch_of, split
from tests.helpers import CPU, asked, config_for, learned_config, perform

ACT = ActSpec(6, 6)
LEARNED = {
    "clips and scales": {"learning": asked(epochs=1, batch=2, abits=6)},
    "clips and scales, then a solver": {"learning": asked(epochs=1, batch=2, abits=6), "solver": "gptq"},
    "matrices behind norms": {
        "learner": "affinequant", "learning": asked("affinequant", abits=6, norm_matrix=True, matrix=True, epochs=1, batch=2),
    },
    "five levels": {"learner": "abq", "learning": asked("abq", abits=6, epochs=1, batch=2), "wbits": 2, "levels": 5},
    "kronecker pairs": {"learner": "flatquant", "learning": asked("flatquant", abits=6, epochs=1, batch=2)},
    "folded scales, then clips": {"learning": asked(epochs=1, batch=2, abits=6, let=False), "column_scales": True},
    "fixed ranges": {"learning": asked(epochs=1, batch=2, abits=6), "act": ActSpec(6, 6, "static")},
    "a rotation": {"learner": None, "learning": None, "rotation": Rotation()},
}  # fmt: skip


def config_of(case, model_dir, text, tmp_path, tuning, **more):
    given = {"act": ACT, "wbits": 3, "nsamples": 16, "limit": 4, "tuning": tuning} | LEARNED[case] | more
    return learned_config(model_dir("llama"), text, tmp_path, **given)


def files(path):
    return [load_file(file) for file in sorted((path / "blocks").iterdir())]


@pytest.mark.parametrize("case", LEARNED)
def test_the_start_is_what_was_solved_and_both_ways_to_it_agree(case, model_dir, text, tmp_path, monkeypatch):
    """Wild steps, of which none is kept: the codes are those without tuning, of a window and of the model alike; and the
    weights that positions start from are the same while a block is in memory and once it is on disk."""
    config = config_of(case, model_dir, text, tmp_path, Tuning("window", 1, rate=300.0, grid_rate=0.9, window=2))
    session, seen = open_session(config), {}

    class Watched(stage.TunedBlock):
        def __init__(self, model, index, weights, solved, spec, tuning, targets):
            seen[index] = (weights, dict(targets))
            super().__init__(model, index, weights, solved, spec, tuning, targets)

    monkeypatch.setattr(stage, "TunedBlock", Watched)
    session.quantize(config.run, config.output)
    in_memory, recipe = dict(seen), session.recipe(config.run)
    for index, (_, targets) in in_memory.items():
        weights = BlockWeights.read(session.model, index, CPU)
        again = targets_before(session.model, RunDirectory(tmp_path / "run"), index, weights, recipe)
        assert again.keys() == targets.keys() and all(torch.equal(again[n], targets[n]) for n in targets)
        assert bool(targets) == (config.run.learning is not None)
    plain = config.but(tuning=None, run_dir=tmp_path / "plain")
    whole = config.but(tuning=Tuning("model", 1, rate=300.0, grid_rate=0.9), run_dir=tmp_path / "whole")
    for one in (plain, whole):
        session.quantize(one.run, one.output)
    for one, other, third in zip(
        files(tmp_path / "run"), files(tmp_path / "plain"), files(tmp_path / "whole"), strict=True
    ):
        assert one.keys() == other.keys() == third.keys()
        assert all(torch.equal(one[k], other[k]) and torch.equal(third[k], other[k]) for k in one)
    for index, (weights, targets) in seen.items():  # of the whole model, from disk
        held, own = weights.named(), in_memory[index][0].named()
        assert held.keys() == own.keys() and all(torch.equal(held[name], own[name]) for name in held)
        assert all(torch.equal(targets[name], tensor) for name, tensor in in_memory[index][1].items())


@pytest.mark.parametrize("case", LEARNED)
def test_what_is_trained_with_quantized_activations_is_deployed_and_saved(case, model_dir, text, tmp_path):
    config = config_of(
        case,
        model_dir,
        text,
        tmp_path,
        Tuning("window", 6, rate=0.03, window=2, drop=0.0),
        save=tmp_path / "saved",
        format="bitplane",
    )
    session = open_session(config)
    results = session.run(config.run, config.output)
    target, model = RunDirectory(tmp_path / "run"), session.model
    logs = [summary.tuning for summary in target.finished_blocks()]
    stream, full = (session.calibration_stream(config.run) for _ in range(2))
    rows = stream.in_batches_of(batch_of(16), model.outside_weights(CPU)).rows
    held = torch.cat([torch.arange(16)[rows[batch]] for batch in split(len(rows), batch_of(16))[1]])
    for index in range(3):
        weights = BlockWeights.read(model, index, CPU)
        full.run(index, weights, advance=True)
        stream.run(index, read_block(model, target, index, weights), advance=True, act=config.run.act)
        if index > 0:  # the last of its window
            loss = (stream.hidden.data[held].double() - full.hidden.data[held].double()).square().mean()
            assert float(loss) == pytest.approx(logs[index]["held_out_end"], rel=1e-5)
            assert logs[index]["held_out_end"] <= logs[index]["held_out_start"]
    assert logs[0]["held_out_end"] < logs[0]["held_out_start"] or logs[2]["held_out_end"] < logs[2]["held_out_start"]
    again = config_for(tmp_path / "saved", text, tmp_path, wbits=16, limit=4, options={}, run_dir=tmp_path / "again")
    measured = perform(again)["perplexity"]["words"]["fp"]
    assert measured == pytest.approx(results["perplexity"]["words"]["quantized"], rel=1e-6)


def test_autoround_is_a_method_with_quantized_activations(model_dir, text, tmp_path):
    words = ["--model", str(model_dir("llama")), "--calib_dataset", str(text), "--nsamples", "16", "--seqlen", "32", "--limit", "4",
             "--eval_ppl", "--eval-datasets", str(text), "--wbits", "3", "--method", "autoround"]  # fmt: skip
    request = main.request_from([*words, "--abits", "6", "--tune-iterations", "6"])
    run = request.run
    assert (run.method, run.solver, run.learning, run.act.bits, run.act.kv_bits) == ("autoround", "rtn", None, 6, 6)
    assert run.tuning == replace(AUTOROUND_TUNING, iterations=6)
    request = request.but(run_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
    results = perform(request)
    assert results["method"] == "autoround" and results["abits"] == 6
    plain = perform(request.but(tuning=None, run_dir=tmp_path / "plain"))
    assert plain["method"] == "rtn" and plain["codes_sha256"] != results["codes_sha256"]
    other = main.request_from([*words, "--tune-iterations", "6"]).but(
        run_dir=tmp_path / "w", cache_dir=tmp_path / "cache"
    )
    assert other.run.act.bits == 16
    assert perform(other)["codes_sha256"] != results["codes_sha256"], "activations count in every step"
