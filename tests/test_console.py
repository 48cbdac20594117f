"""Hostile names in what a terminal gets: tables, titles, progress, errors, warnings; failures of libraries as lines."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.table import Table
from rich.text import Text

import model_quantizer
from quant.cli import evaluate, generate
from quant.cli.console import Console, ProgressBars
from quant.cli.errors import exit_code_of, set_logging
from quant.cli.tables import STAGES, comparison_table, difference_table, linears_table, loadability_table, show_results
from quant.core.errors import InputError, RunError
from quant.core.text import ACTIVE, printable
from scripts import sweep, sweep_board, sweep_cells
from tests.helpers import config_for

HOSTILE = (
    "[red]x[/red]",
    "a[/b]c",
    "[link=file:x]x[/link]",
    ":smile:",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\nerror: forged",
    "a\r\x08b",
    "a\u2028b",
    "\u202egnp.exe",
    "\udcff",
)


def shown(*objects: object, terminal: bool = False, **options: object) -> str:
    """What the console writes, without the styles that it writes itself."""
    console = Console(file=io.StringIO(), width=400, force_terminal=terminal, color_system=None)
    console.print(*objects, **options)
    return console.file.getvalue()


def check(text: str, name: str) -> None:
    """The name is there letter by letter, and nothing that a terminal obeys is."""
    assert printable(name) in text, text
    assert set(ACTIVE.findall(text)) <= {"\n"}, text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_shown_letter_by_letter(name):
    table = Table(name, title=name, caption=name)
    table.add_column(name)
    table.add_row(name, name)
    for output in (
        shown(f"at {name}"),
        shown(f"at {name}", soft_wrap=True),
        shown(Path(name)),
        shown(name, terminal=True),
    ):
        check(output, name)
        assert output.count("\n") == 1
    output = shown(table)
    check(output, name)
    assert output.count(printable(name)) == 6 and output.count("\n") == 7


def test_our_own_lines_and_styles_stay():
    table = Table()
    table.add_column(Text("bits per\nweight"))
    table.add_row("3")
    assert shown(Text("one\ntwo")) == "one\ntwo\n"
    assert shown(table).splitlines()[1].split() == ["┃", "bits", "per", "┃"]


def results(name: str) -> dict:
    """Results of a run whose every name is the given one."""
    task = {"metric": name, "items": 2, "fp": 0.5, "quantized": 0.5, "stderr": 0.1, "difference_ci95": None,
            "chance": 0.25, "at_chance": False}  # fmt: skip
    return {
        "method": name, "bits_per_weight": 3.0, "perplexity": {name: {"fp": 1.0, "quantized": 2.0}}, "zero_shot": {name: task},
        "fidelity": {}, "mean_relative_error": 0.1, "seconds": dict.fromkeys((*STAGES, "total"), 1.0), "run_dir": f"no/{name}", "entropy_bits": None,
        "verdicts": {"ok": 1, "look": 1, "bad": 0}, "peak_bytes": {"host": 1, "device": 0}, "learning": [],
        "wbits": 3, "group_size": -1, "evaluation": {"limit": None}, "options": {},
    }  # fmt: skip


def record(name: str) -> dict:
    return {"block": 0, "name": name, "method": name, "relative_error": 0.1, "relative_error_rtn": 0.2, "verdict": name,
            "bits_per_weight": 3.0, "storage_bits": 3, "shape": [1, 1], "seconds": 1.0}  # fmt: skip


def every_table(name: str, console: Console) -> None:
    """Everything that the command lines print, about things of one name."""
    show_results(name, [results(name)], console, linears=False)
    console.print(comparison_table([record(name)], name))
    console.print(linears_table([record(name)]))
    console.print(difference_table(name, [name, name], [[name, name, 1.0]]))
    console.print(loadability_table(name, [(name, True, name, name)]))
    config = config_for(Path(name), Path("words.txt"), Path("x"))
    for status in (sweep_cells.WAITING, sweep_cells.QUANTIZED, sweep_cells.FAILED):
        cell = sweep_cells.Cell({"seed": name}, config, name, status, message=name)
        board = sweep_board.Board([cell], console)
        console.print(board._table())
        board.live = None
        board.moved(cell)
    progress = ProgressBars(console).for_method(name)
    progress("solve", 1, 2, name)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_all_tables(name):
    console, harmless = (Console(file=io.StringIO(), width=400, color_system=None) for _ in range(2))
    every_table(name, console)
    every_table("x" * len(printable(name)), harmless)
    output, expected = console.file.getvalue(), harmless.file.getvalue()
    check(output, name)
    lines, others = output.splitlines(), expected.splitlines()
    assert [len(line) for line in lines] == [len(line) for line in others], "the tables keep their form"
    assert output.count(printable(name)) == expected.count("x" * len(printable(name)))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_bars_of_a_terminal(name):
    """The bars of a terminal move its cursor; the texts in them are cleaned."""
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    bars = ProgressBars(console)
    bars.for_method(name)("solve", 1, 2, name)
    check(shown(bars.bars.get_renderable()), name)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_makes_no_second_line_of_an_error(name, capsys):
    def refuse() -> None:
        raise InputError(f"no such file: {name}", "another mistake", "another mistake")

    def fall() -> None:
        raise RunError(f"block 0 of {name}")

    def missing() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)

    for main, code, count in ((refuse, 2, 2), (fall, 1, 1), (missing, 1, 1)):
        assert exit_code_of(main) == code
        err = capsys.readouterr().err
        check(err, name)
        assert len(err.splitlines()) == count and all(line.startswith("error: ") for line in err.splitlines())


def test_words_of_thousands_of_letters_are_cut(capsys, monkeypatch):
    for words in (["--wbits", "3" * 5000 + "x"], [f"--{'a' * 5000}"], ["--quantization-method", "b" * 5000]):
        monkeypatch.setattr(sys, "argv", ["model_quantizer.py", "--model", "x", *words])
        assert exit_code_of(model_quantizer.main) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and max(map(len, err.splitlines())) < 1000


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_warnings(name, monkeypatch):
    """By the handler of the command lines, and by one that a library has of its own."""
    own = io.StringIO()
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    set_logging("warning")
    logger = logging.Logger("library")
    logger.addHandler(logging.StreamHandler(own))
    logger.warning("cannot read %s", name)
    check(own.getvalue(), name)
    assert own.getvalue().count("\n") == 1


def failing(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("unable to mmap 64 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_ran_out_is_one_line(error, capsys):
    assert exit_code_of(failing(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: not enough memory")
    assert all(flag in line for flag in ("--calib-batch", "--nsamples", "--seqlen", "--activation-store"))


def test_an_allocation_that_torch_refuses_is_one_line(capsys):
    assert exit_code_of(lambda: torch.empty(1 << 55)) == 1
    assert "not enough memory" in capsys.readouterr().err


def test_a_full_disk_is_named_with_what_is_free(tmp_path, capsys):
    assert exit_code_of(failing(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "no" / "x")))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"No space left on device: {tmp_path / 'no' / 'x'} (" in line and " MB are free there)" in line
    free = shutil.disk_usage(tmp_path).free / 1e6
    assert float(line.split(" (")[1].split(" MB")[0]) == pytest.approx(free, rel=0.2)


def test_failures_of_the_tokenizers_library_are_one_line(tmp_path, capsys):
    from tokenizers import Tokenizer

    (tmp_path / "tokenizer.json").write_text("{]")
    assert exit_code_of(lambda: Tokenizer.from_file(str(tmp_path / "tokenizer.json"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a library failed: ")
    assert exit_code_of(failing(Exception("No space left on device (os error 28)"))) == 1
    assert capsys.readouterr().err == f"error: {os.strerror(28)}. Finished blocks are kept.\n"


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), RuntimeError("shapes do not fit"), AssertionError()])
def test_what_nobody_foresaw_is_one_line_too(error, capsys, caplog):
    """Whatever library raised it; the line names the place in the project, and debugging shows the way to it."""
    assert exit_code_of(failing(error)) == 1
    assert capsys.readouterr().err.startswith(f"error: {type(error).__name__} at tests/")
    with caplog.at_level(logging.DEBUG):
        assert exit_code_of(failing(error)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"error: {type(error).__name__} at tests/\S+:\d+: .*; --log-level debug shows .*", line)
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ELOOP])
def test_a_name_that_no_system_takes_is_bad_input(number, capsys):
    assert exit_code_of(failing(OSError(number, os.strerror(number), "x"))) == 2
    assert capsys.readouterr().err == f"error: {os.strerror(number)}: x: give another place\n"


def test_debugging_shows_where_a_line_comes_from(caplog):
    with caplog.at_level(logging.DEBUG):
        assert exit_code_of(failing(RunError("x"))) == 1
    assert "Traceback" in caplog.text and "RunError: x" in caplog.text


def child(body: str, *, shell: str, encoding: str = "utf-8") -> subprocess.CompletedProcess:
    """A command of its own whose body prints; ``shell`` says where its output goes, and writes its exit code."""
    code = f"import sys\nfrom quant.cli.console import console\nfrom quant.cli.errors import exit_code_of\ndef main():\n    {body}\nsys.exit(exit_code_of(main))"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "CODE": code, "PYTHON": sys.executable}
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, env=environment, timeout=120,
                          cwd=Path(__file__).parents[1])  # fmt: skip


def test_output_that_cannot_show_a_letter_shows_its_escape():
    done = child('console().print("漢 ± ok"); sys.stdout.write("é")', shell='"$PYTHON" -c "$CODE"', encoding="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\\u6f22 \\xb1 ok\n\\xe9"


def test_output_that_is_closed_goes_nowhere():
    body = 'console().print("x"); sys.stdout.write("x"); sys.stderr.write("done")'
    done = child(body, shell='"$PYTHON" -c "$CODE" >&-')
    assert (done.returncode, done.stderr) == (0, "done")
    assert child('console().print("x"); 1 / 0', shell='"$PYTHON" -c "$CODE" >&- 2>&-').returncode == 1


@pytest.mark.parametrize("body", ['[console().print("x" * 999) for _ in range(999)]', 'sys.stdout.write("x")'])
def test_output_that_nobody_reads_is_one_line(body):
    done = child(f"import time; time.sleep(0.5); {body}", shell='"$PYTHON" -c "$CODE" | true; echo "${PIPESTATUS[0]}"')
    assert done.stdout == "1\n"
    assert done.stderr == "error: whatever read the output has ended, so this ends too; what was finished is kept\n"


def test_a_working_directory_that_is_gone_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert exit_code_of(lambda: pytest.fail("work began")) == 2
    assert capsys.readouterr().err == "error: the working directory is not there any more: change to another one\n"


@pytest.fixture
def marked(model_dir, tmp_path) -> Path:
    """A model in a directory that rich would take for markup."""
    (tmp_path / "q[/x]").mkdir(parents=True)
    return shutil.copytree(model_dir("llama"), tmp_path / "q[/x]" / "[red]llama")


def test_paths_that_look_like_markup(marked, text, tmp_path, monkeypatch, capsys):
    run = tmp_path / "k[/red]z"
    common = [
        "--model",
        marked,
        "--eval-datasets",
        text,
        "--seqlen",
        32,
        "--limit",
        2,
        "--cache-dir",
        tmp_path / "cache",
    ]
    ours = ["--dataset", text, "--nsamples", 2, "--wbits", 3, "--quantization-method", "rtn", "--run-dir", run]

    def command(main, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        assert exit_code_of(main) == 0
        return capsys.readouterr().out

    out = command(
        model_quantizer.main, *common, *ours, "--save", tmp_path / "s[/b]", "--compute-quantization-recon-error"
    )
    assert f"{marked}:3bits" in "".join(out.split()), "also where the title is wrapped"
    assert f"report: {run / 'report.html'}" in out
    assert str(run / "results.json") in out and f"checkpoint: {tmp_path / 's[/b]'}" in out
    assert f"{marked}: llama" in command(model_quantizer.main, *common, *ours, "--dry-run")
    assert "[red]llama" in "".join(command(evaluate.main, *common).split()), "also where the title is wrapped"
    assert "tokens of prompt" in command(generate.main, "--model", run, "--prompt", "ab", "--max-new-tokens", 2)


def test_a_model_cannot_steer_the_terminal(monkeypatch, capsys, model_dir):
    """Generated text keeps its lines; other control characters are shown."""
    monkeypatch.setattr("quant.run.generate.text_of", lambda *_: iter(["one\n", "\x1b[2Jtwo", "\u202e"]))
    words = ["--model", str(model_dir("llama")), "--prompt", "ab", "--max-new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["generate", *words])
    assert exit_code_of(generate.main) == 0
    assert capsys.readouterr().out.startswith("abone\n\\x1b[2Jtwo\\u202e\n")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_in_the_markdown_of_a_sweep(name):
    line = {"row": name, "seeds": 1, "failed": 1, "message": f"no | {name}", "figures": {f"ppl {name}": [1.0, None]}}
    written = sweep_board.markdown([line], name)
    harmless = sweep_board.markdown([{**line, "row": "x", "message": "x", "figures": {"x": [1.0, None]}}], "x")
    assert set(ACTIVE.findall(written)) <= {"\n"} and written.count("\n") == harmless.count("\n")
    bars = [row.replace("\\\\", "").replace("\\|", "").count("|") for row in written.splitlines()]
    assert bars == [row.count("|") for row in harmless.splitlines()]


def test_a_table_s_name_adds_nothing_to_a_job(model_dir, text, tmp_path, monkeypatch, capsys):
    table = tmp_path / "x\ntouch forged #.tsv"
    table.write_text(f"model\tdataset\teval-datasets\twbits\n{model_dir('llama')}\t{text}\t{text}\t3\n")
    monkeypatch.setattr(
        sys, "argv", ["sweep.py", str(table), "--executor", "slurm", "--allow-paths", "--out", str(tmp_path / "out")]
    )
    assert exit_code_of(sweep.main) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "#SBATCH --job-name=x-touch-forged--" in lines
    assert not any(line.startswith("touch") for line in lines[:6])


def test_an_interrupt_inside_a_destructor_is_not_lost(capsys):
    """Python prints it, with its traceback, and goes on."""

    class Left:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # the handler runs here at the latest

    def work() -> None:
        left = Left()
        del left
        for _ in range(200):
            time.sleep(0.01)
        raise AssertionError("it went on")

    assert exit_code_of(work) == 130
    assert capsys.readouterr().err == "error: interrupted; the same command continues after the last finished block\n"


def test_an_interrupt_inside_a_library_is_an_interrupt(capsys):
    """llvmlite answered one with an AttributeError: ctypes asks objects for attributes."""

    def main() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise AttributeError("no attribute '_as_parameter_'") from None

    before = signal.getsignal(signal.SIGINT)
    assert exit_code_of(main) == 130 and signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err == "error: interrupted; the same command continues after the last finished block\n"
