"""Sweeps: tables, failures, seeds, kill and resume, executors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from quant.core.errors import InputError
from scripts import sweep

ROOT = Path(__file__).parents[1]


@pytest.fixture
def table(model_dir, text, tmp_path) -> Path:
    """Two models, two methods, two seeds, and a row that fails."""
    content = {
        "fixed": {"dataset": str(text), "eval-datasets": str(text), "seqlen": 32, "nsamples": 4, "limit": 4, "num-iter": 2,
                  "wbits": 3, "cache-dir": str(tmp_path / "cache")},
        "grid": {"model": [str(model_dir("llama")), str(model_dir("opt"))], "quantization-method": ["rtn", "gptq"], "seed": [0, 1]},
        "rows": [{"model": str(model_dir("opt")), "quantization-method": "gptq", "group-size": 7}],
    }  # fmt: skip
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def command(table: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "scripts/sweep.py", str(table), "--out", str(out), *more]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_grid_expands_to_its_product(table):
    rows = sweep.read_table(table)
    assert len(rows) == 9 and all(row["command"] == "model_quantizer.py" for row in rows)
    assert [(r["quantization-method"], r["seed"]) for r in rows[:4]] == [
        ("rtn", "0"),
        ("rtn", "1"),
        ("gptq", "0"),
        ("gptq", "1"),
    ]
    demo = sweep.read_table(ROOT / "scripts" / "sweeps" / "demo.yaml")
    assert len(demo) == 150
    cells = sweep.cells_of(demo, Path("x"), Path("demo.yaml"))
    assert len({sweep.session_key(cell.config) for cell in cells}) == 5, "one evaluation a model"
    assert len({cell.label for cell in cells}) == 75
    assert sum(cell.config.options.get("outlier", 0) == 0.01 for cell in cells) == 30
    assert all(cell.config.true_sequential for cell in cells)


def test_rows_failures_seeds_and_one_evaluation(table, tmp_path):
    out = tmp_path / "out"
    done = run(*command(table, out))
    assert done.returncode == 1 and "1 of 9 rows failed" in done.stderr and "Traceback" not in done.stderr
    found = json.loads((out / "sweep.json").read_text())
    assert [row["status"] for row in found["rows"]] == ["done"] * 8 + ["failed"]
    assert "does not divide" in found["rows"][-1]["message"]
    for line in found["summary"][:4]:
        values = [
            json.loads((ROOT / r["run_dir"] / "results.json").read_text())["mean_relative_error"]
            for r in found["rows"]
            if r["flags"]["quantization-method"] in line["row"] and Path(r["flags"]["model"]).name in line["row"].split()
            and r["status"] == "done"
        ]  # fmt: skip
        average, spread = line["figures"]["error"]
        assert line["seeds"] == 2 and average == pytest.approx(sum(values) / 2)
        assert spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    again = run(*command(table, out))
    assert (out / "sweep.json").read_text() == json.dumps(found, indent=2) + "\n" and again.returncode == 1
    assert "| seeds |" in (out / "sweep.md").read_text()


def test_killed_in_the_middle_and_continued(table, tmp_path):
    run(*command(table, tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole" / "sweep.json").read_text())
    for at in (2, 6):
        out = tmp_path / f"killed-{at}"
        process = subprocess.Popen(command(table, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while len(list(out.glob("rows/*/blocks/*.safetensors"))) < 3 * at and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "sweep.json").exists()
        run(*command(table, out))
        assert json.loads((out / "sweep.json").read_text())["summary"] == whole["summary"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.tsv", "model\twbits\nx\t3\t4\n", "t.tsv, line 2, column 3: more cells"),
        ("t.tsv", "model\t\tseed\nx\t3\t4\n", "t.tsv, line 1, column 2: a column without a name"),
        ("t.tsv", "# nothing\n\n", "needs a header"),
        ("t.yaml", "grid:\n  model: [a, b\nfixed: 3\n", "t.yaml, line 3, column"),
        ("t.yaml", "models: [a]\n", "expected the entries command, fixed, grid or rows"),
        ("t.csv", "a", "a .tsv or a .yaml"),
        ("t.tsv", "model\twbits\nx\tthree\n", "row 1: argument --wbits: invalid int value"),
        ("t.tsv", "model\twbitz\nx\t3\n", "row 1: unknown argument --wbitz"),
        ("t.tsv", "model\twbits\teval-datasets\tdataset\nx\t11\tdemo\tdemo\n", "row 1: --wbits 11"),
        ("t.tsv", "model\tquantization-method\twbits\nx\trtn,gptq\t3\n", "a row of a sweep has one method"),
        ("t.tsv", "command\tmodel\nrm\tx\n", "command 'rm'; use model_quantizer.py or main.py"),
        (
            "t.tsv",
            "model\twbits\teval-datasets\tdataset\nx\t3\tdemo\tdemo\nx\t3\tdemo\tdemo\n",
            "row 2: stands there twice",
        ),
    ],
)
def test_malformed_tables_say_where(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        sweep.cells_of(sweep.read_table(tmp_path / name), tmp_path, tmp_path / name)
    assert says in str(error.value)


def test_a_model_that_is_not_there_fails_its_rows_only(table, tmp_path, text):
    content = yaml.safe_load(table.read_text())
    content["grid"]["model"] = ["./nothing", content["grid"]["model"][0]]
    del content["rows"]
    table.write_text(yaml.safe_dump(content, sort_keys=False))
    done = run(*command(table, tmp_path / "out"))
    assert done.returncode == 1
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
    assert [r["status"] for r in rows] == ["failed"] * 4 + ["done"] * 4
    assert "no such model directory" in rows[0]["message"]


def test_slurm_prints_an_array_and_a_task_runs_one_model(table, tmp_path):
    printed = run(*command(table, tmp_path / "out", "--executor", "slurm", "--gpus", "1"))
    assert printed.returncode == 0 and "--array=0-1" in printed.stdout and "--only-group" in printed.stdout
    one = run(*command(table, tmp_path / "out", "--only-group", "0"))
    assert one.returncode == 0
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]) == 4


def test_learned_rows(model_dir, text, tmp_path):
    path = tmp_path / "t.yaml"
    fixed = {"calib_dataset": str(text), "eval-datasets": str(text), "eval_ppl": True, "seqlen": 32, "nsamples": 4, "limit": 4,
             "model": str(model_dir("llama")), "lwc": True, "epochs": 1, "cache-dir": str(tmp_path / "cache")}  # fmt: skip
    path.write_text(
        yaml.safe_dump(
            {"command": "main.py", "fixed": fixed, "grid": {"wbits": [3, 4], "solver": ["rtn", "gptq"]}},
            sort_keys=False,
        )
    )
    done = run(*command(path, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [line["row"] for line in found["summary"]] == ["llama wbits=3 solver=rtn", "llama wbits=3 solver=gptq",
                                                         "llama wbits=4 solver=rtn", "llama wbits=4 solver=gptq"]  # fmt: skip


def test_ray_spreads_models_over_workers(table, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed (requirements-ray.txt)")
    done = run(*command(table, tmp_path / "out", "--executor", "ray"))
    assert done.returncode == 1, done.stderr
    run(*command(table, tmp_path / "local"))
    a, b = (json.loads((tmp_path / d / "sweep.json").read_text())["summary"] for d in ("out", "local"))
    assert a == b
