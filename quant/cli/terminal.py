"""What the command lines share: both spellings of flags, all mistakes at once, progress, tables, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import rich.console
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.protocol import is_renderable
from rich.table import Table
from rich.text import Text

from quant.core.errors import InputError, RunError
from quant.core.text import brief, one_line, printable
from quant.report.published import published

STAGES = ("load", "forward", "gram", "learn", "solve", "evaluate", "tasks", "export")
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

log = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """Accepts --group-size, --group_size and --groupsize alike; a misspelt flag is answered with the nearest one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after bringing every flag to its declared spelling."""
        given = list(sys.argv[1:] if args is None else args)
        declared = {_letters(flag): flag for flag in self._option_string_actions if flag.startswith("--")}
        spelt = [_respell(word, declared) for word in given]
        parsed, unknown = super().parse_known_args(spelt, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2 (see `guarded`)."""
        raise InputError(message)


def _letters(flag: str) -> str:
    return re.sub("[-_]", "", flag).lower()


def _respell(word: str, declared: dict[str, str]) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return declared.get(_letters(flag), flag) + equals + value


def fail(*lines: str) -> None:
    """One line on standard error for each mistake, whatever the names in it hold."""
    with contextlib.suppress(BrokenPipeError):  # nobody reads
        for line in lines:
            sys.stderr.write(f"error: {one_line(str(line))}\n")


def guarded(main: Callable[[], None]) -> int:
    """Run a command; turn the failures that a person can act on into one line and an exit code.

    Anything else is a mistake in this code and stays a traceback; so do all of them with ``--log-level debug``.
    """
    _open_streams()
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # what waits for a pipe that nobody reads fails here, not at the interpreter's end
    except KeyboardInterrupt:
        fail("interrupted; the same command continues after the last finished block")
        return INTERRUPTED
    except Exception as error:
        answer = said_of(error)
        if answer is None:
            raise
        if isinstance(error, BrokenPipeError):
            _drop_output()
        log.debug("this failed:", exc_info=True)
        code, lines = answer
        fail(*lines)
        return code
    return DONE


def said_of(error: Exception) -> tuple[int, Sequence[str]] | None:
    """Exit code and lines for a failure that a person can act on; None for any other."""
    if isinstance(error, InputError):
        return BAD_INPUT, error.args
    if isinstance(error, RunError):
        *lines, last = error.args
        return FAILED, [*lines, f"{last}. Finished blocks are kept: the same command continues."]
    if _is_memory(error):
        return FAILED, [_memory_line(error)]
    if type(error) is Exception:  # the tokenizers library raises no other
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            return FAILED, [f"a library failed: {error}. Finished blocks are kept."]
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, OSError):
        return FAILED, [f"{_system_line(error)}. Finished blocks are kept."]
    return None


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's, torch's on a device, or torch's on the host, which is known by its text alone."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    found = "can't allocate memory|cannot allocate memory|not enough memory|out of memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(found, str(error), re.IGNORECASE) is not None
    )


def _memory_line(error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    why = f" ({brief(first[0], 200)})" if first else ""
    return (
        f"not enough memory{why}: lower --calib-batch, --nsamples or --seqlen, or keep hidden states elsewhere with "
        "--activation-store. Finished blocks are kept."
    )


def _system_line(error: OSError) -> str:
    """What the system refused, of which file; of a full disk also how much is free on it."""
    line = error.strerror or str(error) or type(error).__name__
    if not error.filename:
        return line
    line += f": {os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return line
    place = next((folder for folder in Path(str(error.filename)).absolute().parents if folder.is_dir()), Path("/"))
    return f"{line} ({shutil.disk_usage(place).free / 1e6:.1f} MB are free there)"


def _open_streams() -> None:
    """Output that is closed goes nowhere, and a terminal that cannot show a letter shows its escape."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (open to the end)
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Let standard output, whose reader is gone, go nowhere: Python flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Record(logging.LogRecord):
    """A message that is one line, whatever names are in it; for the handlers of libraries too."""

    def getMessage(self) -> str:  # noqa: N802
        return printable(super().getMessage())


def set_logging(level: str) -> None:
    """Log to standard error; libraries stay quiet unless something is wrong."""
    logging.setLogRecordFactory(_Record)
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for library in ("transformers", "datasets", "huggingface_hub", "urllib3", "filelock", "fsspec"):
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


class Console(rich.console.Console):
    """Shows strings letter by letter: in what is printed, cells and titles there is no markup, and `printable` makes
    every character visible that a terminal obeys. A string is one line; our own lines and styles are `rich.text.Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it is shown (rich calls this for every string it meets)."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; what is neither a string nor made for rich, such as a path, is shown as a string."""
        super().print(*(o if is_renderable(o) else str(o) for o in objects), **options)

    def on_broken_pipe(self) -> None:
        """Fail as any write does (rich would end the program without a word)."""
        raise


def console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


class ProgressBars:
    """A bar for each stage on a terminal; elsewhere a line, with the time left, when a stage has moved on by a tenth."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description:>24}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.started: dict[str, tuple[float, int]] = {}  # when a stage was first seen, and how far it was

    def __enter__(self) -> ProgressBars:
        self.bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bars.stop()

    def for_method(self, method: str) -> Callable[[str, int, int, str], None]:
        """The callback that a run reports to."""
        return lambda stage, done, total, note: self._update(f"{method} {stage}", done, total, note)

    def _update(self, name: str, done: int, total: int, note: str) -> None:
        name, note = printable(name), printable(note)  # columns make a Text of them by themselves
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, note=note)
        if name not in self.started or done <= self.started[name][1]:
            self.started[name] = (time.perf_counter(), done)
        self.bars.update(self.tasks[name], completed=done, note=note)
        step = max(1, total // 10)
        if not self.console.is_terminal and (done % step == 0 or done == total):
            left = self._left(name, done, total)
            self.console.print(f"{name}: {done} of {total} {note}".rstrip() + left)

    def _left(self, name: str, done: int, total: int) -> str:
        """How long the stage will still take, as what was seen of it took; nothing at its first step and its end."""
        began, first = self.started[name]
        if done in (first, total):
            return ""
        seconds = (time.perf_counter() - began) / (done - first) * (total - done)
        for unit, size, limit in (("s", 1, 100), ("min", 60, 100 * 60)):
            if seconds < limit:
                return f", about {seconds / size:.0f} {unit} left"
        return f", about {seconds / 3600:.1f} h left"


def results_table(all_results: Sequence[dict[str, Any]], title: str) -> Table:
    """Method, bits per weight, perplexity before and after with their ratio, KL divergence, relative error, seconds."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    for column in (
        "bits per\nweight",
        "data",
        "perplexity\nbefore",
        "\nafter",
        "ratio, 95%\ninterval",
        "KL diver-\ngence",
    ):
        table.add_column(Text(column), justify="right")
    for column in ("relative\nerror", "seconds"):
        table.add_column(Text(column), justify="right")
    for results in all_results:
        corpora = results["perplexity"] or {"-": {}}
        for row, (name, perplexity) in enumerate(corpora.items()):
            first, bounds = row == 0, perplexity.get("ratio_ci95")
            table.add_row(
                results["method"] if first else "",
                f"{results['bits_per_weight']:.3f}" if first else "",
                name,
                _number(perplexity.get("fp"), 3),
                _number(perplexity.get("quantized"), 3),
                f"{bounds[0]:.3f}-{bounds[1]:.3f}" if bounds else "-",
                _number(results["fidelity"].get(name, {}).get("kl_divergence"), 4),
                f"{results['mean_relative_error']:.4f}" if first else "",
                f"{results['seconds']['total']:.1f}" if first else "",
            )
    return table


def show_results(title: str, finished: Sequence[dict[str, Any]], console: Console, linears: bool) -> None:
    """One table, one row a method; with ``linears`` a second one; seconds and memory; where everything is."""
    console.print()
    console.print(results_table(finished, title))
    if any(results["zero_shot"] for results in finished):
        console.print(tasks_table(finished))
    show_published(title.split(":")[0], finished, console)
    for results in finished:
        path = Path(results["run_dir"])
        if linears and (path / "journal.jsonl").exists():
            console.print(linears_table([json.loads(line) for line in (path / "journal.jsonl").open()]))
        verdicts, seconds, peak = results["verdicts"], results["seconds"], results["peak_bytes"]
        stages = ", ".join(
            f"{k} {seconds[k]:.1f}" for k in STAGES if seconds.get(k, 0) > 0 or k not in ("learn", "tasks")
        )
        memory = f"{peak['host'] / 1e9:.2f} GB host" + (
            f", {peak['device'] / 1e9:.2f} GB device" if peak["device"] else ""
        )
        method = Text(printable(results["method"]), style="bold")
        console.print(method, f": seconds: {stages}; peak memory {memory}", sep="")
        if any(verdicts[v] for v in ("look", "bad")):
            console.print(f"  linears: {verdicts['ok']} ok, {verdicts['look']} to look at, {verdicts['bad']} bad")
        for line in _remarks(results):
            console.print(f"  {line}")
        console.print(f"  {path / 'results.json'}", soft_wrap=True)


def show_report(finished: Sequence[dict[str, Any]], together: Path | None, console: Console) -> None:
    """Write a page for every run and one for all of several, in ``together``; say where it is."""
    from quant.report.page import write_pages

    try:
        page = write_pages([Path(results["run_dir"]) for results in finished], together)
    except InputError as error:  # somebody's files are where it goes; the numbers are there without it
        console.print(f"no report: {error}", soft_wrap=True)
        return
    console.print(f"report: {page}", soft_wrap=True)


def show_published(model: str, finished: Sequence[dict[str, Any]], console: Console) -> None:
    """Published figures of the same model and setting beside ours; nothing where there are none."""
    found = [entry for results in finished for entry in published(model, results)]
    if not found:
        return
    table = Table(title="published", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for column in ("data", "setting", "method", "published", "ours", "source"):
        table.add_column(column, justify="right" if column in ("published", "ours") else "left")
    seen = set()
    for entry in found:
        row = (
            entry["data"],
            entry["setting"],
            entry["method"],
            f"{entry['perplexity']:.2f}",
            _number(entry["ours"], 2),
            entry["source"],
        )
        if row not in seen:
            table.add_row(*row)
        seen.add(row)
    console.print(table)
    if not all(entry["same_protocol"] for entry in found):
        console.print("  ours was measured on other windows than the published figures")


def _remarks(results: dict[str, Any]) -> list[str]:
    """What the numbers of a table do not show: levels that are no power of two, matrices kept beside the weights."""
    found, entropy = [], results["entropy_bits"]
    if entropy is not None and entropy != int(entropy):
        found.append(f"codes of {2**entropy:.0f} levels: {entropy:.2f} bits of entropy, stored in {math.ceil(entropy)}")
    if share := results.get("outlier_share"):
        found.append(f"{share:.2%} of the weights are kept as outliers (counted in bits per weight)")
    if packed := results.get("packed_bytes"):
        counted = results["quantized_bytes"]
        found.append(f"evaluated with packed weights: {packed / 1e6:.2f} MB in memory, {counted / 1e6:.2f} MB counted")
    online = sum(log["online_parameters"] for log in results["learning"])
    if online:
        found.append(
            f"matrices behind norms: {online} numbers in 16 bits (counted in bits per weight), {2 * online} flops a token"
        )
    return found


def tasks_table(all_results: Sequence[dict[str, Any]]) -> Table:
    """Accuracy before and after on every task, with the interval of the paired difference; chance is marked."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    for column in (
        "task",
        "metric",
        "items",
        "before",
        "after",
        "standard\nerror",
        "difference,\n95% interval",
        "chance",
    ):
        table.add_column(Text(column), justify="left" if column in ("task", "metric") else "right")
    for results in all_results:
        for row, (name, task) in enumerate(results["zero_shot"].items()):
            bounds = task["difference_ci95"]
            table.add_row(
                results["method"] if row == 0 else "",
                name,
                task["metric"],
                str(task["items"]),
                _number(task["fp"], 3),
                _number(task["quantized"], 3),
                f"{task['stderr']:.3f}",
                f"{bounds[0]:+.3f} to {bounds[1]:+.3f}" if bounds else "-",
                f"{task['chance']:.2f}" + (" (at chance)" if task["at_chance"] else ""),
            )
    return table


def comparison_table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """Errors of several methods on the same linears: mean, worst, against round-to-nearest; bits; seconds."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    for column in (
        "bits per\nweight",
        "relative error\nmean",
        "\nworst",
        "of rtn's,\nmean",
        "best for\nlinears",
        "seconds",
    ):
        table.add_column(Text(column), justify="right")
    methods = list(dict.fromkeys(r["method"] for r in records))
    lowest: dict[Any, float] = {}
    for r in records:
        where = (r["block"], r["name"])
        lowest[where] = min(lowest.get(where, r["relative_error"]), r["relative_error"])
    for method in methods:
        own = [r for r in records if r["method"] == method]
        errors, bits = [r["relative_error"] for r in own], sum(r["storage_bits"] for r in own)
        ratios = [r["relative_error"] / r["relative_error_rtn"] for r in own if r["relative_error_rtn"] > 0]
        table.add_row(
            method,
            f"{bits / sum(r['shape'][0] * r['shape'][1] for r in own):.3f}",
            f"{sum(errors) / len(errors):.5f}",
            f"{max(errors):.5f}",
            f"{sum(ratios) / max(1, len(ratios)):.3f}",
            str(sum(r["relative_error"] == lowest[r["block"], r["name"]] for r in own)),
            f"{sum(r['seconds'] for r in own):.1f}",
        )
    return table


def difference_table(title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """What differs between runs: a row an entry, a column a run."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, *values in rows:
        table.add_row(name, *(f"{v:.6g}" if isinstance(v, float) else str(v) for v in values))
    return table


def linears_table(records: Sequence[dict[str, Any]]) -> Table:
    """Relative error of every linear, for ``--compute-quantization-recon-error``."""
    table = Table(title="relative error of every linear", title_justify="left", header_style="bold")
    for column in ("block", "linear", "method", "error", "rtn", "bits/weight", "verdict"):
        table.add_column(column, justify="left" if column in ("linear", "method", "verdict") else "right")
    for r in records:
        error, nearest = f"{r['relative_error']:.5f}", f"{r['relative_error_rtn']:.5f}"
        table.add_row(
            str(r["block"]), r["name"], r["method"], error, nearest, f"{r['bits_per_weight']:.3f}", r["verdict"]
        )
    return table


def loadability_table(kind: str, rows: Sequence[tuple[str, bool, str, str]]) -> Table:
    """Which software takes the checkpoint, and whether that was tried."""
    table = Table(
        title=f"will a {kind} checkpoint of this load?", title_justify="left", header_style="bold", box=SIMPLE_HEAD
    )
    table.add_column("in")
    table.add_column("")
    table.add_column("known from")
    table.add_column("why not, or what it needs", overflow="fold")
    for runtime, loads, why, known in rows:
        table.add_row(runtime, "yes" if loads else "no", known, why)
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
