"""Reports, comparisons and repetitions of runs that were edited, cut or made by an earlier version: right, or one line."""

from __future__ import annotations

import json
import random
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from quant.cli import repeat as repeat_command
from quant.cli import report as report_command
from quant.core.errors import InputError
from quant.report.runs import open_run
from tests.damage import BAD, entry_paths, with_entry
from tests.helpers import asked, called, config_for, perform

FILES = ("manifest.json", "results.json", "journal.jsonl")
QUIZ = {"metric": "acc", "items": 20, "fp": 0.8, "quantized": 0.5, "stderr": 0.1, "difference": -0.3,
        "difference_ci95": [-0.9, 0.9], "chance": 0.25, "at_chance": False, "others": {"f1": 0.5}}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_dir, text) -> Path:
    """A learned run with the score of a task, and the same run again."""
    base = tmp_path_factory.mktemp("finished")
    config = config_for(model_dir("llama"), text, base, learner="omniquant", solver="rtn", options={}, nsamples=4, limit=4,
                        learning=asked(epochs=1, batch=4))  # fmt: skip
    perform(config)
    results = json.loads((base / "run" / "results.json").read_text())
    (base / "run" / "results.json").write_text(json.dumps(results | {"zero_shot": {"quiz": QUIZ}}))
    shutil.copytree(base / "run", base / "same")
    return base


def contents(path: Path):
    """What a file of a run holds; of the journal, its lines."""
    return [json.loads(line) for line in path.open()] if path.suffix == ".jsonl" else json.loads(path.read_text())


@contextmanager
def damaged(run: Path, name: str, where: tuple, kind: str):
    """A run in which one entry of one file is, for a while, what BAD says."""
    path = run / name
    before = path.read_bytes()
    value = with_entry(contents(path), where, BAD[kind])
    lines = [json.dumps(line) + "\n" for line in value] if path.suffix == ".jsonl" else [json.dumps(value)]
    path.write_text("".join(lines))
    try:
        yield
    finally:
        path.write_bytes(before)


def is_read(run: Path, *damage) -> bool:
    """Whether a damaged run is read; if not, one line says which file and entry."""
    with damaged(run, *damage):
        try:
            open_run(run)
        except InputError as error:
            (line,) = error.args
            assert str(run / damage[0]) in line, (damage, line)
            return False
        return True


def all_damages(run: Path) -> list[tuple[str, tuple, str]]:
    """Every entry of every file of a run with every value of BAD."""
    return [(name, where, kind) for name in FILES for where in entry_paths(contents(run / name)) for kind in BAD]


def drawn(damages: list, number: int) -> list:
    """Some of many damages, the same in every run of the tests."""
    return random.Random(0).sample(sorted(damages, key=repr), number)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def check_page(out: Path) -> None:
    """A whole page beside its tables and pictures; what is not known is a dash there."""
    html = (out / "report.html").read_text()
    assert html.endswith("</html>") and "<pre>" in html
    page = html[: html.index("<pre>")] + html[html.index("</pre>") :]
    assert not re.search(r"\bNone\b|[Uu]ndefined", page)
    assert "None" not in (out / "report.csv").read_text() and (out / "seconds.png").exists()


def check_commands(finished: Path, damage: tuple[str, tuple, str], call, out: Path) -> None:
    """report, compare and repeat of a damaged run: right, or one line that names the file and leaves nothing behind."""
    run = finished / "run"
    with damaged(run, *damage):
        before = tree(finished)
        for module, *words in (
            (report_command, run, "--out", out / "page"),
            (report_command, "compare", finished / "same", run),
            (repeat_command, run, "--allow-paths", "--into", out / "again"),
        ):
            code, shown, err = call(module, *words)
            assert "Traceback" not in err, (damage, words, err)
            if code == 2 and words[0] != "compare":
                assert not (out / "page").exists() and not (out / "again").exists(), (damage, words)
            if code:
                assert code in (1, 2) and all(line.startswith("error: ") for line in err.splitlines()), (
                    damage,
                    words,
                    err,
                )
                assert len(err.splitlines()) == 1 or words[0] == run and module is repeat_command, (damage, words, err)
            elif module is report_command and words[0] == run:
                check_page(out / "page")
            elif module is report_command:
                assert not re.search(r"  None\b(?!\])", shown), (damage, shown)
            shutil.rmtree(out, ignore_errors=True)
        assert tree(finished) == before, damage


@pytest.fixture
def call(finished, monkeypatch, capsys):
    """Run a command; a repetition gives at once what the run gave."""

    class Repeated:
        def __init__(self, request) -> None:
            self.results = contents(finished / "same" / "results.json")
            self.wanted = contents(finished / "same" / "manifest.json")["configuration"]

        def configuration(self, run):
            return self.wanted

        def run(self, run, output):
            shutil.copytree(finished / "same", output.run_dir)
            return self.results

    monkeypatch.setattr("quant.run.repeat.open_session", Repeated)
    return lambda module, *words: called(module, monkeypatch, capsys, *words)


def test_every_entry_is_read_or_named(finished):
    run = finished / "run"
    read = [is_read(run, *damage) for damage in drawn(all_damages(run), 500)]
    assert 100 < sum(read) < 450, "what is not declared may be anything; what is declared may not"


def test_commands_on_damaged_runs(finished, call, tmp_path):
    missing = ("journal.jsonl", (0, "verdict"), "missing")  # of its class in the table
    for damage in [missing, *drawn(all_damages(finished / "run"), 12)]:
        check_commands(finished, damage, call, tmp_path / "out")


def as_written(read, own):
    """What was read without the entries that the file has not and that readers get as None, or as empty."""
    if isinstance(read, dict):
        kept = {key: value for key, value in read.items() if value not in (None, {}) or key in own}
        return {key: as_written(value, own[key]) if key in own else value for key, value in kept.items()}
    if isinstance(read, list):
        return [as_written(value, its) for value, its in zip(read, own, strict=True)]
    return read


def test_a_whole_run_is_read_as_it_is(finished):
    """Nothing changes; what this run has not (`avg_bits`, `online_flops`, held-out errors) is there for readers, as None."""
    run = open_run(finished / "run")
    assert run.results["avg_bits"] is None
    for name, read in zip(FILES, (run.manifest, run.results, run.records), strict=True):
        written = contents(finished / "run" / name)
        assert as_written(read, written) == written, name
