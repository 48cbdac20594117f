"""Learning all blocks together: it helps on held-out windows, what is trained is deployed, and a kill changes no bit."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from data.demo import text as stories
from quant.blocks.fake_quant import ActSpec
from quant.blocks.weights import BlockWeights, is_online
from quant.core.errors import InputError
from quant.learn.affinequant import dominance
from quant.run import learning as stage
from quant.run import loop
from quant.run.directory import LEARNING, RunDirectory
from quant.run.kept import Kept
from quant.run.loop import read_block
from quant.run.session import open_session
from quant.tune import limits
from quant.tune.config import Tuning, batch_of, split
from quant.tune.objectives import divergence
from tests.helpers import CPU, DEMO, asked, learned_config, perform, replace, whole_model_logits

STEPS = 6


@pytest.fixture(scope="module")
def demo_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "stories.txt"
    path.write_text(stories("test")[:60_000])
    return path


def together(model, text, tmp_path, epochs=1, steps=STEPS, method="flatquant", transform=None, **options):
    """A small run in which blocks learn one by one, then all together."""
    learning = replace(asked(method, 4, 4, **(transform or {}), epochs=epochs, batch=4, lwc_lr=0.05), together=steps)
    small = {"nsamples": 16, "wbits": 4, "act": ActSpec(4, 4), "learner": method, "learning": learning}
    return learned_config(model, text, tmp_path, **(small | options))


@pytest.fixture(scope="module")
def whole(demo_text, tmp_path_factory):
    """A run of the demo model that nothing interrupted."""
    config = together(DEMO / "llama", demo_text, tmp_path_factory.mktemp("whole"))
    return config.output.run_dir, perform(config)


def blocks_of(path):
    return [load_file(file) for file in sorted((path / "blocks").iterdir())]


def same(one, two):
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(one, two, strict=True)
    )


def test_it_helps_on_windows_that_it_did_not_see(whole, demo_text, tmp_path):
    path, results = whole
    alone = together(DEMO / "llama", demo_text, tmp_path, steps=0)
    before = perform(alone)
    after, first = (one["perplexity"]["stories"]["quantized"] for one in (results, before))
    assert after < 1.01 * first  # few steps: what they win on text of another kind depends on the machine's rounding
    assert results["bits_per_weight"] == before["bits_per_weight"]
    for log, first in zip(results["learning"], before["learning"], strict=True):
        end = log["together"]
        assert end["held_out_end"] == min(end["losses"]) < end["held_out_start"] == end["losses"][0]
        assert {k: v for k, v in log.items() if k != "together"} == first
    assert not (path / LEARNING).exists()
    assert not same(blocks_of(path), blocks_of(alone.output.run_dir))
    journal = (path / "journal.jsonl").read_text().splitlines()
    assert len(journal) == sum(len(s.records) for s in RunDirectory(path).finished_blocks())


def test_what_was_trained_is_what_is_deployed(demo_text, tmp_path, monkeypatch):
    """The held-out loss of the best iterate is that of the blocks on disk, in the library's own model, bit for bit."""
    config = together(DEMO / "llama", demo_text, tmp_path)
    session, seen, usual = open_session(config), {}, stage.model_objective

    def watched(chain, full, outside):
        seen.update(full=full)
        return usual(chain, full, outside)

    monkeypatch.setattr(stage, "model_objective", watched)
    session.quantize(config.run, config.output)
    target, model = RunDirectory(config.output.run_dir), session.model
    log = target.finished_blocks()[0].learning["together"]
    weights = BlockWeights()
    for i in range(len(model.blocks)):
        weights |= read_block(model, target, i, BlockWeights.read(model, i, CPU)).within(i)
    full, losses = seen["full"], []
    with torch.no_grad():
        for batch in split(len(full.rows), batch_of(16))[1]:
            ids = session.calibration(config.run).ids[full.rows[batch]]
            logits = whole_model_logits(model, weights, ids, config.run.act)
            q = torch.log_softmax(logits, -1).flatten(0, 1)
            p = torch.log_softmax(full.logits(full.rows[batch], model.outside_weights(CPU)), -1).flatten(0, 1)
            losses.append(float(divergence(q, p)))
    assert sum(losses) / len(losses) == log["held_out_end"] < log["held_out_start"]


class Killed(BaseException):
    """What a kill is here: nothing catches it."""


def killed_in_training(monkeypatch, validation):
    """The process ends right behind the state of that validation was kept."""
    usual, count = Kept.write, []

    def write(self, state):
        usual(self, state)
        count.append(state.step)
        if len(count) == validation:
            raise Killed

    monkeypatch.setattr(Kept, "write", write)


def killed_in_front_of(monkeypatch, index, last):
    """The process ends in front of a block: while blocks learn one by one, or when they are solved at last."""
    usual = loop.quantize_block

    def quantize_block(stream, number, weights, recipe, learned=None, *given):
        if number == index and (learned is not None and "together" in learned.log) == last:
            raise Killed
        return usual(stream, number, weights, recipe, learned, *given)

    monkeypatch.setattr(loop, "quantize_block", quantize_block)


@pytest.mark.parametrize(
    "kill",
    [lambda m: killed_in_front_of(m, 1, False), lambda m: killed_in_training(m, 2), lambda m: killed_in_training(m, STEPS),
     lambda m: killed_in_front_of(m, 0, True), lambda m: killed_in_front_of(m, 1, True)],
    ids=["second block", "step 2", "last step", "solving the first", "solving the second"],
)  # fmt: skip
def test_a_run_that_was_killed_ends_with_the_same_bits(kill, whole, demo_text, tmp_path, monkeypatch):
    other = together(DEMO / "llama", demo_text, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        perform(other)
    assert not same(blocks_of(whole[0]), blocks_of(other.output.run_dir))
    results = perform(other)
    assert same(blocks_of(whole[0]), blocks_of(other.output.run_dir))
    assert results["codes_sha256"] == whole[1]["codes_sha256"]
    assert not (other.output.run_dir / LEARNING).exists()


def test_a_state_that_is_gone_or_of_others_is_told(demo_text, tmp_path, monkeypatch):
    config = together(DEMO / "llama", demo_text, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_in_front_of(patch, 1, True)
        perform(config)
    state = config.output.run_dir / LEARNING
    content = state.read_bytes()
    state.write_bytes(content[:100])
    with pytest.raises(InputError, match=r"learning\.safetensors is damaged .* training begins again"):
        perform(config)
    state.unlink()
    with pytest.raises(InputError, match=r"learning\.safetensors is missing, and some blocks are solved already"):
        perform(config)


def test_it_composes_with_solvers_and_scales(demo_text, tmp_path, model_dir):
    """A solver on corrected targets behind it, and columns that were scaled before: the scales stay those that were learned on."""
    from quant.solvers import get_solver

    config = together(
        model_dir("llama"), demo_text, tmp_path, solver="gptq", target_correction=1.0, true_sequential=True,
        column_scales=True,
    )  # fmt: skip
    seen, usual = [], loop.quantize_block

    def quantize_block(stream, number, weights, recipe, learned=None, *given):
        seen.append((number, recipe.solver is get_solver("gptq"), recipe.correction is not None,
                     {k: v.clone() for k, v in learned.parameters.items() if k.startswith("columns.")}))  # fmt: skip
        return usual(stream, number, weights, recipe, learned, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "quantize_block", quantize_block)
        results = perform(config)
    n = len(results["learning"])
    assert [(i, one, other) for i, one, other, _ in seen] == [
        (i, last, last) for last in (False, True) for i in range(n)
    ]
    for first, last in zip(seen[:n], seen[n:], strict=True):
        assert first[3] and all(torch.equal(first[3][k], last[3][k]) for k in first[3])
    assert math.isfinite(results["perplexity"]["stories"]["quantized"])


def test_codes_are_tuned_behind_it_with_what_stands_beside_the_weights(whole, demo_text, tmp_path):
    """The start of the second stage is the end of the first, bit for bit; matrices and clips move with the codes."""
    tuning = Tuning("model", 20, rate=2e-3, grid_rate=3e-4, online=True)
    config = together(DEMO / "llama", demo_text, tmp_path, tuning=tuning)
    results = perform(config)
    before, after = RunDirectory(whole[0]), RunDirectory(config.output.run_dir)
    for index, (log, tuned) in enumerate(zip(results["learning"], results["tuning"], strict=True)):
        assert log["together"] == whole[1]["learning"][index]["together"]
        assert tuned["held_out_start"] == log["together"]["held_out_end"]
        old, new = before.read_changed(index).named(), after.read_changed(index).named()
        assert old.keys() == new.keys()
        moved = {name for name in old if not torch.equal(old[name], new[name])}
        online = {name for name in old if is_online(name)}
        assert (
            {name for name in online if "clip" not in name} <= moved <= online
        )  # norms stay, clips may round to the same
        learned = after.read_learned(index)
        assert all(torch.equal(tensor, learned[name]) for name, tensor in before.read_learned(index).items())
    assert results["tuning"][0]["held_out_end"] < results["tuning"][0]["held_out_start"]


def test_rows_that_would_lose_their_dominance_stay(demo_text, tmp_path, model_dir):
    """AffineQuant's matrices keep it when all blocks learn together, at rates that would take it from them."""
    config = together(
        model_dir("llama"), demo_text, tmp_path, method="affinequant", epochs=0, steps=10,
        transform={"matrix": True, "norm_matrix": True, "stability": 1.0, "let_lr": 0.5},
    )  # fmt: skip
    results = perform(config)
    assert all(log["smallest_dominance"] > 0 for log in results["learning"])
    learned = RunDirectory(config.output.run_dir).read_learned(0)
    matrices = [t for name, t in learned.items() if name.endswith(".matrix")]
    assert matrices and all(float(dominance(matrix).min()) > 0 for matrix in matrices)


def test_a_model_that_does_not_fit_is_refused_before_work(demo_text, tmp_path, model_dir, monkeypatch):
    config = together(model_dir("llama"), demo_text, tmp_path)
    session = open_session(config)
    sizes = limits.Sizes.of(session.model, len(session.model.blocks))
    tokens, heads = batch_of(16) * session.seqlen, session.model.family.heads(session.model.config).q[1].shape[0]
    with_all, with_inputs = (
        limits.learning_memory(sizes, tokens, heads * session.seqlen, 4, again) for again in (False, True)
    )
    assert with_inputs < with_all
    for free, answer in ((2 * with_all, False), (with_all, True)):
        monkeypatch.setattr(limits.env, "free_bytes", lambda device, free=free: free)
        assert limits.recomputes(session.model, 16, session.seqlen, CPU) == answer
    monkeypatch.setattr(limits.env, "free_bytes", lambda device: with_inputs)
    with pytest.raises(InputError, match="--whole_model holds the whole model with its gradients in memory, about 0"):
        session.quantize(config.run, config.output)
    assert not config.output.run_dir.exists()


def test_recomputed_blocks_give_the_same_bits(whole, demo_text, tmp_path, monkeypatch):
    config = together(DEMO / "llama", demo_text, tmp_path)
    monkeypatch.setattr(stage, "recomputes", lambda *given: True)
    assert perform(config)["codes_sha256"] == whole[1]["codes_sha256"]
