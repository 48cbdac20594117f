"""Runs of several processes held against the same run of one."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

import model_quantizer
from models.load import load_config, load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import own_windows
from quant.cli.commands import run as run_command
from quant.cli.errors import BAD_INPUT, FAILED, exit_code_of
from quant.core import gram, ranks
from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.evaluate.passes import FULL, UNCHANGED
from quant.evaluate.scorer import Scorer
from quant.run import experts, inputs, observe, outside, solving
from quant.run.config import RunConfig
from quant.run.directory import RunDirectory
from quant.run.shapes import shapes_of
from quant.run.sharing import check_sharing
from quant.run.wire import codes_sent, shared_plan, sums_sent
from quant.tune.config import Tuning
from tests.crew import Crew, together
from tests.helpers import CPU, asked, called, config_for, learned_config, long, perform, replace, same_codes


class InFloat64(GramStats):
    """Sums over tokens kept in float64 until they are whole: float32 forgets in which order they were added."""

    def __init__(self, n_in, device="cpu"):
        super().__init__(n_in, device)
        self._sum, self.total = self._sum.double(), self.total.double()

    def update(self, x, full=None, lacking=None, weights=None):
        if lacking is not None and self.residual is None:
            self.residual = torch.zeros(lacking.shape[-1], x.shape[-1], dtype=torch.float64)
        super().update(x, full, lacking, weights)

    @classmethod
    def from_gram(cls, *given, **options):
        return GramStats.from_gram(*given, **options)

    def add_up(self, paired=False):
        self.full_total = None if self.full_total is None else self.full_total.double()
        super().add_up(paired)
        self._sum, self.total = self._sum.float(), self.total.float()
        for name in ("cross", "residual", "full_total"):
            sums = getattr(self, name)
            setattr(self, name, None if sums is None else sums.float())
        return self


def chunks_in_float64(root, *inputs):
    yield tuple(rows.double() if root is None else rows.double() * root.double() for rows in inputs)


def in_float64(requests):
    """Runs with such sums."""
    gram._chunks = chunks_in_float64
    for module in (observe, experts, outside):
        module.GramStats = InFloat64
    return [perform(request) for request in requests]


def answers(path: Path) -> dict:
    directory, blocks = RunDirectory(path), []
    while directory.block_file(len(blocks)).exists():
        blocks.append(directory.read_weights(len(blocks)))
    return {(i, name): answer for i, block in enumerate(blocks) for name, answer in block.items()}


def count_differences(first: Path, second: Path) -> tuple[int, int]:
    """Codes that differ, and all."""
    one, other = answers(first), answers(second)
    assert one.keys() == other.keys()
    return sum(int((one[k].codes != other[k].codes).sum()) for k in one), sum(a.codes.numel() for a in one.values())


EVERYTHING = {"target_correction": 1.0, "residual_correction": True, "column_scales": True, "true_sequential": True}
RUNS = {
    "gptq": {"solver": "gptq", "group_size": 16, "options": {"act_order": True}, "head_bits": 4},
    "quantease": {"range": "mse", "options": {"num_iter": 3}} | EVERYTHING,
    "spqr": {"solver": "spqr", "group_size": 16, "options": {"outlier": 0.2}},
    "mixture": {"solver": "gptaq", "options": {}, "true_sequential": True},
    "floats": {
        "grid_kind": "nvfp4",
        "wbits": 4,
        "group_size": 16,
        "options": {"num_iter": 3, "refit_grid": True},
        "head_bits": 4,
    },
    "biases": {"solver": "rtn", "options": {}, "bias_correction": True, "act": ActSpec(8, method="static")},
}
PROCESSES = {name: 3 if name in ("gptq", "mixture") else 2 for name in RUNS}


@pytest.fixture(scope="module")
def runs(model_dir, text, tmp_path_factory):
    """Directory and results of RUNS by one process and by several. 7 windows in batches of 2: three have 2, 2 and 3."""
    path = tmp_path_factory.mktemp("shared")
    requests = {}
    for name, options in RUNS.items():
        model = model_dir({"biases": "opt", "mixture": "mixtral"}.get(name, "llama"))
        requests[name] = config_for(model, text, path, nsamples=7, calib_batch=2, limit=5, **options)
    results = {}
    for size in (1, 2, 3):
        names = [name for name in RUNS if size in (1, PROCESSES[name])]
        given = [replace(requests[name], run_dir=path / f"{name}-{size}") for name in names]
        by_rank = together(size, in_float64, given, directory=path)
        results |= {(name, size): [own[i] for own in by_rank] for i, name in enumerate(names)}
    return path, results


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_codes_are_those_of_one_process(name, runs):
    """In float64: every code and scale."""
    path, results = runs
    (one,), size = results[name, 1], PROCESSES[name]
    first, second = answers(path / f"{name}-1"), answers(path / f"{name}-{size}")
    assert first and first.keys() == second.keys() and all(same_codes(first[k], second[k]) for k in first)
    for own in results[name, size]:
        assert own["codes_sha256"] == one["codes_sha256"]
        for key in ("fp", "quantized"):
            assert own["perplexity"]["words"][key] == pytest.approx(one["perplexity"]["words"][key], rel=1e-6)
        assert own["mean_relative_error"] == pytest.approx(one["mean_relative_error"], rel=1e-5)
        assert own["mean_relative_error_heldout"] == pytest.approx(one["mean_relative_error_heldout"], rel=1e-5)
    journals = [(path / f"{name}-{n}" / "journal.jsonl").read_text().splitlines() for n in (1, size)]
    for ours, theirs in zip(*([json.loads(line) for line in lines] for lines in journals), strict=True):
        assert ours["n_tokens"] == theirs["n_tokens"] and ours["name"] == theirs["name"]


def command(*words):
    """The exit code of model_quantizer.py with these flags."""
    sys.argv = ["model_quantizer.py", *map(str, words)]
    return exit_code_of(model_quantizer.main, shared=True)


def command_that_dies(rank, block, written, *words):
    """The same, and one process is killed as a block is done, before or after its file is written."""
    write = RunDirectory.write_block

    def write_and_die(self, index, *given, **options):
        dies = ranks.rank() == rank and index == block
        if dies and not written:
            os.kill(os.getpid(), signal.SIGKILL)
        summary = write(self, index, *given, **options)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return summary

    RunDirectory.write_block = write_and_die
    return command(*words)


def command_that_fails(rank, *words):
    """The same, and one process cannot solve its rows."""
    solve = solving.solve

    def solve_or_fail(weight, *given):
        if ranks.rank() == rank and weight.shape[0] != 4:  # not that of the check before work begins
            raise InputError("its rows cannot be solved")
        return solve(weight, *given)

    solving.solve = solve_or_fail
    return command(*words)


@pytest.fixture
def flags(small, tmp_path):
    """Of a small run of model_quantizer.py."""
    rest = ["--wbits", 3, "--dataset", small[3], "--no-report", "--cache-dir", tmp_path / "cache"]
    return [*small, *rest, "--quantization-method", "gptq"]


def only_line(crew: Crew) -> str:
    """What all processes say together, which is one line."""
    lines = "".join(crew.errors()).splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_with_one_line_and_the_command_resumes(flags, tmp_path):
    chosen = random.Random()
    rank, block, written = chosen.randrange(2), chosen.randrange(3), chosen.random() < 0.5
    killed = Crew(2, command_that_dies, rank, block, written, *flags, directory=tmp_path)
    codes = killed.wait()
    where = (rank, block, written, killed.errors())
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == FAILED, where
    line = "error: another process of this job is gone .*the same command continues"
    assert re.match(line, only_line(killed)), where
    assert len(answers(tmp_path / "run")) in (7 * block, 7 * (block + 1)), where
    assert Crew(2, command, *flags, directory=tmp_path).wait() == [0, 0]
    assert Crew(2, command, *flags, "--run-dir", tmp_path / "whole", directory=tmp_path).wait() == [0, 0]
    first, second = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole"))
    assert first["codes_sha256"] == second["codes_sha256"] and first["perplexity"] == second["perplexity"]


def test_what_fails_on_one_process_is_said_by_it_alone(flags, tmp_path):
    failed = Crew(2, command_that_fails, 1, *flags, directory=tmp_path)
    assert failed.wait() == [FAILED, BAD_INPUT]
    assert only_line(failed) == "error: block 0 self_attn.q_proj: its rows cannot be solved"


def test_a_mistake_of_all_is_said_once(flags, tmp_path):
    wrong = Crew(2, command, *flags, "--tune", "block", "--dataset", "self", directory=tmp_path)
    assert wrong.wait() == [BAD_INPUT, BAD_INPUT]
    lines = "".join(wrong.errors()).splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["--tune", "--dataset self"]


def test_other_commands_are_of_one_process(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "_worlds", [ranks.World(0, 2, 0, None, speaks=True)])
    assert exit_code_of(lambda: None) == BAD_INPUT
    assert "start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nsamples": 3}, "--nsamples 3: 4 processes need a window each"),
        ({"saliency": 2}, "--saliency: of one process"),
        ({"avg_bits": 3.5}, "--avg-bits"),
        ({"tuning": Tuning("block", 3)}, "--tune"),
        ({"dataset": "self:4"}, "--dataset self:4"),
    ],
)
def test_what_is_not_shared_is_refused(options, says):
    run = RunConfig(wbits=3, **options)
    check_sharing(run, 1)
    with pytest.raises(InputError, match=re.escape(says)):
        check_sharing(run, 4)


@pytest.mark.parametrize(("n", "batch", "size"), [(7, 2, 3), (128, 4, 8), (5, 4, 3), (2, 4, 3), (0, 4, 2)])
def test_windows_are_shared_in_order_and_whole_batches_where_there_are_enough(n, batch, size, monkeypatch):
    parts = []
    for rank in range(size):
        monkeypatch.setattr(ranks, "_worlds", [ranks.World(rank, size, rank, None)])
        parts.append(own_windows(n, batch))
    assert [i for part in parts for i in range(n)[part]] == list(range(n))
    if -(-n // batch) >= size:
        assert all(part.start % batch == 0 for part in parts)
        assert max(len(range(n)[part]) for part in parts) <= batch * -(-n // batch // size) + batch


def bytes_sent(request):
    """What this process sent in a run, by what it was."""
    perform(request)
    return dict(ranks.sent())


@pytest.mark.parametrize("size", [2, *long(4)])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_bytes_on_the_wire_are_those_of_the_plan(name, size, model_dir, text, tmp_path):
    """Sums exactly; answers up to the names of tensors, which are most of a model this small."""
    options = {"solver": "rtn", "options": {}, "group_size": 16, "target_correction": 1.0, "full_precision_eval": False}
    request = config_for(model_dir(name), text, tmp_path, nsamples=size, calib_batch=1, eval_datasets=(), **options)
    kinds = shapes_of(load_config(str(model_dir(name)), tmp_path, with_weights=False)[0]).kinds
    assert not sum(sums_sent(request.run, kind, 1) + codes_sent(request.run, kind, 1) for kind in kinds)
    sums = sum(sums_sent(request.run, kind, size) for kind in kinds)
    codes = sum(codes_sent(request.run, kind, size) for kind in kinds)
    linears = sum(len(kind.linears) for kind in kinds)
    for own in together(size, bytes_sent, request, directory=tmp_path):
        assert own["sums"] == sums
        assert codes <= own["codes"] <= codes + (size - 1) * linears * 1200


def test_a_plan_of_one_process_sends_nothing_and_more_take_less(tmp_path):
    shapes = shapes_of(load_config("benchmarks/configs/llama-3-405b", tmp_path, with_weights=False)[0])
    run = RunConfig(wbits=4, solver="gptq", group_size=128)
    plan = dict.fromkeys((f"seconds: {stage}" for stage in ("forward", "gram", "solve", "measure", "evaluate")), 1000.0)
    one, eight, many = (shared_plan(run, shapes, plan, n, 1e13) for n in (1, 8, 64))
    assert one["bytes sent a block: sums"] == one["bytes sent a block: codes"] == 0
    factors = 126 * (6 * 16384**3 + 53248**3) / 3 / 1e13
    assert one["seconds: total"] == pytest.approx(5000 + factors)
    assert eight["seconds a block: factors"] == pytest.approx(factors / 126)
    assert many["seconds: total"] < eight["seconds: total"] < one["seconds: total"]
    strips = sum((n // 512) * (n // 512 + 1) / 2 * 512**2 + n for n in (16384, 16384, 16384, 53248))
    assert eight["bytes sent a block: sums"] == pytest.approx(2 * 7 / 8 * 4 * strips, rel=1e-5)


def learned(request):
    """What was learned of the blocks, losses and perplexity of a run."""
    results = perform(request)
    blocks = [RunDirectory(request.output.run_dir).read_learned(i) for i in range(3)]
    losses = [(own["loss_start"], *own["losses"]) for own in results["learning"]]
    return (
        losses,
        [{k: t.tolist() for k, t in own.items()} for own in blocks],
        results["perplexity"]["words"]["quantized"],
    )


@pytest.mark.parametrize("method", ["affinequant", *long("omniquant")])
def test_processes_that_learn_take_the_steps_of_one(method, model_dir, text, tmp_path):
    """Gradients, losses and ranges of inputs are those of all windows: two processes with two windows a step each."""
    learning = asked(method, epochs=2, batch=4, lwc_lr=0.05)
    request = learned_config(model_dir("qwen2"), text, tmp_path, learner=method, learning=learning, nsamples=8)
    one, two = (replace(request, run_dir=tmp_path / str(n)) for n in (1, 2))
    losses, parameters, perplexity = learned(one)
    for own_losses, own_parameters, own_perplexity in together(2, learned, two, directory=tmp_path):
        assert own_losses[0] == pytest.approx(losses[0], rel=1e-4)  # of the first block
        assert own_perplexity == pytest.approx(perplexity, rel=1e-2)
        assert own_parameters[0].keys() == parameters[0].keys() and parameters[0]
        for name, values in parameters[0].items():
            ours, theirs = torch.tensor(own_parameters[0][name]), torch.tensor(values)
            assert torch.allclose(ours, theirs, atol=2e-3), (name, (ours - theirs).abs().max())


@pytest.mark.parametrize(
    ("learning", "says"),
    [
        (asked(batch=3), "--batch_size 3 with 128 windows: 2 processes share every step"),
        (asked(batch=6), "a multiple of 2 that divides --nsamples"),
        (asked("abq", batch=2), "--without distribution"),
        (asked(batch=2, together=5), "--whole_model"),
    ],
)
def test_what_cannot_be_learned_together_is_refused(learning, says):
    run = RunConfig(wbits=3, solver="rtn", learner="omniquant", learning=learning)
    check_sharing(replace(run, learning=asked(batch=4)), 2)
    with pytest.raises(InputError, match=re.escape(says)):
        check_sharing(run, 2)


def scored(model, cache):
    """Log-likelihoods of uneven requests, one of them twice, and of one alone, which leaves the other processes nothing."""
    scorer = Scorer(
        load_model(str(model), dtype=torch.float32, cache_dir=cache), {FULL: UNCHANGED}, CPU, 2, "cpu", cache
    )
    keys = [(tuple(range(1, 4 + 5 * i)), 1 + i % 3) for i in range(7)]
    return [scorer.scores(FULL, [*keys, keys[2]]), scorer.scores(FULL, [((5, 6, 7), 2)])]


def test_requests_of_tasks_are_shared(model_dir, tmp_path):
    expected = scored(model_dir("llama"), tmp_path)
    for own in together(3, scored, model_dir("llama"), tmp_path, directory=tmp_path):
        for mine, theirs in zip(own, expected, strict=True):
            assert [likely for _, likely in mine] == [likely for _, likely in theirs]
            assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], rel=1e-6)


def command_with_other_text(rank, *words):
    """model_quantizer.py, and one process reads another text under the same name."""
    if ranks.asked() and int(os.environ["RANK"]) == rank:
        read = inputs.calibration_tokens
        inputs.calibration_tokens = lambda *given, **more: read(*given, **{**more, "seed": 5})
    return command(*words)


def test_processes_with_other_files_are_named(flags, tmp_path):
    crew = Crew(2, command_with_other_text, 1, *flags, directory=tmp_path)
    assert set(crew.wait()) <= {BAD_INPUT, FAILED}
    assert re.match("error: process [01] of the job has another calibration", only_line(crew))
    assert not (tmp_path / "run").exists()


def evaluate(*words):
    """The exit code of python -m quant evaluate with these flags."""
    return run_command(["evaluate", *map(str, words)])


def test_a_checkpoint_is_evaluated_together(model_dir, text, tmp_path):
    flags = ["--model", model_dir("llama"), "--eval-datasets", text, "--seqlen", 32, "--limit", 5, "--calib-batch", 2,
             "--cache-dir", tmp_path / "cache", "--out"]  # fmt: skip
    assert evaluate(*flags, tmp_path / "one.json") == 0
    assert Crew(2, evaluate, *flags, tmp_path / "two.json", directory=tmp_path).wait() == [0, 0]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["perplexity"]["words"] for n in ("one", "two"))
    assert two["fp"] == pytest.approx(one["fp"], rel=1e-6) and two["windows"] == 5


def test_the_plan_of_several_processes_is_shown(monkeypatch, capsys, tmp_path):
    words = [
        "--model",
        "benchmarks/configs/llama-2-7b",
        "--wbits",
        4,
        "--quantization-method",
        "rtn",
        "--world-size",
        8,
    ]
    code, shown, _ = called(model_quantizer, monkeypatch, capsys, *words, "--dry-run", "--cache-dir", tmp_path)
    strips = 3 * 4096 * 4608 / 2 + sum(512 * 512 * (i + 1) for i in range(21)) + 256 * 11008 + 3 * 4096 + 11008
    assert code == 0 and re.search(rf"bytes sent a block: sums.* {2 * 7 / 8 * 4 * strips / 1e9:.3f} GB", shown), shown
    code, _, said = called(model_quantizer, monkeypatch, capsys, *words)
    assert code == BAD_INPUT and "--world-size 8 is of a plan: give --dry-run" in said
