"""Sweeps: tables, failures, seeds, kill and resume, executors."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from quant.blocks.stream import BlockStream
from quant.cli.errors import exit_code_of
from quant.core.errors import InputError
from quant.run import scoring
from scripts import sweep, sweep_board, sweep_cells, sweep_table
from tests.helpers import config_for, replace

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table(model_dir, text, tmp_path_factory) -> Path:
    """Two models, two methods, two seeds, and a row that fails."""
    base = tmp_path_factory.mktemp("sweep")
    content = {
        "fixed": {"dataset": str(text), "eval-datasets": str(text), "seqlen": 32, "nsamples": 4, "limit": 4, "num-iter": 2,
                  "wbits": 3},
        "grid": {"model": [str(model_dir("llama")), str(model_dir("opt"))], "quantization-method": ["rtn", "gptq"], "seed": [0, 1]},
        "rows": [{"model": str(model_dir("opt")), "quantization-method": "gptq", "group-size": 7}],
    }  # fmt: skip
    path = base / "table.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def command(*words: object, allowed: tuple[str, ...] = ("--allow-paths",)) -> tuple[int, str, str]:
    """scripts/sweep.py in this process: (exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    cache = Path(str(words[0])).parent / "cache"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["sweep.py", *map(str, words), f"--flags=--cache-dir {cache}", *allowed])
        patch.chdir(ROOT)
        code = exit_code_of(sweep.main)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def whole(table) -> tuple[Path, tuple[int, str, str]]:
    """The table's sweep, run once without a break: its directory, and what the command said."""
    out = table.parent / "whole"
    return out, command(table, "--out", out)


def summary(out: Path) -> list[dict]:
    return json.loads((out / "sweep.json").read_text())["summary"]


def test_a_grid_expands_to_its_product(table):
    rows = [row.flags for row in sweep_table.read_table(table)]
    assert len(rows) == 9 and all(row["command"] == "model_quantizer.py" for row in rows)
    assert [(r["quantization-method"], r["seed"]) for r in rows[:4]] == [
        ("rtn", "0"),
        ("rtn", "1"),
        ("gptq", "0"),
        ("gptq", "1"),
    ]
    demo = sweep_table.read_table(ROOT / "scripts" / "sweeps" / "demo.yaml")
    assert len(demo) == 150
    cells = sweep_cells.cells_of(demo, Path("x"))
    assert len({cell.request.session for cell in cells}) == 5, "one evaluation a model"
    assert len({cell.label for cell in cells}) == 75
    assert len({cell.request.output.run_dir for cell in cells}) == 150
    assert sum(cell.request.run.options.get("outlier", 0) == 0.01 for cell in cells) == 30
    assert all(cell.request.run.true_sequential for cell in cells)


def test_a_grid_may_be_several(tmp_path):
    table = tmp_path / "t.yaml"
    table.write_text("grid:\n- {model: &m [a, b], wbits: [3, 4]}\n- {model: *m, wbits: 2}\n")
    rows = [(row.flags["model"], row.flags["wbits"]) for row in sweep_table.read_table(table)]
    assert rows == [("a", "3"), ("a", "4"), ("b", "3"), ("b", "4"), ("a", "2"), ("b", "2")]


@pytest.mark.parametrize("table", sorted((ROOT / "scripts" / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_rows_of_the_results_parse(table, tmp_path, monkeypatch):
    """Also where the texts are not at hand. All rows of a model share what is opened, and so do all of its learned ones."""
    (tmp_path / "text").mkdir()
    for name in ("wikitext2-valid", "wikitext2-test", "ptb-test", "brown", "lambada"):
        (tmp_path / "text" / f"{name}.txt").touch()
    monkeypatch.chdir(tmp_path)
    rows = sweep_table.read_table(table)
    cells = sweep_cells.cells_of(rows, tmp_path)
    models = {cell.request.session.model for cell in cells}
    assert models == {row.flags["model"] for row in rows} and len(cells) == len(rows)
    assert len(sweep_cells.groups_of(cells, None)) <= 2 * len(models)


def test_rows_of_the_papers_are_a_sweep():
    """Every line of papers.tsv becomes commands that parse; patterns choose, seeds multiply, further flags are added."""
    papers = ROOT / "scripts" / "papers.tsv"
    lines = [line.split("\t") for line in papers.read_text().splitlines() if not line.startswith("#")][1:]
    rows = sweep_table.read_table(papers)
    assert len(rows) == sum(len(line[2].split(",")) for line in lines)
    assert len(sweep_cells.cells_of(rows, Path("x"))) == len(rows)
    rows = sweep_table.read_table(papers, {"paper": "omniquant", "family": "llama*", "size": "7b", "setting": "W4A4"})
    rows = sweep_cells.with_more(rows, ["0", "1"], sweep_table.flags_of("--nsamples 16 --limit -1", "--flags"))
    cells = sweep_cells.cells_of(rows, Path("x"))
    assert [(c.request.session.model, c.request.run.seed) for c in cells] == [
        ("huggyllama/llama-7b", 0), ("huggyllama/llama-7b", 1), ("meta-llama/Llama-2-7b-hf", 0), ("meta-llama/Llama-2-7b-hf", 1)
    ]  # fmt: skip
    assert all(c.request.run.nsamples == 16 and (c.request.run.wbits, c.request.run.act.bits) == (4, 4) for c in cells)
    assert [c.label for c in cells[::2]] == ["omniquant W4A4 llama-7b", "omniquant W4A4 Llama-2-7b-hf"]
    (row,) = sweep_table.read_table(
        papers, {"paper": "quantease", "family": "opt", "size": "13b", "setting": "W3"}, Path("/m")
    )
    assert row.flags["model"] == "/m/opt-13b" and row.flags["dataset"] == "c4" and row.flags["wbits"] == "3"
    with pytest.raises(InputError, match="no row has paper 'nobody'"):
        sweep_table.read_table(papers, {"paper": "nobody"})
    code, out, _ = command(papers, "--paper", "abq", "--family", "llama", "--size", "7b", "--dry-run")
    assert code == 0 and out.count("huggyllama/llama-7b") == out.count("task ") == len(out.splitlines()) > 5


def test_rows_of_one_session_share_what_it_opens(model_dir, text, tmp_path):
    config = config_for(model_dir("llama"), text, tmp_path)
    others = {"task_path": Path("t"), "data_dir": Path("d"), "cache_dir": Path("c"), "trust_remote_code": True,
              "activation_store": "disk", "deterministic": True, "limit": 1}  # fmt: skip
    for name, value in others.items():
        assert replace(config, **{name: value}).session != config.session, name
    for name, value in {"wbits": 2, "seed": 5, "solver": "rtn"}.items():
        assert replace(config, **{name: value}).session == config.session, name


def test_full_precision_is_evaluated_once_however_many_rows_are_together(model_dir, text, tmp_path, monkeypatch):
    config = replace(config_for(model_dir("llama"), text, tmp_path, solver="rtn", options={}), nsamples=4, limit=4)
    passed, evaluating, changes = [], [], []
    run, evaluate = BlockStream.run, scoring.score_perplexity

    def counted_run(self, index, *args, **options):
        passed.append(index) if evaluating else None
        return run(self, index, *args, **options)

    def counted_evaluate(inputs, jobs, *args):
        evaluating.append(len(jobs))
        try:
            return evaluate(inputs, jobs, *args)
        finally:
            evaluating.clear()

    monkeypatch.setattr(BlockStream, "run", counted_run)
    monkeypatch.setattr(scoring, "score_perplexity", counted_evaluate)
    by_size = {}
    for together in (1, 3):
        own = [
            sweep_cells.Cell({}, replace(config, wbits=bits, run_dir=tmp_path / f"{together}-{bits}"), str(bits))
            for bits in (2, 3, 4)
        ]
        passed.clear()
        sweep_cells.run_group(own, together, lambda cell: changes.append(cell.status))
        assert len(passed) == 3 * (3 + 1), "three blocks, three rows and full precision once"
        by_size[together] = [{k: c.results[k] for k in ("perplexity", "fidelity")} for c in own]
    assert by_size[1] == by_size[3] and all(f["perplexity"]["words"]["fp"] > 1 for f in by_size[1])
    assert changes[:6] == ["quantized"] * 3 + ["done"] * 3


def test_tasks_of_full_precision_are_scored_once(model_dir, text, tmp_path, local_task, monkeypatch):  # noqa: F811
    config = config_for(
        model_dir("llama"), text, tmp_path, solver="rtn", options={}, tasks=("mine",), task_path=local_task
    )
    config = replace(config, nsamples=4, limit=4, eval_datasets=())
    scored, run_tasks = [], scoring.run_tasks
    monkeypatch.setattr(
        scoring, "run_tasks", lambda scorer, *args: scored.append(len(scorer.variants)) or run_tasks(scorer, *args)
    )
    passes = []
    for together in (1, 2):
        own = [
            sweep_cells.Cell({}, replace(config, wbits=bits, run_dir=tmp_path / f"{together}-{bits}"), str(bits))
            for bits in (2, 3)
        ]
        sweep_cells.run_group(own, together)
        passes.append([cell.results["zero_shot"] for cell in own])
    assert scored == [2, 1, 3] and passes[0] == passes[1]
    assert all(entry["mine"]["difference_ci95"] is not None for entry in passes[0])


def test_the_table_shows_what_waits():
    from rich.console import Console

    cells = [sweep_cells.Cell({"seed": "7"}, None, name, status) for name, status in
             (("one", "failed"), ("two", "quantized"), ("three", "waiting"))]  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(sweep_board.Board(cells, console)._table())
    shown = console.export_text()
    assert "0 done, 1 failed, 1 quantized, 1 waiting of 3 rows" in shown
    assert all(f"{cell.label}" in shown and cell.status in shown for cell in cells)


def test_progress_says_which_row_is_at_work_and_how_far(monkeypatch):
    """A line for every row that is quantized, counted among those that are, and in between the stage that is going on."""
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    cells = [sweep_cells.Cell({"seed": "7"}, None, name) for name in ("one", "two")]
    board = sweep_board.Board(cells, console)
    progress = board.watch("row 1 of 2, one")
    progress("quantize", 1, 4, "")
    assert board.stage == "row 1 of 2, one: quantize 1 of 4" and console.export_text() == "", "nothing for short stages"
    monkeypatch.setattr(sweep_board, "EVERY", 0.0)
    progress("quantize", 2, 4, "")
    for cell in cells:
        cell.status = sweep_cells.QUANTIZED
        board.moved(cell)
        if cell is cells[0]:
            assert "1 of 2 quantized: one" in console.export_text(clear=False)
    cells[0].status, cells[0].message = sweep_cells.FAILED, "why"
    board.moved(cells[0])
    lines = console.export_text().splitlines()
    assert lines[0].startswith("row 1 of 2, one: quantize 2 of 4, about ") and lines[0].endswith(" left")
    assert lines[2].startswith("2 of 2 quantized: two") and lines[3].startswith("1 of 2 failed: one")


def test_rows_failures_seeds_and_one_evaluation(table, whole):
    out, (code, said, err) = whole
    assert code == 1 and "1 of 9 rows failed" in err and "Traceback" not in err
    assert (
        "0 of 9 quantized" not in said
        and "2 of 9 quantized: llama" in said
        and f"report: {out / 'report.html'}" in said
    )
    summary = json.loads((out / "sweep.json").read_text())
    assert [row["status"] for row in summary["rows"]] == ["done"] * 8 + ["failed"]
    assert "does not divide" in summary["rows"][-1]["message"]
    for line in summary["summary"][:4]:
        values = [
            json.loads((ROOT / r["run_dir"] / "results.json").read_text())["mean_relative_error"]
            for r in summary["rows"]
            if r["flags"]["quantization-method"] in line["row"] and Path(r["flags"]["model"]).name in line["row"].split()
            and r["status"] == "done"
        ]  # fmt: skip
        average, spread = line["figures"]["error"]
        assert line["seeds"] == 2 and average == pytest.approx(sum(values) / 2)
        assert spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert command(table, "--out", out)[0] == 1
    assert (out / "sweep.json").read_text() == json.dumps(summary, indent=2) + "\n"
    assert "| seeds |" in (out / "sweep.md").read_text()


def _sweep(words: list[str]) -> None:
    command(*words)


def test_killed_in_the_middle_and_continued(table, whole, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.sweep", "model_quantizer", "quant.solvers.quantease"])
    for at in (2, 6):
        out = tmp_path / f"killed-{at}"
        process = context.Process(target=_sweep, args=([str(table), "--out", str(out)],))
        process.start()
        until = time.monotonic() + 120
        while len(list(out.glob("rows/*/blocks/*.safetensors"))) < 3 * at and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (out / "sweep.json").exists()
        command(table, "--out", out)
        assert summary(out) == summary(whole[0])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.tsv", "model\twbits\nx\t3\t4\n", "t.tsv, line 2, column 3: more cells"),
        ("t.tsv", "model\t\tseed\nx\t3\t4\n", "t.tsv, line 1, column 2: a column without a name"),
        ("t.tsv", "# nothing\n\n", "needs a header"),
        ("t.yaml", "grid:\n  model: [a, b\nfixed: 3\n", "t.yaml, line 3, column"),
        (
            "t.yaml",
            "models: [a]\n",
            "t.yaml, line 1, column 1: expected the entries command, fixed, grid or rows, not 'models'",
        ),
        ("t.yaml", "fixed: 3\n", "t.yaml, line 1, column 8: fixed is a set of names and values"),
        ("t.yaml", "grid: [a]\n", "t.yaml, line 1, column 7: grid is a set"),
        ("t.yaml", "rows: {a: 1}\n", "t.yaml, line 1, column 7: rows is a list"),
        ("t.yaml", "rows:\n", "t.yaml, line 1, column 6: rows is a list"),
        ("t.yaml", "rows: [a]\n", "t.yaml, line 1, column 8: a row is a set"),
        ("t.yaml", "rows: []\n", "t.yaml: no rows"),
        ("t.yaml", "", "t.yaml: no rows"),
        ("t.yaml", "fixed: {wbits: 3}\n", "t.yaml: no rows"),
        ("t.yaml", "grid: {}\n", "t.yaml: no rows"),
        ("t.yaml", "- a\n", "t.yaml, line 1, column 1: a table is a set"),
        ("t.yaml", "grid:\n  model: []\n", "t.yaml, line 2, column 3: the list of model is empty"),
        ("t.yaml", "rows:\n- {model: [x]}\n", "t.yaml, line 2, column 11: model needs one value"),
        ("t.yaml", "rows:\n- {model: x, model: y}\n", "t.yaml, line 2, column 14: stands there twice"),
        (
            "t.yaml",
            "rows:\n- {seed: 2020-13-45}\n",
            "t.yaml, line 2, column 10: argument --seed: invalid int value: '2020-13-45'",
        ),
        (
            "t.yaml",
            "rows:\n- {seed: !!int abc}\n",
            "t.yaml, line 2, column 10: seed is no int that a flag can have: 'abc'",
        ),
        ("t.yaml", "rows:\n- {seed: !!int ''}\n", "t.yaml, line 2, column 10: seed is no int"),
        ("t.yaml", "rows:\n- {seed: !!float x}\n", "t.yaml, line 2, column 10: seed is no float"),
        ("t.yaml", "rows:\n- {seed: !!bool x}\n", "t.yaml, line 2, column 10: seed is no bool"),
        (
            "t.yaml",
            "rows:\n- {seed: !!timestamp x}\n",
            "t.yaml, line 2, column 10: argument --seed: invalid int value: 'x'",
        ),
        ("t.yaml", "rows:\n- {seed: !foo 3}\n", "t.yaml, line 2, column 10: seed is no !foo"),
        (
            "t.yaml",
            "rows:\n- {seed: !!python/name:os.system x}\n",
            "t.yaml, line 2, column 10: seed is no python/name:os.system",
        ),
        ("t.yaml", f"rows:\n- {{seed: {'9' * 5000}}}\n", "t.yaml, line 2, column 10: seed is no int"),
        ("t.yaml", "rows:\n- {seed: ~}\n", "t.yaml, line 2, column 10: seed needs one value"),
        ("t.yaml", 'rows:\n- {model: "\\udcff"}\n', "t.yaml, line 2, column 11: '--model=\\udcff' is not UTF-8 text"),
        ("t.yaml", "rows:\n- &a [*a]\n", "t.yaml, line 2, column 3: a row is a set"),
        ("t.yaml", "rows: " + "[" * 5000 + "]" * 5000, "t.yaml: lists and sets are nested too deeply"),
        (
            "t.yaml",
            "grid: {" + ", ".join(f"a{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]" for i in range(20)) + "}",
            "with a5 the grid has 1000000 rows; use 100000 or fewer",
        ),
        (
            "t.yaml",
            "grid:\n  model: [x]\n  wbits: [3, many]\n",
            "t.yaml, line 3, column 14: argument --wbits: invalid int",
        ),
        ("t.yaml", "rows:\n- model: x\n  wbits: 11\n", "t.yaml, line 3, column 10: --wbits 11"),
        ("t.yaml", "command: 3\nrows: [{model: x}]\n", "t.yaml, line 1, column 1: command '3'"),
        ("t.yaml", b"rows:\n- {model: \xff}\n", "t.yaml, line 2: not UTF-8"),
        ("t.tsv", b"model\twbits\n\xff\t3\n", "t.tsv, line 2: not UTF-8"),
        ("t.tsv", 'model\twbits\n"x\t3\n', "t.tsv, line 2: unexpected end of data"),
        ("t.tsv", "model\tmodel\nx\ty\n", "t.tsv, line 1, column 2: a second column 'model'"),
        ("t.tsv", "model\tflags\nx\t3 --wbits 3\n", "t.tsv, line 2, column 2: '3' belongs to no flag"),
        ("t.tsv", "model\tflags\nx\t--wbits 3 --nsamples 0\n", "t.tsv, line 2, column 2: --nsamples 0"),
        ("t.csv", "a", "a .tsv or a .yaml"),
        ("t.tsv", "model\twbits\nx\tthree\n", "t.tsv, line 2, column 2: argument --wbits: invalid int value"),
        ("t.tsv", "model\twbitz\nx\t3\n", "t.tsv, line 2, column 2: unknown argument --wbitz"),
        ("t.tsv", "model\twbits\teval-datasets\tdataset\nx\t11\tdemo\tdemo\n", "t.tsv, line 2, column 2: --wbits 11"),
        (
            "t.tsv",
            "model\tquantization-method\twbits\nx\trtn,gptq\t3\n",
            "t.tsv, line 2, column 2: --quantization-method: a row of a sweep has one method",
        ),
        (
            "t.tsv",
            "command\tmodel\nrm\tx\n",
            "t.tsv, line 2, column 1: command 'rm'; use model_quantizer.py or main.py",
        ),
        (
            "t.tsv",
            "model\twbits\teval-datasets\tdataset\nx\t3\tdemo\tdemo\nx\t3\tdemo\tdemo\n",
            "t.tsv, line 3: stands there twice, first as",
        ),
    ],
)
def test_malformed_tables_say_where(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        sweep_cells.cells_of(sweep_table.read_table(tmp_path / name), tmp_path)
    assert says in str(error.value)


def test_a_model_that_is_not_there_fails_its_rows_only(table, tmp_path):
    content = yaml.safe_load(table.read_text())
    content["grid"] |= {"model": ["./nothing", content["grid"]["model"][0]], "seed": [0]}
    del content["rows"]
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert command(tmp_path / "t.yaml", "--out", tmp_path / "out")[0] == 1
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    assert [r["status"] for r in rows] == ["failed"] * 2 + ["done"] * 2
    assert "no such model directory" in rows[0]["message"]


def test_slurm_prints_an_array_and_a_task_runs_its_rows(table, tmp_path):
    code, out, _ = command(table, "--out", tmp_path / "out", "--executor", "slurm", "--gpus", "1")
    assert code == 0 and "--array=0-1\n" in out and "--gres=gpu:1\n" in out and "--cpus-per-task=1\n" in out
    split = ("--rows-per-task", "3")
    code, out, _ = command(table, "--out", tmp_path / "out", "--executor", "slurm", *split, "--seeds", "")
    assert code == 0 and "--array=0-3\n" in out and "--rows-per-task=3 --allow-paths --only-group" in out
    assert command(table, "--executor", "slurm", "--gpus", "0.5")[0] == 2
    assert command(table, "--out", tmp_path / "out", *split, "--only-group", 0)[0] == 0
    rows = json.loads((tmp_path / "out" / "sweep-task0.json").read_text())["rows"]
    assert [(r["flags"]["quantization-method"], r["flags"]["seed"]) for r in rows] == [
        ("rtn", "0"),
        ("rtn", "1"),
        ("gptq", "0"),
    ]
    code, _, err = command(table, *split, "--only-group", 4)
    assert code == 2 and "there are 4 tasks" in err


def test_learned_rows(model_dir, text, tmp_path):
    path = tmp_path / "t.yaml"
    fixed = {"calib_dataset": str(text), "eval-datasets": str(text), "eval_ppl": True, "seqlen": 32, "nsamples": 4, "limit": 4,
             "model": str(model_dir("llama")), "lwc": True, "epochs": 1}  # fmt: skip
    grid = {"wbits": [3, 4], "solver": ["rtn", "gptq"]}
    path.write_text(yaml.safe_dump({"command": "main.py", "fixed": fixed, "grid": grid}, sort_keys=False))
    code, _, err = command(path, "--out", tmp_path / "out")
    assert code == 0, err
    assert [line["row"] for line in summary(tmp_path / "out")] == [
        "llama wbits=3 solver=rtn", "llama wbits=3 solver=gptq", "llama wbits=4 solver=rtn", "llama wbits=4 solver=gptq"
    ]  # fmt: skip


def test_ray_spreads_rows_over_workers(table, whole, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed (requirements-ray.txt)")
    code, _, err = command(table, "--out", tmp_path / "out", "--executor", "ray", "--rows-per-task", 2)
    assert code == 1, err
    assert summary(tmp_path / "out") == summary(whole[0])
