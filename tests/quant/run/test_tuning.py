"""Tuning in a run: it never loses on held-out windows, what is trained is deployed, and a kill changes no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.demo import text as stories
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.run import kept
from quant.run import tuning as stage
from quant.run.directory import TUNING, RunDirectory
from quant.run.loop import read_block
from quant.run.request import Request
from quant.run.session import open_session
from quant.run.stored import Allowed
from quant.tune import limits
from quant.tune.config import AUTOROUND_TUNING, Tuning, batch_of, split
from quant.tune.objectives import divergence
from tests.helpers import CPU, DEMO, config_for, long, perform, whole_model_logits

STEPS = 10


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "stories.txt"
    path.write_text(stories("test")[:60_000])
    return path


def tuned(demo_text, tmp_path, scope="model", **options):
    """A small run of the demo model that tunes."""
    small = {"nsamples": 32, "wbits": 2, "solver": "rtn", "options": {}, "limit": 8,
             "tuning": Tuning(scope, STEPS, rate=0.05)}  # fmt: skip
    return config_for(DEMO / "llama", demo_text, tmp_path, **(small | options))


@pytest.fixture(scope="module")
def whole(demo_text, tmp_path_factory):
    """A run of `tuned` that nothing interrupted."""
    config = tuned(demo_text, tmp_path_factory.mktemp("whole"))
    return config.output.run_dir, perform(config)


def quantize(request):
    """Solve and tune, and nothing else."""
    open_session(request).quantize(request.run, request.output)


def blocks_of(path):
    return [load_file(file) for file in sorted((path / "blocks").iterdir())]


def same(one, two):
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, two, strict=True)
    )


def summaries(path):
    return RunDirectory(path).finished_blocks()


@pytest.mark.parametrize(("scope", "kind"), [("block", "integer"), ("model", "integer"), ("model", "real")])
def test_tuning_helps_on_windows_that_it_did_not_see(scope, kind, demo_text, tmp_path):
    config = tuned(demo_text, tmp_path, scope, grid_kind=kind)
    plain = config.but(tuning=None, run_dir=tmp_path / "plain")
    session = open_session(config)
    results, before = session.run(config.run, config.output), session.run(plain.run, plain.output)
    assert results["perplexity"]["stories"]["quantized"] < before["perplexity"]["stories"]["quantized"]
    assert results["bits_per_weight"] == before["bits_per_weight"]
    assert not same(blocks_of(tmp_path / "run"), blocks_of(tmp_path / "plain"))
    logs = [summary.tuning for summary in summaries(tmp_path / "run")]
    assert all(log["held_out_end"] < log["held_out_start"] for log in logs)
    assert all(log["held_out_end"] == min(log["losses"]) for log in logs)
    assert not (tmp_path / "run" / TUNING).exists()
    moved = [record.info["codes_moved"] for s in summaries(tmp_path / "run") for record in s.records]
    assert all(0 <= share < 0.5 for share in moved)
    assert sum(moved) > 0


def test_what_was_trained_is_what_is_deployed(demo_text, tmp_path, monkeypatch):
    config = tuned(demo_text, tmp_path)
    session = open_session(config)
    seen = {}
    usual = stage.model_objective

    def watched(chain, full, outside):
        seen.update(full=full)
        return usual(chain, full, outside)

    monkeypatch.setattr(stage, "model_objective", watched)
    session.quantize(config.run, config.output)
    log = summaries(config.output.run_dir)[0].tuning
    target, model, outside = RunDirectory(config.output.run_dir), session.model, session.model.outside_weights(CPU)
    weights = BlockWeights()
    for i in range(len(model.blocks)):
        weights |= read_block(model, target, i, BlockWeights.read(model, i, CPU)).within(i)
    rows = seen["full"].rows
    losses = []
    with torch.no_grad():
        for batch in split(len(rows), batch_of(32))[1]:
            ids = session.calibration(config.run).ids[rows[batch]]
            q = torch.log_softmax(whole_model_logits(model, weights, ids), -1).flatten(0, 1)
            p = torch.log_softmax(seen["full"].logits(rows[batch], outside), -1).flatten(0, 1)
            losses.append(float(divergence(q, p)))
    assert sum(losses) / len(losses) == log["held_out_end"]


@pytest.mark.parametrize("norms", [False, True])
def test_the_same_run_twice_gives_the_same_bits(norms, demo_text, tmp_path):
    config = tuned(demo_text, tmp_path, tuning=Tuning("model", 4, norms=norms))
    again = config.but(run_dir=tmp_path / "again")
    session = open_session(config)
    session.quantize(config.run, config.output)
    session.quantize(again.run, again.output)
    one, two = blocks_of(tmp_path / "run"), blocks_of(tmp_path / "again")
    assert same(one, two)
    assert any(name.startswith("changed/") for name in one[0]) == norms


class Killed(BaseException):
    """What a kill is here: nothing catches it."""


def killed_in_training(monkeypatch, validation):
    """The process ends right behind the state of that validation was kept."""
    usual, count = kept.Kept.write, []

    def write(self, state):
        usual(self, state)
        count.append(state.step)
        if len(count) == validation:
            raise Killed

    monkeypatch.setattr(kept.Kept, "write", write)


def killed_in_writing(monkeypatch, block):
    """The process ends right before that block is written."""
    usual = stage._write

    def write(job, tuned_block, *given):
        if tuned_block.index == block:
            raise Killed
        usual(job, tuned_block, *given)

    monkeypatch.setattr(stage, "_write", write)


@pytest.mark.parametrize(
    "kill", [lambda m: killed_in_training(m, 3), lambda m: killed_in_training(m, STEPS), lambda m: killed_in_writing(m, 0),
             lambda m: killed_in_writing(m, 2)], ids=["step 3", "last step", "before the first block", "third block"],
)  # fmt: skip
def test_a_run_that_was_killed_ends_with_the_same_bits(kill, whole, demo_text, tmp_path, monkeypatch):
    other = tuned(demo_text, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        quantize(other)
    assert (other.output.run_dir / TUNING).exists()
    assert not same(blocks_of(whole[0]), blocks_of(other.output.run_dir))
    results = perform(other)
    assert same(blocks_of(whole[0]), blocks_of(other.output.run_dir))
    assert results["codes_sha256"] == whole[1]["codes_sha256"]
    journals = [(path / "journal.jsonl").read_text().count("\n") for path in (whole[0], other.output.run_dir)]
    assert journals[0] == journals[1]
    assert not (other.output.run_dir / TUNING).exists()


def test_blocks_that_are_tuned_one_by_one_go_on_where_they_were(demo_text, tmp_path, monkeypatch):
    config = tuned(demo_text, tmp_path, "block", tuning=Tuning("block", 4, rate=0.05))
    quantize(config)
    other = config.but(run_dir=tmp_path / "killed")
    usual = RunDirectory.write_block

    def write(self, index, *given, **more):
        if index == 2:
            raise Killed
        return usual(self, index, *given, **more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDirectory, "write_block", write)
        quantize(other)
    assert len(blocks_of(tmp_path / "killed")) == 2
    quantize(other)
    assert same(blocks_of(tmp_path / "run"), blocks_of(tmp_path / "killed"))


@pytest.mark.parametrize("scope", ["block", "model"])
def test_solved_codes_stay_where_tuning_does_not_help(scope, demo_text, tmp_path):
    wild = Tuning(scope, 2, rate=400.0, grid_rate=0.5)
    config = tuned(demo_text, tmp_path, wbits=4, tuning=wild)
    plain = config.but(tuning=None, run_dir=tmp_path / "plain")
    session = open_session(config)
    session.quantize(config.run, config.output)
    session.quantize(plain.run, plain.output)
    assert [s.tuning["best_step"] for s in summaries(config.output.run_dir)] == [0] * 4
    assert same(blocks_of(tmp_path / "run"), blocks_of(tmp_path / "plain"))


AUTOROUND = replace(AUTOROUND_TUNING, iterations=STEPS)


@pytest.mark.parametrize("changes", [{}, {"scope": "model"}, {"last": "lm", "drop": 0.001}, {"last": "kl", "norms": True},
                                     {"recompute": True}])  # fmt: skip
def test_autoround_is_a_row_of_tuning(changes, demo_text, tmp_path):
    config = tuned(demo_text, tmp_path, tuning=replace(AUTOROUND, **changes))
    plain = config.but(tuning=None, run_dir=tmp_path / "plain")
    session = open_session(config)
    results, before = session.run(config.run, config.output), session.run(plain.run, plain.output)
    assert (results["method"], results["solver"], before["method"]) == ("autoround", "rtn", "rtn")
    assert results["perplexity"]["stories"]["quantized"] < before["perplexity"]["stories"]["quantized"]
    assert results["bits_per_weight"] == before["bits_per_weight"]
    logs = [summary.tuning for summary in summaries(tmp_path / "run")]
    assert all(log["held_out_end"] <= log["held_out_start"] for log in logs)
    assert sum(log["held_out_end"] < log["held_out_start"] for log in logs) >= 3


def test_autoround_begins_with_rounding_to_nearest_alone(demo_text, tmp_path):
    with pytest.raises(InputError, match="autoround begins with rounding to nearest, not with gptq"):
        perform(tuned(demo_text, tmp_path, tuning=AUTOROUND, solver="gptq"))


@pytest.mark.parametrize("last", ["kl", *long("lm")])
def test_the_last_block_is_tuned_for_the_model_and_the_others_for_themselves(last, demo_text, tmp_path):
    config = tuned(demo_text, tmp_path, "block", tuning=Tuning("block", STEPS, rate=0.02, last=last))
    usual = config.but(tuning=Tuning("block", STEPS, rate=0.02), run_dir=tmp_path / "usual")
    fewer = config.but(num_layers=3, run_dir=tmp_path / "fewer")
    session = open_session(config)
    for one in (config, usual, fewer):
        session.quantize(one.run, one.output)
    of_last, of_usual, of_fewer = (blocks_of(tmp_path / name) for name in ("run", "usual", "fewer"))
    assert same(of_last[:3], of_usual[:3])
    assert same(of_last[:3], of_fewer)
    assert not same(of_last[3:], of_usual[3:])
    log = summaries(tmp_path / "run")[3].tuning
    assert log["held_out_end"] < log["held_out_start"]
    assert log["held_out_start"] > 1 or last == "kl"  # nats of a token


@pytest.mark.parametrize("scope", ["block", "model"])
def test_recomputing_changes_no_bit(scope, demo_text, tmp_path):
    config = tuned(demo_text, tmp_path, scope, tuning=Tuning(scope, 4, rate=0.05))
    again = config.but(tuning=Tuning(scope, 4, rate=0.05, recompute=True), run_dir=tmp_path / "again")
    session = open_session(config)
    for one in (config, again):
        session.quantize(one.run, one.output)
    assert same(blocks_of(tmp_path / "run"), blocks_of(tmp_path / "again"))


def test_a_block_goes_on_in_the_middle_of_its_steps(demo_text, tmp_path, monkeypatch):
    config = tuned(demo_text, tmp_path, tuning=AUTOROUND)
    quantize(config)
    assert not (tmp_path / "run" / TUNING).exists()
    monkeypatch.setattr(kept, "KEEP_SECONDS", 0.0)
    other = config.but(run_dir=tmp_path / "killed")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_in_training(patch, STEPS + 4)  # of the second block
        quantize(other)
    assert len(blocks_of(tmp_path / "killed")) == 1
    steps = []
    usual = stage.optimize

    def watched(objective, state, *given):
        steps.append(state.step)
        return usual(objective, state, *given)

    monkeypatch.setattr(stage, "optimize", watched)
    quantize(other)
    assert steps == [4, 0, 0]
    assert same(blocks_of(tmp_path / "run"), blocks_of(tmp_path / "killed"))
    assert not (tmp_path / "killed" / TUNING).exists()


@pytest.mark.parametrize("method", ["gptq", "quantease", "gptq_quantease"])
def test_groups_outliers_and_some_blocks_alone(method, demo_text, tmp_path):
    options = {"quantease": {"num_iter": 3, "outlier": 0.01}, "gptq": {"act_order": True}}.get(method, {})
    config = tuned(demo_text, tmp_path, solver=method, options=options, group_size=32, num_layers=2, wbits=3,
                   tuning=Tuning("model", 6))  # fmt: skip
    results = perform(config)
    logs = [summary.tuning for summary in summaries(config.output.run_dir)]
    assert len(logs) == 2
    assert logs[0]["held_out_end"] <= logs[0]["held_out_start"]
    assert results["perplexity"]["stories"]["quantized"] > 0


def test_another_configuration_has_another_name(demo_text, tmp_path):
    config = tuned(demo_text, tmp_path).but(run_dir=None)
    session = open_session(config)
    others = [config.but(tuning=t) for t in (None, Tuning("block"), Tuning("model", STEPS + 1, rate=0.05))]
    assert len({session.run_path(c.run, c.output) for c in (config, *others)}) == 4
    assert "tuning" not in session.configuration(others[0].run)
    earlier = {"scope", "iterations", "rate", "grid_rate", "norms", "drop"}  # names of fields of runs that are there
    assert session.configuration(others[1].run)["tuning"].keys() == earlier
    window = session.configuration(config.but(tuning=Tuning("window", window=2, state="half")).run)["tuning"]
    assert window.keys() == earlier | {"window", "state"} and (window["scope"], window["window"]) == ("window", 2)
    assert session.configuration(config.but(tuning=AUTOROUND).run)["tuning"].keys() == earlier | {"form", "optimizer"}


def test_a_request_keeps_what_is_tuned(demo_text, tmp_path):
    request = tuned(demo_text, tmp_path, tuning=Tuning("model", 7, norms=True))
    stored, everything = request.to_json(), Allowed(False, paths=True)
    assert Request.from_json(stored, "manifest.json", everything).run.tuning == request.run.tuning
    assert Request.from_json(stored | {"tuning": None}, "manifest.json", everything).run.tuning is None
    for wrong in (
        {"scope": "layer"},
        {"iterations": "7"},
        {"iterations": -1},
        {"rate": float("nan")},
        {"other": 1},
        {"last": "x"},
        {"state": "x"},
        {"scope": "window", "window": 0},
        {"scope": "window", "window": "2"},
        {"scope": "block", "window": 2},
        {"form": "x"},
        {"optimizer": 1},
        7,
    ):
        with pytest.raises(InputError):
            Request.from_json(stored | {"tuning": wrong}, "manifest.json", everything)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": "spqr", "group_size": 16, "wbits": 3}, "--tune cannot hold scales that are quantized themselves"),
        ({"nsamples": 1}, "raise --nsamples"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_work(options, says, demo_text, tmp_path):
    config = tuned(demo_text, tmp_path, **options)
    with pytest.raises(InputError, match=says):
        perform(config)
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_is_refused_and_blocks_are_not(demo_text, tmp_path, monkeypatch):
    monkeypatch.setattr(limits.env, "free_bytes", lambda device: 10**6)
    config = tuned(demo_text, tmp_path)
    session = open_session(config)
    with pytest.raises(InputError, match=r"about 0\.\d GB .* use --tune block"):
        session.recipe(config.run)
    sizes = limits.Sizes.of(session.model, 4)
    needs = [limits.memory(sizes, Tuning("model", recompute=again), 4, 4 * 32) for again in (True, False)]
    monkeypatch.setattr(limits.env, "free_bytes", lambda device: sum(needs) / 2 / limits.SHARE)
    with pytest.raises(InputError, match="use --tune-recompute"):
        session.recipe(config.run)
    session.recipe(config.but(tuning=Tuning("block")).run)


def test_a_state_of_other_codes_or_a_damaged_one_is_refused(demo_text, tmp_path, monkeypatch):
    config = tuned(demo_text, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_in_training(patch, 2)
        quantize(config)
    state = config.output.run_dir / TUNING
    tensors = load_file(state)
    save_file(tensors, state, {"tuning": '{"step": 2, "losses": [1.0], "lowest": 1.0, "best_step": 0, '
                                         '"seconds": 1.0, "solved": "x"}'})  # fmt: skip
    with pytest.raises(InputError, match="belongs to other codes"):
        quantize(config)
    state.write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match=r"tuning.safetensors is damaged"):
        quantize(config)
    state.unlink()
    quantize(config)
    assert summaries(config.output.run_dir)[0].tuning["steps"] == STEPS


def test_blocks_of_which_some_are_tuned_need_the_state(demo_text, tmp_path, monkeypatch):
    config = tuned(demo_text, tmp_path, tuning=Tuning("model", 2))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_in_writing(patch, 2)
        quantize(config)
    (config.output.run_dir / TUNING).unlink()
    with pytest.raises(InputError, match=r"tuning.safetensors is missing, and some blocks are tuned"):
        quantize(config)
    assert len(perform(config.but(overwrite=True))["tuning"]) == 4


def test_another_persons_file_of_that_name_stays(demo_text, tmp_path):
    config = tuned(demo_text, tmp_path).but(tuning=None)
    perform(config)
    (config.output.run_dir / TUNING).write_text("mine")
    perform(config.but(overwrite=True))
    assert (config.output.run_dir / TUNING).read_text() == "mine"
    with pytest.raises(InputError, match="damaged"):
        quantize(config.but(tuning=Tuning("model", 2), overwrite=True))
    assert (config.output.run_dir / TUNING).read_text() == "mine"


def windowed(demo_text, tmp_path, blocks, **changes):
    """A run of `tuned` in windows of so many blocks."""
    return tuned(demo_text, tmp_path, tuning=Tuning("window", 6, rate=0.05, window=blocks, **changes))


def test_windows_of_one_block_are_blocks(demo_text, tmp_path):
    config = windowed(demo_text, tmp_path, 1, last="kl", norms=True)
    blocks = config.but(tuning=Tuning("block", 6, rate=0.05, last="kl", norms=True), run_dir=tmp_path / "blocks")
    session = open_session(config)
    for one in (config, blocks):
        session.quantize(one.run, one.output)
    assert same(blocks_of(tmp_path / "run"), blocks_of(tmp_path / "blocks"))
    assert [s.tuning for s in summaries(tmp_path / "run")] == [s.tuning for s in summaries(tmp_path / "blocks")]


def test_windows_are_tuned_for_their_last_output_with_those_before_tuned(demo_text, tmp_path, monkeypatch):
    """Four blocks in windows of three: the second holds one, and begins behind tuned blocks."""
    config = windowed(demo_text, tmp_path, 3, drop=0.0)
    seen, usual = [], stage.block_objective

    def watched(chain, targets, tuning):
        before = chain.training.hidden.data.clone()
        seen.append((tuple(chain.links), before, targets.data.clone(), chain.training.rows))
        return usual(chain, targets, tuning)

    monkeypatch.setattr(stage, "block_objective", watched)
    session = open_session(config)
    session.quantize(config.run, config.output)
    assert [links for links, *_ in seen] == [(0, 1, 2), (3,)]
    logs = [summary.tuning for summary in summaries(config.output.run_dir)]
    assert logs[0] == logs[1] == logs[2] != logs[3]
    assert all(log["held_out_end"] < log["held_out_start"] for log in logs)
    target, model = RunDirectory(config.output.run_dir), session.model
    stream, full = (session.calibration_stream(config.run) for _ in range(2))
    for links, before, targets, rows in seen:
        assert torch.equal(stream.hidden.data, before)
        for index in links:
            weights = BlockWeights.read(model, index, CPU)
            full.run(index, weights, advance=True)
            stream.run(index, read_block(model, target, index, weights), advance=True)
        assert torch.equal(full.hidden.data, targets)
        held = torch.cat([torch.arange(32)[rows[batch]] for batch in split(len(rows), batch_of(32))[1]])
        loss = (stream.hidden.data[held].double() - targets[held].double()).square().mean()
        assert float(loss) == pytest.approx(logs[links[-1]]["held_out_end"], rel=1e-6)
    lines = [line.split('"block": ')[1][0] for line in (target.path / "journal.jsonl").read_text().splitlines()]
    assert lines == sorted(lines) and len(lines) == 4 * 7


@pytest.mark.parametrize(
    "case", ["in the steps of the second", *long("between the files of a window", "before the second is solved")]
)
def test_windows_go_on_where_they_were(case, demo_text, tmp_path, monkeypatch):
    config = windowed(demo_text, tmp_path, 2, state="half", last="kl")
    quantize(config)
    other = config.but(run_dir=tmp_path / "killed")
    monkeypatch.setattr(kept, "KEEP_SECONDS", 0.0)
    usual, written = RunDirectory.write_block, []

    def write(self, index, *given, **more):
        if case != "in the steps of the second" and len(written) == (3 if case.startswith("between") else 2):
            raise Killed
        written.append(index)
        return usual(self, index, *given, **more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunDirectory, "write_block", write)
        if case == "in the steps of the second":
            killed_in_training(patch, 6 + 4)
        quantize(other)
    assert len(summaries(tmp_path / "killed")) == 2
    steps, usual_steps = [], stage.optimize

    def watched(objective, state, *given):
        steps.append(state.step)
        return usual_steps(objective, state, *given)

    monkeypatch.setattr(stage, "optimize", watched)
    quantize(other)
    assert steps == [4 if case == "in the steps of the second" else 6]
    assert same(blocks_of(tmp_path / "run"), blocks_of(tmp_path / "killed"))
    assert not (tmp_path / "killed" / TUNING).exists()


def test_a_window_that_does_not_fit_is_refused_with_what_does(demo_text, tmp_path, monkeypatch):
    session, run = open_session(windowed(demo_text, tmp_path, 4)), windowed(demo_text, tmp_path, 4).run
    sizes = limits.Sizes.of(session.model, 4)

    def need(**changes):
        return limits.memory(sizes, replace(run.tuning, **changes), 4, 4 * 32)

    offers = [need(), need(recompute=True), need(recompute=True, state="half"), need(window=2), 0]
    assert offers == sorted(offers, reverse=True)
    flags = ["--tune-recompute", "--tune-recompute --tune-state half", "--tune window:2", "--tune block"]
    for before, after, says in zip(offers[:-1], offers[1:], flags, strict=True):
        monkeypatch.setattr(limits.env, "free_bytes", lambda device, b=before, a=after: (b + a) / 2 / limits.SHARE)
        with pytest.raises(InputError, match=rf"--tune window:4 holds 4 blocks .* free: use {says}$"):
            session.recipe(run)
    session.recipe(config_of(run, scope="block", window=1))


def config_of(run, **changes):
    return replace(run, tuning=replace(run.tuning, **changes))
