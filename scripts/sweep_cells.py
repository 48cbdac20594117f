"""The rows of a sweep on their way: as configurations, in groups that share a session, run, and what came of them."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from quant.cli.errors import explain
from quant.core.errors import InputError, RunError, first_line
from quant.run.config import SessionConfig
from quant.run.job import Progress, silent
from quant.run.request import Request
from quant.run.scoring import FullPrecision
from quant.run.session import Session
from quant.run.stored import NOTHING_ALLOWED, Allowed, allowed_entries, ordered_places
from scripts.sweep_table import COMMANDS, Row, place_of, words_of

log = logging.getLogger(__name__)
FAILURES = (InputError, RunError, OSError, MemoryError, RuntimeError)  # of a row, which leave the others alone
WAITING, QUANTIZED, DONE, FAILED = "waiting", "quantized", "done", "failed"


@dataclass
class Cell:
    """One row on its way. flags: as on the command line. request: what they mean. label: what tells it from others."""

    flags: dict[str, str]
    request: Request
    label: str
    status: str = WAITING
    message: str = ""
    results: dict[str, Any] = field(default_factory=dict)


def check_orders(rows: Sequence[Row], allowed: Allowed = NOTHING_ALLOWED) -> None:
    """Raise InputError, with its place, for an entry of a table that only a flag of this command may say: to run the
    model's code, to read files, to write or replace something. What counts is what the command line makes of a row."""
    for row in rows:
        given = _given(row)
        for name in ordered_places(given):
            raise InputError(
                f"{place_of(f'--{name}', row)}: {name} says where to write, which a table does not: give it in --flags"
            )
        for name, value in given.items():
            allowed_entries({name: value}, place_of(f"--{name}", row), allowed)


def _given(row: Row) -> dict[str, Any]:
    """What a row says to its command line, by the parser's own names. Raises InputError where it does not parse."""
    parser = module_of(row).parser()
    try:
        args = vars(parser.parse_args(words_of(row.flags)))
    except InputError as error:
        message = first_line(error)
        raise InputError(f"{place_of(message, row)}: {message}") from error
    return {name: value for name, value in args.items() if value != parser.get_default(name)}


def module_of(row: Row) -> Any:
    """The command line of a row. Raises InputError for another one."""
    import main as learned
    import model_quantizer

    command = row.flags["command"]
    if command not in COMMANDS:
        place = row.places.get("command", row.where)
        raise InputError(f"{place}: command {command!r}; use {' or '.join(COMMANDS)}")
    return learned if command == "main.py" else model_quantizer


def with_more(rows: Sequence[Row], seeds: Sequence[str], flags: Mapping[str, str]) -> list[Row]:
    """Every row with further flags, once for each seed. Raises InputError where rows have seeds of their own."""
    if seeds and (own := next((row for row in rows if "seed" in row.flags), None)):
        raise InputError(f"{own.where}: has a seed of its own; drop --seeds")
    more = [{**flags, "seed": seed} for seed in seeds] or [dict(flags)]
    return [replace(row, flags=row.flags | extra) for row in rows for extra in more]


def cells_of(rows: Sequence[Row], out: Path) -> list[Cell]:
    """Rows as configurations, by the command lines' own parsers. Raises InputError naming the row, and the entry if it
    is one of the table."""
    cells: list[Cell] = []
    seen: dict[str, Row] = {}
    names = dict.fromkeys(name for row in rows for name in row.flags)
    varying = [n for n in names if n != "seed" and (n == "model" or len({row.flags.get(n) for row in rows}) > 1)]
    for row in rows:
        flags = row.flags
        try:
            request = module_of(row).request_from(words_of(flags))
        except InputError as error:
            message = first_line(error)
            raise InputError(f"{place_of(message, row)}: {message}") from error
        key = json.dumps(flags, sort_keys=True)
        if key in seen:
            raise InputError(f"{row.where}: stands there twice, first as {seen[key].where}")
        seen[key] = row
        shown = [n for n in varying if n in flags and (n == "model" or not row.name)]
        parts = [Path(flags[n]).name if n == "model" else f"{n}={flags[n]}" if flags[n] else n for n in shown]
        label = " ".join([row.name, *parts] if row.name else parts)
        slug = "".join(c if c.isalnum() or c in "._=" else "-" for c in label)[:80]
        place = out / "rows" / f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        cells.append(Cell(flags, request.but(run_dir=place), label))
    return cells


def groups_of(cells: Sequence[Cell], rows_per_task: int | None) -> list[list[Cell]]:
    """Rows that share a session, split into tasks of at most ``rows_per_task``."""
    by_session: dict[SessionConfig, list[Cell]] = {}
    for cell in cells:
        by_session.setdefault(cell.request.session, []).append(cell)
    step = rows_per_task or len(cells)
    return [group[i : i + step] for group in by_session.values() for i in range(0, len(group), step)]


def run_group(
    cells: Sequence[Cell],
    together: int,
    moved: Callable[[Cell], None] = lambda cell: None,
    watch: Callable[[str], Progress] = lambda what: silent,
) -> float:
    """Quantize every row, then evaluate those that worked, ``together`` at a time, full precision once for all. Returns
    seconds of actual work.

    A row that fails says why in its message. watch: gives the callback for the stages of what is at work.
    """
    started = time.perf_counter()
    try:
        session = Session(cells[0].request.session)
    except FAILURES as error:
        for cell in cells:
            _fail(cell, error, moved)
        return time.perf_counter() - started
    for number, cell in enumerate(cells, 1):
        try:
            what = f"row {number} of {len(cells)}, {cell.label}"
            session.quantize(cell.request.run, cell.request.output, watch(what))
        except FAILURES as error:
            _fail(cell, error, moved)
        else:
            cell.status = QUANTIZED
            moved(cell)
    alive, kept = [cell for cell in cells if cell.status != FAILED], FullPrecision()
    for part in (alive[i : i + together] for i in range(0, len(alive), together)):
        try:
            again = [(cell.request.run, replace(cell.request.output, overwrite=False)) for cell in part]
            watched = watch(f"{len(part)} of {len(alive)} rows")
            finished = session.run_all(again, lambda _, one=watched: one, kept)
        except FAILURES as error:
            for cell in part:
                _fail(cell, error, moved)
            continue
        for cell, results in zip(part, finished, strict=True):
            cell.status, cell.results = DONE, results
            moved(cell)
    return time.perf_counter() - started


def _fail(cell: Cell, error: Exception, moved: Callable[[Cell], None]) -> None:
    """Note why a row failed. What a person cannot act on is a mistake in this code: its traceback goes to the log."""
    if explain(error) is None:
        log.error("%s", cell.label, exc_info=error)
    cell.status, cell.message = FAILED, first_line(error)
    moved(cell)


def figures(cell: Cell) -> dict[str, float]:
    """The numbers of a finished row: bits, perplexity ratio by corpus, KL divergence, relative error, accuracies."""
    r = cell.results
    numbers = {"bits": r["bits_per_weight"]}
    for name, scores in r["perplexity"].items():
        numbers[f"ppl {name}"] = scores["quantized"] if scores["quantized"] is not None else scores["fp"]
    numbers |= {f"KL {name}": f["kl_divergence"] for name, f in r["fidelity"].items()}
    numbers |= {name: t["quantized"] for name, t in r["zero_shot"].items()} | {"error": r["mean_relative_error"]}
    return {name: number for name, number in numbers.items() if number is not None}


def over_seeds(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Mean and standard deviation (None for one seed) of rows that differ in their seed alone, in the table's order."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    summary = []
    for label, group in groups.items():
        done = [figures(cell) for cell in group if cell.status == DONE]
        names = [name for name in (done[0] if done else {}) if all(name in f for f in done)]
        spread = {n: stdev(f[n] for f in done) if len(done) > 1 else None for n in names}
        summary.append({
            "row": label, "seeds": len(done), "failed": sum(cell.status == FAILED for cell in group),
            "message": next((cell.message for cell in group if cell.message), ""),
            "figures": {n: [mean(f[n] for f in done), spread[n]] for n in names},
        })  # fmt: skip
    return summary
