"""The benchmarks compute what they say they compute."""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import clock, end_to_end, floors, loaders, measuring, runtimes, sharing, solver_shapes, tables, training
from benchmarks.loaders import Case
from benchmarks.solvers import column_loop, measure, problem
from quant.blocks.fake_quant import ActSpec
from quant.blocks.stream import BlockStream
from quant.core.grid import fit_grid
from quant.core.types import QuantSpec
from quant.export.formats import Content
from quant.export.runtimes import objections
from quant.kernels import columns as blocks
from quant.kernels.columns import TorchKernels
from quant.solvers.quantease import is_rounding_sweep
from tests.helpers import config_for, perform_all, replace
from tests.references import inputs, make_stats, naive_coordinate_descent, weights


def test_the_published_loop_is_the_same_descent():
    weight, gram = weights(6, 40).double(), make_stats(inputs(40, 200)).gram.double()
    grid, schedule = fit_grid(weight.float(), QuantSpec(3)), [is_rounding_sweep(k, 7) for k in range(7)]
    codes = naive_coordinate_descent(weight, gram, grid, torch.arange(40), schedule)
    answer = column_loop(weight, gram, grid, schedule)
    torch.testing.assert_close(answer.float(), grid.dequantize(codes), rtol=1e-5, atol=1e-6)


def test_rows_of_one_shape(monkeypatch):
    monkeypatch.setattr(blocks, "_chosen", {})
    args = argparse.Namespace(device="cpu", sweeps=4, precision="highest", float64=True)
    rows = [list(record.values()) for record in measure(8, 32, args, [TorchKernels()])]
    assert [row[1:3] for row in rows] == [
        ["gram", "torch"], ["quantease", "column loop"], ["gptq", "torch"], ["quantease", "torch"],
        ["objective after 4 sweeps", "column loop"], ["objective after 4 sweeps", "torch"],
        ["objective after 4 sweeps", "column loop, float64"], ["objective after 4 sweeps", "torch, float64"],
    ]  # fmt: skip
    ends = [float(row[3]) for row in rows[-4:]]
    assert ends[0] > 0 and ends[1] == pytest.approx(ends[0], rel=1e-4) and ends[3] == pytest.approx(ends[2], rel=1e-7)
    weight, x = problem(8, 32, "cpu")
    assert weight.shape == (8, 32) and x.shape == (64, 32)


def test_solvers_at_shapes_are_held_against_the_products_that_they_declare(monkeypatch):
    monkeypatch.setattr(solver_shapes, "RATE_SIZE", 8)
    monkeypatch.setattr(solver_shapes, "best_seconds", lambda work, device, repeats=3: (work(), 0.01)[1])
    args = argparse.Namespace(
        device="cpu", shapes=["32x256"], groups=[-1, 64], methods=["gptq", "quantease"], wbits=3, sweeps=2
    )
    rows = list(solver_shapes.records(args))
    assert [(row["group"], row["method"]) for row in rows] == [
        ("row", "gptq"), ("row", "quantease"), ("64", "gptq"), ("64", "quantease")
    ]  # fmt: skip
    rate = 2 * 8**3 / 0.01  # flop/s, of a product that took as long as everything does here
    for row, flops in zip(rows, 2 * [256**3 / 3 + 32 * 256**2, 2 * 2 * 32 * 256**2], strict=True):
        assert row["products, s"] == f"{flops / rate:.1f}" and row["times"] == f"{0.01 / (flops / rate):.2f}"


def test_more_processes_take_less_and_send_more():
    by_model = {}
    for row in sharing.rows():
        by_model.setdefault(row["model"], []).append(row)
    assert len(by_model) == 3
    for one, eight, many in by_model.values():
        work = [float(row["s a block: work"]) for row in (one, eight, many)]
        assert work[0] > work[1] > work[2] > 0
        assert (
            float(one["GB sent a block: sums"])
            == 0
            < float(eight["GB sent a block: sums"])
            < float(many["GB sent a block: sums"])
        )


def test_products_of_a_step_are_counted():
    a, b = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    assert training.flops_of(lambda: a @ b) == 2 * 3 * 5 * 7
    assert training.flops_of(lambda: (a @ b).sum().backward()) == 2 * 2 * 3 * 5 * 7  # of b no gradient is asked


def test_tables_of_a_sweep(model_dir, text, tmp_path):
    """What sets rows of a method apart is its label; every number of the tables is one of the runs'."""
    base = replace(config_for(model_dir("llama"), text, tmp_path), nsamples=4, limit=4)
    variants = [("rtn", 3, {}), ("gptq", 3, {}), ("gptq", 3, {"percdamp": 0.1}), ("rtn", 2, {})]
    configs = [
        replace(base, solver=method, wbits=bits, options=options, run_dir=tmp_path / f"{method}{bits}{len(options)}")
        for method, bits, options in variants
    ]
    perform_all(configs)
    rows = []
    for c in configs:
        flags = {"model": "m", "quantization-method": c.run.method, "wbits": str(c.run.wbits), "nsamples": "4"}
        flags |= {name: str(value) for name, value in c.run.options.items()}
        rows.append({"flags": flags, "status": "done", "run_dir": str(c.output.run_dir)})
    rows.append({"flags": {"model": "m"}, "status": "failed", "run_dir": "nowhere"})
    (tmp_path / "sweep.json").write_text(json.dumps({"table": "t.yaml", "rows": rows}))
    lines = tables.sweep_lines(tmp_path)
    labels = ["rtn", "gptq", "gptq --percdamp 0.1", "rtn"]
    own = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| llama")]
    assert [cells[2] for cells in own] == labels * 3, "quality, linears, seconds"
    for row, cells in zip(rows[:4], own[:4], strict=True):
        results = json.loads((Path(row["run_dir"]) / "results.json").read_text())
        scores = results["perplexity"]["words"]
        assert cells[1] == f"W{results['wbits']}A16" and cells[3] == f"{results['bits_per_weight']:.3f}"
        assert cells[5:7] == [f"{scores['fp']:.3f}", f"{scores['quantized']:.3f}"]
        assert cells[9] == f"{results['mean_relative_error']:.5f}"
    assert own[4][4:] == ["0 of 21", "0 of 21"] and own[5][4] == "21 of 21" and own[7][4:] == ["0 of 21", "-"]
    assert "every row: `--model m --nsamples 4`" in lines[2] and "seed 0" in lines[2] and "torch 2" in lines[2]


def test_tables_of_compared_layers(tmp_path):
    for variant, errors in (("minmax", (0.2, 0.4)), ("mse", (0.1, 0.5))):
        place = tmp_path / "m" / "w3" / variant
        place.mkdir(parents=True)
        records = [
            {"block": 0, "name": n, "method": "gptq", "bits": 3, "relative_error": e}
            for n, e in zip("qk", errors, strict=True)
        ]
        (place / "layers.json").write_text(json.dumps(records))
    lines = tables.layer_lines(tmp_path, "calibration x")
    assert "calibration x" in lines[2] and "## m, 3 bits" in lines
    assert lines[-7:-1] == [
        "|---|---|---|---|", "| 0 | q | 0.20000 | 0.10000 |", "| 0 | k | 0.40000 | 0.50000 |", "|  | mean | 0.30000 | 0.30000 |",
        "|  | below gptq minmax | 0 of 2 | 1 of 2 |", "|  | below gptq mse | 1 of 2 | 0 of 2 |",
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a process's peak")
def test_a_peak_is_of_what_ran_since():
    """In a process of its own: in one that has run other tests the peak may be theirs."""
    script = """
import torch
from quant.core import env
device = torch.device("cpu")
large = torch.ones(75_000_000)
before = env.peak_bytes(device)["host"]
del large
env.reset_peak(device)
after = env.peak_bytes(device)
assert after["device"] == 0
print(before - after["host"])
"""
    root = Path(__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert int(answer.stdout) > 150_000_000


@pytest.mark.parametrize("whole", [3, 4])
def test_a_model_that_was_cut_passes_its_last_block_too(whole, model_dir, tmp_path, monkeypatch):
    passed, run = [], BlockStream.run
    monkeypatch.setattr(
        BlockStream, "run", lambda self, index, *a, **k: (k.get("advance") and passed.append(index), run(self, index, *a, **k))
    )  # fmt: skip
    args = argparse.Namespace(
        device="cpu", dtype="auto", nsamples=4, seqlen=16, calib_batch=2, activation_store="cpu", sweeps=2, wbits=3,
        true_sequential=False,
    )  # fmt: skip
    answer = end_to_end.quantize(model_dir("llama"), "quantease", args, whole)
    assert passed == list(range(whole - 1))
    assert 0 < answer["once"] < answer["total"]


def test_what_happens_once_is_not_extrapolated():
    assert end_to_end.all_blocks({"once": 10.0, "total": 13.0}, 2, 80) == 10 + 40 * 3
    assert end_to_end.all_blocks({"once": 10.0, "total": 13.0}, 2, 2) == 13


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
    cases = [
        Case(4, True, "compressed-tensors", "transformers"),
        Case(format="compressed-tensors", how="transformers", act=ActSpec(8), bits=8, symmetric=True, group=-1),
    ]

    def made(family, case, base):
        return replace(case, how=loaders.REFUSED if case.kind in refused else case.how), base / case.name

    monkeypatch.setattr(loaders, "prepare", made)
    monkeypatch.setattr(loaders, "ours", lambda *given: (2.0, None, None))
    monkeypatch.setattr(loaders, "ask", lambda *given: "")
    monkeypatch.setattr(loaders, "compare", lambda *given: {"ours": 2.0, "theirs": 2.0, "logits": 0.0, "said": "same"})
    rows = loaders.of_family("python", family, cases, tmp_path)
    assert sorted(row["said"] for _, row in rows) == sorted(said)
    for _, row in rows:
        dashes = [figure for figure in loaders.outcome(row).values() if figure == "-"]
        assert len(dashes) == (3 if row["said"] in ("refused", "REFUSED") else 0)


def test_refusals_that_the_table_expects_are_those_of_the_rules():
    for family in loaders.FAMILIES:
        for case in loaders.EVERY_FAMILY:
            spec = QuantSpec(case.bits, case.group, case.symmetric)
            content = Content(spec, {"a": (128, 128)}, case.act, model_type=family)
            takes = not objections("transformers", case.format, content) or case.format == "gptq"
            assert takes != (case.kind in loaders.EXPECTED_REFUSED.get(family, ())), (family, case)


@pytest.mark.parametrize("spec", [QuantSpec(4, 32, symmetric=True), QuantSpec(4, -1)], ids=["blocks", "super-blocks"])
def test_inputs_in_bytes_are_rounded_block_by_block(spec):
    """As ggml's quantize_row_q8_0 and quantize_row_q8_K, number by number."""
    inputs = torch.randn(2, 3, 512, dtype=torch.float32)
    inputs[0, 0, :256] = 0.0
    (rounded,) = runtimes._in_bytes(spec, torch.nn.Identity(), (inputs,))
    columns = 32 if spec.group_size == 32 else 256
    for row, given in zip(rounded.view(-1, 512), inputs.view(-1, 512), strict=True):
        for start in range(0, 512, columns):
            part = given[start : start + columns].tolist()
            step = max(map(abs, part)) / 127
            stored = torch.tensor(step).half().item() if columns == 32 else step
            expected = [stored * round(x / step) if step else 0.0 for x in part]
            torch.testing.assert_close(row[start : start + columns], torch.tensor(expected), rtol=1e-5, atol=1e-7)


def test_a_runtime_is_the_same_where_its_probabilities_are(tmp_path):
    """The demo model against answers that are its own, and against some that are not."""
    job = runtimes.prepare("gguf", "llama", QuantSpec(8, 32, symmetric=True), tmp_path)
    prompt = runtimes.prompts()[0]
    tokens = [5, 71, 320]
    right = runtimes.ours(job, [*prompt, *tokens], in_bytes=True)[len(prompt) - 1 : -1]
    wrong = torch.log_softmax(right + torch.linspace(0, 2, right.shape[1]), -1)
    for rows, said in ((right, "same"), (wrong, "DIFFERENT")):
        answers = [{"tokens": tokens, "logprobs": rows.tolist()}]
        Path(f"{job.file}.json").write_text(json.dumps(answers))
        row = runtimes.compare("gguf", job, [prompt], "")
        assert row[""] == said and row["blocks"] == "Q8_0" and row["same tokens"].endswith("of 3")
        divergence = float((right.exp() * (right - rows)).sum(-1).mean())
        assert float(row["KL, inputs of 8 bits"]) == pytest.approx(divergence, rel=0.1, abs=1e-12)
    assert runtimes.compare("gguf", replace(job, file=tmp_path / "none"), [prompt], "no file")[""] == "no file"


def test_every_second_of_a_run_is_in_one_part(model_dir, text, tmp_path, monkeypatch):
    """And every product that the run makes is counted, by what it is of."""
    monkeypatch.setattr(clock, "REPEATS", 1)
    monkeypatch.setattr(clock, "BUDGET", 0.0)
    monkeypatch.setattr(clock, "COPIED", 1 << 16)
    request = replace(config_for(model_dir("llama"), text, tmp_path), nsamples=4, limit=4, solver="gptq", options={})
    forward, started = torch.nn.Linear.forward, time.perf_counter()
    timed = floors.timed_run(request)
    assert sum(timed.seconds.values()) == pytest.approx(time.perf_counter() - started, rel=0.02, abs=0.01)
    assert torch.nn.Linear.forward is forward
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert timed.seconds["calibration", "solving"] == pytest.approx(results["seconds"]["solve"], rel=0.5, abs=0.05)
    tokens = Counter()
    for (stage, part), works in timed.work.items():
        for work, times in works.items():
            tokens[stage, part, work.kind] += times * work.sizes[0] if work.kind in ("linear", "gram") else times
    blocks, windows, length = json.loads((model_dir("llama") / "config.json").read_text())["num_hidden_layers"], 4, 32
    # both forms pass all seven linears of every block once
    assert tokens["evaluation", "linears", "linear"] == 2 * 7 * blocks * windows * length
    assert tokens["evaluation", "head", "linear"] == 2 * windows * length
    assert tokens["calibration", "solving", "cholesky"] == 7 * blocks
    rows = {(row["stage"], row["part"]): row for row in floors.rows(timed)}
    assert float(rows["both", "sum"]["seconds"]) == pytest.approx(
        sum(float(row["seconds"]) for (stage, part), row in rows.items() if stage in floors.STAGES and part != "sum"),
        abs=0.2,
    )
    assert list(floors.rates(timed)) and timed.copied > 0
    perform_all([replace(request, run_dir=tmp_path / "plain")])
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert plain["codes_sha256"] == results["codes_sha256"] and plain["perplexity"] == results["perplexity"]


def test_a_part_takes_the_clock_from_the_one_around_it(monkeypatch):
    now = [0.0]
    own = clock.Clock(torch.device("cpu"))
    own._now, own._since = lambda: now[0], 0.0

    def passes(seconds):
        now[0] += seconds

    inner = own.timed(passes, "inner", lambda *_: [(clock.Work("copy"), 8.0)])
    with own.within("outer", stage="s"):
        passes(1.0)
        inner(2.0)
        with pytest.raises(ZeroDivisionError):
            own.timed(lambda: (passes(4.0), 1 / 0), "failing")()
        own.timed(passes, "elsewhere", inside=["outer"])(8.0)
    passes(16.0)
    own.stop()
    assert own.seconds == {
        ("s", "outer"): 9.0, ("s", "inner"): 2.0, ("s", "failing"): 4.0, ("around", "rest"): 16.0}  # fmt: skip
    assert own.work == {("s", "inner"): {clock.Work("copy"): 8.0}}


STUB = """#!/usr/bin/env bash
cp "$RESULT" "$SEEN/$(ls "$SEEN" | wc -l)" 2>/dev/null
[ "$1" = -c ] && { echo "the machine."; exit; }
echo left > "$TMPDIR/behind"
printf '| model | seconds |\\n|---|---|\\n| of %s | 3.5 |\\n' "$2 $3"
echo "== 7 passed in 1.0s =="
[[ "$*" == *packed* || "$*" == *training* ]] && exit 1 || exit 0
"""


@pytest.mark.parametrize(("which", "stages"), [("kernels", 4), ("runs", 3)])
def test_the_gpu_suite_writes_rows_as_they_come(which, stages, tmp_path):
    """With a stand-in for Python: every stage finds the rows of those before it, one that fails ends nothing, nothing is left."""
    suite, stub, seen, rest = (
        Path("benchmarks/gpu_suite.sh").resolve(),
        tmp_path / "python",
        tmp_path / "seen",
        tmp_path / "rest",
    )
    stub.write_text(STUB)
    stub.chmod(0o755)
    seen.mkdir()
    rest.mkdir()
    out = tmp_path / "gpu.md"
    environment = {**os.environ, "PYTHON": str(stub), "RESULT": str(out), "SEEN": str(seen), "TMPDIR": str(rest)}
    done = subprocess.run([suite, which, out], env=environment, capture_output=True, text=True, check=False)
    rows = out.read_text().splitlines()
    assert done.returncode == 1, "the last stage failed"
    assert rows[:5] == [f"# On a GPU: {which}", "", "the machine.", "", "| stage | what | figures |"]
    assert (
        sum("seconds: 3.5" in row for row in rows) == stages and sum("**done** | " in row for row in rows) == stages - 1
    )
    assert sum("**failed, exit code 1**" in row for row in rows) == 1 and "7 passed in 1.0s" in rows[6]
    lengths = [len((seen / str(number)).read_text().splitlines()) for number in range(stages + 1)]
    assert lengths == [2, *(6 + 2 * number for number in range(stages))], "each stage adds its outcome and its row"
    assert not list(rest.iterdir())


def test_a_call_of_the_gpu_suite_takes_less_than_nine_minutes():
    text = Path("benchmarks/gpu_suite.sh").read_text()
    kernels, runs = text[text.index('if [ "$which" = kernels ]') :].split("\nelse\n")
    for part in (kernels, runs):
        limits = [int(limit) for limit in re.findall(r'stage "[^"]+" (\d+) ', part)]
        assert len(limits) in (3, 4) and sum(limit + 5 for limit in limits) <= 530
    done = subprocess.run(["benchmarks/gpu_suite.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "kernels|runs" in done.stderr


def test_on_cuda_a_graph_of_launches_is_timed_and_not_the_host(monkeypatch):
    """CUDA is not there: what is asked of it, and which time is told."""
    now, ran = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    class Graph:
        def replay(self):
            ran.append("replay")
            now[0] += 0.02 if ran.count("replay") == 3 else 0.05

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Event": Event, "CUDAGraph": Graph, "Stream": lambda device: stream, "current_stream": lambda device: stream,
        "stream": lambda own: nullcontext(), "graph": lambda graph, stream: nullcontext(), "synchronize": lambda device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    took = measuring.kernel_seconds(lambda: ran.append("work"), torch.device("cuda"), budget=0.3)
    assert took == pytest.approx(0.02) and ran == ["work"] * 3 + ["replay"] * 7, "two to warm up, one that is kept"

    def refused(graph, stream):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refused)
    ran.clear()
    measuring.kernel_seconds(lambda: ran.append("work"), torch.device("cuda"), budget=0.0)
    assert ran == ["work"] * (2 + 4)
