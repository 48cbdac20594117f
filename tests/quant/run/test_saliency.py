"""Runs with token weights: every part of every linear is solved with its own Gram matrix, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

import main
import model_quantizer
from quant.blocks.backward import Labels, backward
from quant.blocks.saliency import TokenWeights
from quant.blocks.weights import BlockWeights
from quant.core import env
from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.parts import row_parts
from quant.core.types import QuantSpec
from quant.run.directory import RunDirectory
from quant.run.observe import observe
from quant.run.session import open_session
from quant.run.statistics import Original
from quant.solvers import get_solver
from tests.helpers import CPU, called, config_for, perform, same_codes


def blocks_of(path):
    return [RunDirectory(path).read_weights(index) for index in range(3)]


@pytest.mark.parametrize("name", ["llama gqa, tied", "opt", "falcon 7b"])
def test_statistics_are_those_of_a_loop_over_tokens(name, model_dir, text, tmp_path):
    """Of both streams, with the weights that the backward pass gave, and the plain ones beside them."""
    inputs = open_session(config_for(model_dir(name), text, tmp_path, nsamples=5, saliency=3))
    run = config_for(model_dir(name), text, tmp_path, nsamples=5).run
    stream, original = inputs.calibration_stream(run), inputs.calibration_stream(run)
    stream.hidden.data.mul_(1.1)
    tokens = TokenWeights(original, 3, 2)
    backward(original, Labels(), [tokens])
    weights, groups = BlockWeights.read(inputs.model, 0, CPU), inputs.model.groups
    seen = {group[0]: ([], []) for group in groups}
    for which, one in enumerate((stream, original)):
        one.run(0, weights, observe={n: lambda x, at=kept[which]: at.append(x.clone()) for n, kept in seen.items()})
    found = observe(stream, 0, weights, groups, None, Original(original, weights), tokens)
    alone = observe(stream, 0, weights, groups, None, None, tokens)
    for group in groups:
        x, full = (torch.cat([part.reshape(-1, part.shape[-1]) for part in kept]).double() for kept in seen[group[0]])
        torch.testing.assert_close(found[group[0]].calibration.gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)
        for linear in group:
            s = tokens.of(0, linear, slice(0, 5)).double()
            assert (
                len(found[group[0]].weighted[linear])
                == s.shape[1]
                == len(row_parts(weights.weight(linear).shape[0], 3))
            )
            for part, stats in enumerate(found[group[0]].weighted[linear]):
                gram, cross = torch.zeros(2, x.shape[1], x.shape[1], dtype=torch.float64)
                for t in range(len(x)):
                    gram += s[t, part] * torch.outer(x[t], x[t])
                    cross += s[t, part] * torch.outer(full[t], x[t])
                torch.testing.assert_close(stats.gram.double(), gram, rtol=1e-4, atol=1e-3)
                torch.testing.assert_close(stats.cross.double(), cross, rtol=1e-4, atol=1e-3)
                assert torch.equal(alone[group[0]].weighted[linear][part].gram, stats.gram)
                assert stats.n_tokens == len(x)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_every_part_is_solved_with_its_own_statistics(true_sequential, model_dir, text, tmp_path):
    """The first block by hand: its first group sees the same inputs in either order."""
    request = config_for(model_dir("llama"), text, tmp_path, saliency=2, true_sequential=true_sequential)
    perform(request)
    inputs = open_session(request)
    stream = inputs.calibration_stream(request.run)
    tokens = TokenWeights(stream, 2, 3)
    backward(stream, Labels(seed=request.run.seed), [tokens])
    weights, seen = BlockWeights.read(inputs.model, 0, CPU), []
    stream.run(0, weights, observe={"self_attn.q_proj": lambda x: seen.append(x.clone())})
    x = torch.cat(seen).flatten(0, 1)
    solved = blocks_of(tmp_path / "run")[0]
    for name in ("self_attn.q_proj", "self_attn.v_proj"):
        s, weight = tokens.of(0, name, slice(0, 12)), weights.weight(name)
        for part, rows in enumerate((slice(0, 16), slice(16, 32))):
            stats = GramStats(32)
            for i in range(0, 12, 4):  # sums in the order of the batches
                these = slice(i * 32, (i + 4) * 32)
                stats.update(x[these], weights=s[these, part])
            expected = get_solver("quantease")(weight[rows], stats, QuantSpec(3), num_iter=4)
            assert torch.equal(solved[name].codes[rows], expected.codes)
    q, v = (tokens.of(0, f"self_attn.{n}_proj", slice(0, 12)) for n in "qv")
    assert not torch.allclose(q, v, rtol=0.1), "every linear has weights of its own"


def test_saliency_is_off_unless_asked_for_and_resumable(model_dir, text, tmp_path):
    def request(name, **options):
        options = {"run_dir": tmp_path / name, "wbits": 2, "true_sequential": True} | options
        return config_for(model_dir("opt"), text, tmp_path, **options)

    plain, weighted, data = request("plain"), request("weighted", saliency=4), request("data", saliency=4)
    data = data.but(saliency_labels="data")
    for one in (plain, weighted, data):
        perform(one)
    answers = {name: blocks_of(tmp_path / name) for name in ("plain", "weighted", "data")}
    for first, second in (("plain", "weighted"), ("weighted", "data")):
        assert not all(same_codes(answers[first][2][n], answers[second][2][n]) for n in answers[first][2])

    def stop(stage, done, total, note):
        if stage == "quantize" and done == 2:
            raise KeyboardInterrupt

    again = request("again", saliency=4)
    with pytest.raises(KeyboardInterrupt):
        perform(again, stop)
    stages = []
    perform(again, lambda stage, done, total, note: stages.append((stage, done, total)))
    assert ("saliency", 6, 6) in stages and ("quantize", 3, 3) in stages
    for before, after in zip(answers["weighted"], blocks_of(tmp_path / "again"), strict=True):
        assert all(same_codes(before[name], after[name]) for name in before)
    stages.clear()
    perform(again, lambda stage, done, total, note: stages.append(stage))
    assert "saliency" not in stages, "nothing is left to solve"


def test_it_composes_with_the_corrected_target_outliers_and_learning(model_dir, text, tmp_path):
    results = {}
    for name, options in {
        "corrected": {"target_correction": 1.0, "residual_correction": True, "true_sequential": True},
        "outliers": {"options": {"num_iter": 4, "outlier": 0.02}},
        "groups": {"group_size": 16, "solver": "gptq", "options": {"act_order": True, "static_groups": True}},
    }.items():
        for parts in (0, 3):
            directory = tmp_path / f"{name}{parts}"
            results[name, parts] = perform(
                config_for(model_dir("llama"), text, tmp_path, run_dir=directory, saliency=parts, **options)
            )
        bits = [results[name, parts]["bits_per_weight"] for parts in (0, 3)]
        assert bits[0] == pytest.approx(bits[1], abs=0.1)
    answer = blocks_of(tmp_path / "outliers3")[1]["mlp.up_proj"]
    assert len({int(i) // 32 // 22 for i in answer.outliers.index}) == 3, "each part keeps its own"


def test_weighting_lowers_the_weighted_objective(model_dir, text, tmp_path):
    """What is minimized is lower than without weights, linear by linear, or nearly everywhere."""
    request = config_for(model_dir("llama"), text, tmp_path, saliency=1, wbits=2, options={"num_iter": 20})
    perform(request)
    perform(replace(request.but(saliency=0), output=replace(request.output, run_dir=tmp_path / "plain")))
    inputs = open_session(request)
    stream, tokens = inputs.calibration_stream(request.run), None
    tokens = TokenWeights(stream, 1, 1)
    backward(stream, Labels(), [tokens])
    weights = BlockWeights.read(inputs.model, 0, CPU)
    stats = observe(stream, 0, weights, inputs.model.groups, tokens=tokens)
    won = []
    weighted, plain = (blocks_of(tmp_path / name)[0] for name in ("run", "plain"))
    for group in inputs.model.groups:
        for name in group:
            gram = stats[group[0]].weighted[name][0].gram.double()
            losses = []
            for answers in (weighted, plain):
                error = (answers[name].dequantize() - weights.weight(name)).double()
                losses.append(float((error @ gram * error).sum()))
            won.append(losses[0] < losses[1])
    assert sum(won) >= 6, "coordinate descent ends in local optima: one of seven may be unlucky"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"solver": "spqr", "options": {}, "group_size": 16}, "its rows depend on each other"),
        ({"solver": "gptq", "options": {"act_order": True}, "group_size": 16}, "columns in other groups"),
        ({"options": {"outlier": 0.1, "structure_outlier": True}}, "drop --structure-outlier"),
    ],
)
def test_what_cannot_be_solved_in_parts_is_refused_before_work(options, says, model_dir, text, tmp_path):
    with pytest.raises(InputError, match=says) as error:
        perform(config_for(model_dir("llama"), text, tmp_path, saliency=2, **options))
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_hidden_states_that_do_not_fit_are_refused(model_dir, text, tmp_path, monkeypatch):
    request = config_for(model_dir("llama"), text, tmp_path, saliency=1)
    monkeypatch.setattr(env, "free_bytes", lambda device: 350_000)  # (3 + 1 + 2) x 12 x 32 x 32 x 4 = 294912
    with pytest.raises(InputError, match=r"--saliency keeps .* 0.0 GB .* --activation-store disk"):
        perform(request)
    perform(request.but(activation_store="disk"))
    monkeypatch.setattr(env, "free_bytes", lambda device: 370_000)
    perform(request.but(run_dir=tmp_path / "fits"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--saliency", 9, "--wbits", 3], "--saliency 9: use 1 to 8 parts, or 0"),
        (["--saliency", 1], "--saliency is of what is rounded: give --wbits 1 to 8"),
        (["--saliency-labels", "data", "--wbits", 3], "--saliency-labels data: give --saliency 1 to 8 too"),
        (["--saliency", 2, "--wbits", 3, "--compare-layers"], "drop --saliency"),
        (["--saliency", 2, "--wbits", 3, "--outlier", 0.1, "--structure-outlier"], "drop one of them"),
    ],
)
def test_bad_flags_are_told_in_a_line(words, line, small, monkeypatch, capsys):
    code, _, errors = called(model_quantizer, monkeypatch, capsys, *small, *words)
    assert code == 2 and line in errors and len(errors.strip().splitlines()) == 1


def test_the_flag_of_both_commands_and_its_plan(small, model_dir, text, monkeypatch, capsys, tmp_path):
    small += ["--cache-dir", tmp_path / "cache"]
    own = ["--dataset", text, "--wbits", 3, "--saliency", 2, "--num-iter", 2]
    code, out, _ = called(model_quantizer, monkeypatch, capsys, *small, *own, "--dry-run")
    assert code == 0 and "seconds: saliency" in out and "device: saliency" in out
    code, _, errors = called(model_quantizer, monkeypatch, capsys, *small, *own)
    assert code == 0, errors
    learner = [
        "--calib_dataset",
        text,
        "--wbits",
        3,
        "--saliency",
        2,
        "--lwc",
        "--let",
        "--epochs",
        1,
        "--solver",
        "quantease",
    ]
    words = [tmp_path / "learned" if word == tmp_path / "run" else word for word in small]
    assert called(main, monkeypatch, capsys, *words, *learner, "--num-iter", 2)[0] == 0
    assert RunDirectory(tmp_path / "learned").finished_blocks()
