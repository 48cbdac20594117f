"""Run a table of quantizations: every row is a command, all rows of a model share its data and one evaluation.

A table is a .tsv with a header of flag names (and, if wanted, columns ``command`` and ``flags``, the latter with several
flags in a cell), or a .yaml with ``command``, ``fixed`` flags, a ``grid`` of lists whose product is taken (or a list of
such grids) and ``rows``; an entry of a grid's list may be a set of flags by itself. scripts/papers.tsv is the papers'
table: its rows are chosen with --paper, --family, --size and --setting, which take shell patterns.
Finished rows are skipped, a row that fails does not stop the others, and the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the command lines are imported for their parsers

from quant.cli.arguments import add_flags, bare_parser, flag_mistakes, parse  # noqa: E402
from quant.cli.console import Pace  # noqa: E402
from quant.cli.errors import exit_code_of, explain  # noqa: E402
from quant.cli.flags import AT_LEAST_0, AT_LEAST_1, SWEEP, Flag  # noqa: E402
from quant.core.errors import InputError, RunError, first_line  # noqa: E402
from quant.core.files import check_owned, check_plain_file, hold_lock, write_owned  # noqa: E402
from quant.core.places import Place, check_places  # noqa: E402
from quant.core.text import brief, markdown_cell, markdown_table, printable  # noqa: E402
from quant.report.page import write_report  # noqa: E402
from quant.report.runs import open_run  # noqa: E402
from quant.run.config import SessionConfig  # noqa: E402
from quant.run.job import Progress, silent  # noqa: E402
from quant.run.request import Request, places_read  # noqa: E402
from quant.run.scoring import FullPrecision  # noqa: E402
from quant.run.session import Session  # noqa: E402
from quant.run.stored import NOTHING_ALLOWED, Allowed, allowed_entries, ordered_places  # noqa: E402

EXAMPLES = """examples:
  python scripts/sweep.py scripts/sweeps/demo.yaml                       # 150 rows on the embedded models
  python scripts/sweep.py mine.tsv --out runs/sweeps/mine                # model<TAB>wbits<TAB>quantization-method<TAB>seed
  python scripts/sweep.py scripts/papers.tsv --paper omniquant --family llama-2 --size 7b --setting 'W4*' --seeds 0,1,2
  python scripts/sweep.py scripts/papers.tsv --paper quantease --dry-run # the commands; nothing is run
  python scripts/sweep.py scripts/papers.tsv --size 125m --models /data/models --flags='--seqlen 1024 --data-dir /data/text'
  python scripts/sweep.py mine.yaml --executor ray --gpus 1              # one model after the other on each GPU of a cluster
  python scripts/sweep.py mine.yaml --executor ray --gpus 1 --rows-per-task 1     # each row by itself
  python scripts/sweep.py mine.yaml --executor slurm > array.sh          # prints a job array, one task a model

Exit codes: 0 all rows done, 1 some failed, 2 a malformed table.
"""
CHOICES = ("paper", "family", "size", "setting")
COMMANDS = ("model_quantizer.py", "main.py")
PAPERS = ("paper", "family", "sizes", "setting", "flags")  # the columns of scripts/papers.tsv
HUB = {
    "opt": "facebook/opt-{}",
    "bloom": "bigscience/bloom-{}",
    "falcon": "tiiuae/falcon-{}",
    "llama": "huggyllama/llama-{}",
    "llama-2": "meta-llama/Llama-2-{}-hf",
}
MOST_ROWS = 100_000  # of a grid
log = logging.getLogger(__name__)
FAILURES = (InputError, RunError, OSError, MemoryError, RuntimeError)  # of a row, which leave the others alone
WAITING, QUANTIZED, DONE, FAILED = "waiting", "quantized", "done", "failed"


@dataclass(frozen=True)
class Row:
    """One command of a table. flags: values by name, as on the command line ("": a flag without a value), and ``command``.
    where: the row's place in the table; places: those of its entries. name: of the row, where the table names rows."""

    flags: dict[str, str]
    where: str
    places: dict[str, str] = field(default_factory=dict)
    name: str = ""


@dataclass
class Cell:
    """One row on its way. flags: as on the command line. request: what they mean. label: what tells it from others."""

    flags: dict[str, str]
    request: Request
    label: str
    status: str = WAITING
    message: str = ""
    results: dict[str, Any] = field(default_factory=dict)


Flags = dict[str, tuple[Any, str]]  # value and place by name


def read_table(path: Path, chosen: Mapping[str, str] | None = None, models: Path | None = None) -> list[Row]:
    """Rows of flags. Raises InputError with line and column where the table is malformed, or empty.

    chosen: patterns by column of PAPERS, for such a table alone. models: where its models are (default: the hub).
    """
    check_plain_file(path)
    if not path.is_file():
        raise InputError(f"no such table: {path}")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text") from error
    if path.suffix == ".tsv":
        header, lines = _cells_of_lines(path, text)
        if set(header) == set(PAPERS):
            rows = _papers(path, header, lines, chosen or {}, models)
        else:
            rows = [_row_of_line(path, header, number, cells) for number, cells in lines]
    elif path.suffix in (".yaml", ".yml"):
        rows, header = _read_yaml(path, text), []
    else:
        raise InputError(f"{path}: a table is a .tsv or a .yaml file")
    if (chosen or models) and set(header) != set(PAPERS):
        raise InputError(f"{path}: only a table with the columns {', '.join(PAPERS)} has rows to choose by them")
    return rows


def _cells_of_lines(path: Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Names of the columns, and (line number, cells) of every row; empty lines and comments are left out."""
    reader = csv.reader(text.splitlines(), delimiter="\t", strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error
    lines = [(number, cells) for number, cells in lines if any(cells) and not cells[0].startswith("#")]
    if len(lines) < 2:
        raise InputError(f"{path}: needs a header of flag names and at least one row")
    (first, names), *rows = lines
    header = [name.lstrip("-") for name in names]
    for column, name in enumerate(header, 1):
        if not name or name in header[: column - 1]:
            what = f"a second column {name!r}" if name else "a column without a name"
            raise InputError(f"{path}, line {first}, column {column}: {what}")
    for number, cells in rows:
        if len(cells) > len(header):
            raise InputError(f"{path}, line {number}, column {len(header) + 1}: more cells than the header has names")
    return header, rows


def _row_of_line(path: Path, header: Sequence[str], number: int, cells: Sequence[str]) -> Row:
    """A line of a .tsv as flags; a cell of the column ``flags`` holds several."""
    entries: Flags = {}
    for column, (name, cell) in enumerate(zip(header, cells, strict=False), 1):
        place = f"{path}, line {number}, column {column}"
        flags = flags_of(cell, place) if name == "flags" else {name: cell} if cell else {}
        entries |= {flag: (value, place) for flag, value in flags.items()}
    return _row(entries, f"{path}, line {number}")


def flags_of(text: str, place: str) -> dict[str, str]:
    """Flags written as on a command line. Raises InputError for words that belong to no flag."""
    flags: dict[str, str] = {}
    name = None
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from error
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            flags[name] = value
        elif name is None or flags[name]:
            raise InputError(f"{place}: {word!r} belongs to no flag")
        else:
            flags[name] = word
    return flags


def _papers(
    path: Path,
    header: Sequence[str],
    lines: Sequence[tuple[int, list[str]]],
    chosen: Mapping[str, str],
    models: Path | None,
) -> list[Row]:
    """Rows of a table of papers: one for every size of a line that the patterns choose."""
    rows = []
    for number, cells in lines:
        where, column = f"{path}, line {number}", {name: n for n, name in enumerate(header, 1)}
        if len(cells) < len(header):
            raise InputError(f"{where}, column {len(cells) + 1}: the {header[len(cells)]} are missing")
        entry = dict(zip(header, cells, strict=True))
        paper, family = entry["paper"], entry["family"]
        if family not in HUB:
            raise InputError(f"{where}, column {column['family']}: unknown family {family!r}; use {', '.join(HUB)}")
        place = f"{where}, column {column['flags']}"
        flags = flags_of(entry["flags"], place)
        own = {"command": "main.py", "eval_ppl": ""}
        if paper == "quantease":
            own = {"command": "model_quantizer.py", "dataset": "c4"}
        for size in entry["sizes"].split(","):
            values = entry | {"size": size}
            if all(fnmatch(values[name], pattern) for name, pattern in chosen.items()):
                own["model"] = HUB[family].format(size) if models is None else str(models / f"{family}-{size}")
                rows.append(Row(own | flags, where, dict.fromkeys(flags, place), f"{paper} {entry['setting']}"))
    if not rows:
        raise InputError(f"{path}: no row has {', '.join(f'{name} {pattern!r}' for name, pattern in chosen.items())}")
    return rows


def _row(entries: Flags, where: str) -> Row:
    """A row of a table that may leave out the command, and whose values may be YAML's true and false."""
    flags = {name: "" if value is True else str(value) for name, (value, _) in entries.items() if value is not False}
    return Row({"command": COMMANDS[0]} | flags, where, {name: place for name, (_, place) in entries.items()})


class _Nodes:
    """A .yaml that is read as nodes and not as values, because nodes know their line and column. Raises InputError, with
    its place, for what no table has."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def at(self, node: Any) -> str:
        """The place of a node."""
        return f"{self.path}, line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"

    def mapping(self, node: Any, name: str) -> dict[str, tuple[Any, str]]:
        """Nodes by key, with the places of the keys."""
        if node.id != "mapping":
            raise InputError(f"{self.at(node)}: {name} is a set of names and values")
        entries: dict[str, tuple[Any, str]] = {}
        for key, value in node.value:
            if key.id != "scalar" or key.value in entries:
                what = "stands there twice" if key.id == "scalar" else "a name is one word"
                raise InputError(f"{self.at(key)}: {what}")
            entries[key.value] = (value, self.at(key))
        return entries

    def scalar(self, node: Any, name: str) -> Any:
        """One value: a text, a number, true or false. A date is a text."""
        import yaml

        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if node.id != "scalar" or kind == "null":
            raise InputError(f"{self.at(node)}: {name} needs one value")
        if kind in ("str", "timestamp"):
            return node.value
        try:
            if kind in ("int", "float", "bool"):
                return yaml.SafeLoader("").construct_object(node)
        except (ValueError, LookupError):  # an explicit tag before what is none
            pass
        raise InputError(f"{self.at(node)}: {name} is no {kind} that a flag can have: {brief(node.value, 80)!r}")

    def flags(self, node: Any, name: str) -> Flags:
        """Values by flag, with their places."""
        entries = self.mapping(node, name).items()
        return {flag: (self.scalar(value, flag), self.at(value)) for flag, (value, _) in entries}

    def product(self, grid: Any) -> list[Flags]:
        """The rows of a grid of lists."""
        rows: list[Flags] = [{}]
        for name, (node, where) in self.mapping(grid, "grid").items():
            values = node.value if node.id == "sequence" else [node]
            if not values:
                raise InputError(f"{where}: the list of {name} is empty, so there are no rows")
            if len(rows) * len(values) > MOST_ROWS:
                raise InputError(
                    f"{where}: with {name} the grid has {len(rows) * len(values)} rows; use {MOST_ROWS} or fewer"
                )
            choices = [
                self.flags(v, name) if v.id == "mapping" else {name: (self.scalar(v, name), self.at(v))} for v in values
            ]
            rows = [row | choice for row in rows for choice in choices]
        return rows if rows != [{}] else []


def _composed(path: Path, text: str) -> Any:
    """The root node of a .yaml; None if it is empty. Raises InputError with line and column."""
    import yaml

    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: lists and sets are nested too deeply for a table") from error


def _read_yaml(path: Path, text: str) -> list[Row]:
    """Rows of a .yaml."""
    nodes, root = _Nodes(path), _composed(path, text)
    entries = nodes.mapping(root, "a table") if root is not None else {}
    for name, (_, where) in entries.items():
        if name not in ("command", "fixed", "grid", "rows"):
            raise InputError(f"{where}: expected the entries command, fixed, grid or rows, not {name!r}")
    shared = nodes.flags(entries["fixed"][0], "fixed") if "fixed" in entries else {}
    if "command" in entries:
        node, where = entries["command"]
        shared["command"] = (nodes.scalar(node, "command"), where)
    listed: list[tuple[Flags, str]] = []
    if "grid" in entries:
        node = entries["grid"][0]
        several = node.id == "sequence" and all(grid.id == "mapping" for grid in node.value)
        products = [row for grid in (node.value if several else [node]) for row in nodes.product(grid)]
        listed = [(row, f"{path}, row {n} of the grid") for n, row in enumerate(products, 1)]
    if "rows" in entries:
        node = entries["rows"][0]
        if node.id != "sequence":
            raise InputError(f"{nodes.at(node)}: rows is a list of sets of flags")
        listed += [(nodes.flags(row, "a row"), nodes.at(row)) for row in node.value]
    if not listed:
        raise InputError(f"{path}: no rows; give a grid or rows")
    return [_row(shared | own, where) for own, where in listed]


def check_orders(rows: Sequence[Row], allowed: Allowed = NOTHING_ALLOWED) -> None:
    """Raise InputError, with its place, for an entry of a table that only a flag of this command may say: to run the
    model's code, to read files, to write or replace something. What counts is what the command line makes of a row."""
    for row in rows:
        given = _given(row)
        for name in ordered_places(given):
            raise InputError(
                f"{_place_of(f'--{name}', row)}: {name} says where to write, which a table does not: give it in --flags"
            )
        for name, value in given.items():
            allowed_entries({name: value}, _place_of(f"--{name}", row), allowed)


def _given(row: Row) -> dict[str, Any]:
    """What a row says to its command line, by the parser's own names. Raises InputError where it does not parse."""
    parser = module_of(row).parser()
    try:
        args = vars(parser.parse_args(words_of(row.flags)))
    except InputError as error:
        message = first_line(error)
        raise InputError(f"{_place_of(message, row)}: {message}") from error
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
            raise InputError(f"{_place_of(message, row)}: {message}") from error
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


def words_of(flags: Mapping[str, str]) -> list[str]:
    """Flags as the words of a command line, of which each is one flag, whatever its value begins with. Raises InputError
    for names that are none."""
    for name in flags:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise InputError(f"{name!r} is not the name of a flag")
    return [f"--{name}={value}" if value else f"--{name}" for name, value in flags.items() if name != "command"]


def _place_of(message: str, row: Row) -> str:
    """Where the entry stands that a mistake names; the row's place if it names none."""
    spelt = {re.sub("[-_]", "", name).lower(): place for name, place in row.places.items()}
    named = [re.sub("[-_]", "", flag).lower() for flag in re.findall(r"--([A-Za-z_-]+)", message)]
    return next((spelt[name] for name in named if name in spelt), row.where)


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


def markdown(summary: Sequence[dict[str, Any]], name: str) -> str:
    """The summary as a table."""
    columns = list(dict.fromkeys(n for line in summary for n in line["figures"]))
    records = [
        {"row": line["row"] + (f" (failed: {line['message']})" if line["failed"] else ""), "seeds": str(line["seeds"])}
        | {column: mean_and_spread(line["figures"].get(column)) for column in columns}
        for line in summary
    ]
    return "\n".join([f"# {markdown_cell(name)}", "", *markdown_table(records), ""])


def mean_and_spread(figure: Sequence[float | None] | None) -> str:
    """A mean, with the standard deviation over seeds where there are several."""
    if figure is None:
        return "-"
    average, spread = figure
    return f"{average:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


SHOWN = 30  # rows of the live table
EVERY = 20.0  # seconds between lines that say how far a stage is, where there is no live table


class Board:
    """The rows so far: a live table on a terminal, else a line for every row that ends or is quantized."""

    def __init__(self, cells: Sequence[Cell], console: Any) -> None:
        from rich.live import Live

        self.cells, self.console = cells, console
        self.live = Live(console=console, refresh_per_second=2) if console.is_terminal else None
        self.pace, self.said, self.stage = Pace(), time.perf_counter(), ""

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.update(self._table())
            self.live.stop()

    def moved(self, cell: Cell) -> None:
        """A row is quantized, or has ended."""
        if self.live:
            self.live.update(self._table())
            return
        shown = cell.message or ("  ".join(f"{k} {v:.4g}" for k, v in figures(cell).items()) if cell.results else "")
        reached = (DONE, FAILED) if cell.status in (DONE, FAILED) else (QUANTIZED, DONE, FAILED)
        done, self.said = sum(c.status in reached for c in self.cells), time.perf_counter()
        self.console.print(f"{done} of {len(self.cells)} {cell.status}: {cell.label} seed={cell.flags.get('seed', '-')}  {shown}",
                           highlight=False, soft_wrap=True)  # fmt: skip

    def watch(self, what: str) -> Progress:
        """What a run that is at work reports to. what: says which it is."""

        def progress(stage: str, done: int, total: int, note: str) -> None:
            left = self.pace.left(f"{what} {stage}", done, total)
            self.stage = f"{what}: {stage} {done} of {total}{left}"
            if self.live:
                self.live.update(self._table())
            elif time.perf_counter() - self.said >= EVERY:
                self.said = time.perf_counter()
                self.console.print(self.stage, soft_wrap=True)

        return progress

    def _table(self) -> Any:
        from rich.table import Table

        count = {status: sum(c.status == status for c in self.cells) for status in (DONE, FAILED, QUANTIZED, WAITING)}
        counted = ", ".join(f"{n} {status}" for status, n in count.items()) + f" of {len(self.cells)} rows"
        table = Table(title=counted, caption=self.stage or None)
        for name in ("row", "seed", "status", "bits", "perplexity", "relative error"):
            table.add_column(name)
        moving = [c for c in self.cells if c.status != WAITING][-SHOWN:]
        waiting = [c for c in self.cells if c.status == WAITING][: max(3, SHOWN - len(moving))]
        for cell in moving + waiting:
            f = figures(cell) if cell.status == DONE else {}
            perplexity = " ".join(f"{v:.3f}" for k, v in f.items() if k.startswith("ppl "))
            error = f"{f['error']:.4f}" if "error" in f else cell.message
            table.add_row(
                cell.label, cell.flags.get("seed", "-"), cell.status, f"{f['bits']:.3f}" if f else "", perplexity, error
            )
        return table


def slurm(groups: Sequence[Sequence[Cell]], args: argparse.Namespace) -> str:
    """A job array: task i runs the i-th group of rows, into the same directory."""
    for name in ("gpus", "cpus"):
        if getattr(args, name) != int(getattr(args, name)):
            raise InputError(f"--{name} {getattr(args, name):g}: Slurm gives whole ones")
    again = ["--out", str(args.out), "--together", str(args.together)]
    for name in (*CHOICES, "models", "seeds", "flags", "rows_per_task"):
        value = getattr(args, name)
        again += [f"--{name.replace('_', '-')}={value}"] if value else []
    again += [f"--{name.replace('_', '-')}" for name in ("allow_paths", "trust_remote_code") if getattr(args, name)]
    return f"""#!/usr/bin/env bash
#SBATCH --array=0-{len(groups) - 1}
#SBATCH --gres=gpu:{int(args.gpus)}
#SBATCH --cpus-per-task={int(args.cpus)}
#SBATCH --job-name={re.sub(r"[^A-Za-z0-9._-]", "-", args.table.stem)}
# submit from the project's directory; afterwards the sweep command itself only collects: everything is done
{shlex.join([sys.executable, "scripts/sweep.py", str(args.table), *again])} --only-group "$SLURM_ARRAY_TASK_ID"
"""


def with_ray(groups: Sequence[Sequence[Cell]], args: argparse.Namespace, moved: Callable[[Cell], None]) -> float:
    """Every group as a task of a Ray cluster that asks for its resources; run directories must be on shared storage."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--executor ray needs ray: pip install ray") from error
    ray.init(address=args.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})

    def work(group: list[Cell]) -> tuple[list[Cell], float]:
        spent = run_group(group, args.together)
        return group, spent

    task = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus)(work)
    waiting, seconds = {task.remote(list(group)): list(group) for group in groups}, 0.0
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        own = waiting.pop(ready)
        finished, spent = ray.get(ready)
        seconds += spent
        for cell, other in zip(own, finished, strict=True):
            cell.status, cell.message, cell.results = other.status, other.message, other.results
            moved(cell)
    ray.shutdown()
    return seconds


FLAGS = (
    Flag(None, {SWEEP: "--out"}, "default: runs/sweeps/<name of the table>", type=Path, metavar="DIR"),
    Flag(None, {SWEEP: "--executor"}, None, None, "local", choices=("local", "ray", "slurm")),
    Flag(None, {SWEEP: "--address"}, "of the Ray cluster (default: one on this machine)"),
    Flag(None, {SWEEP: "--gpus"}, "that a task asks for (default: 0)", None, 0.0, float, AT_LEAST_0),
    Flag(None, {SWEEP: "--cpus"}, "that a task asks for (default: 1)", None, 1.0, float, AT_LEAST_0),
    Flag(None, {SWEEP: "--rows-per-task"},
         "rows of one model that a task takes; full precision is then evaluated once a task (default: all)", None, None,
         int, AT_LEAST_1, metavar="N"),
    Flag(None, {SWEEP: "--together"}, "rows evaluated in one pass (default: 16)", None, 16, int, AT_LEAST_1,
         metavar="N"),
    Flag(None, {SWEEP: "--only-group"}, "run the I-th task alone, from 0 (a job array's)", type=int, metavar="I"),
    *(Flag(None, {SWEEP: f"--{name}"}, f"of scripts/papers.tsv: rows of this {name}", metavar="PATTERN")
      for name in CHOICES),
    Flag(None, {SWEEP: "--models"}, "of scripts/papers.tsv: DIR/<family>-<size>, not the hub", type=Path,
         metavar="DIR"),
    Flag(None, {SWEEP: "--seeds"}, "every row once with each of these seeds", None, "", metavar="A,B"),
    Flag(None, {SWEEP: "--flags"}, "more flags for every row, in one argument", None, "", metavar="WORDS"),
    Flag(None, {SWEEP: "--dry-run"}, "print the commands; nothing is run", type=bool),
    Flag(None, {SWEEP: "--allow-paths"}, "read the data and other files that the table names by path", type=bool),
    Flag(None, {SWEEP: "--trust-remote-code"}, "let rows that ask for it run code that comes with their model",
         type=bool),
)  # fmt: skip


def parsed() -> argparse.Namespace:
    """The flags. Raises InputError for what is wrong with them."""
    parser = bare_parser(SWEEP, __doc__, EXAMPLES)
    parser.add_argument("table", type=Path, help=".tsv or .yaml")
    add_flags(parser, SWEEP, FLAGS)
    add_flags(parser, SWEEP)
    args: argparse.Namespace = parse(parser)
    if lines := flag_mistakes(args, SWEEP, FLAGS):
        raise InputError(*lines)
    args.out = args.out or Path("runs") / "sweeps" / args.table.stem
    args.name = "sweep" if args.only_group is None else f"sweep-task{args.only_group}"  # tasks end side by side
    return args


def planned(args: argparse.Namespace) -> list[list[Cell]]:
    """The rows of the table, by task. Raises InputError for what is wrong with the table, its rows, or places."""
    outputs = [Place("--out", args.out / f"{args.name}{ending}") for ending in (".json", ".md")]
    check_places([Place("the table", args.table)], outputs)
    for output in outputs:
        check_owned(output.path)
    chosen = {name: getattr(args, name) for name in CHOICES if getattr(args, name)}
    rows = read_table(args.table, chosen, args.models)
    check_orders(rows, Allowed(args.trust_remote_code, args.allow_paths))
    more = with_more(rows, [s for s in args.seeds.split(",") if s], flags_of(args.flags, "--flags"))
    cells = cells_of(more, args.out)
    reads = dict.fromkeys(p for cell in cells for p in places_read(cell.request.session, [cell.request.run]))
    check_places(reads, [Place("--out", args.out, adds=True)])
    return groups_of(cells, args.rows_per_task)


def shown(args: argparse.Namespace, groups: Sequence[Sequence[Cell]], console: Any) -> bool:
    """Whether the commands or a job array were asked for instead of running them; they are printed then."""
    if args.dry_run:
        for number, cell in ((number, cell) for number, group in enumerate(groups) for cell in group):
            command = shlex.join(["python", cell.flags["command"], *words_of(cell.flags)])
            console.print(f"task {number}: {command}", soft_wrap=True)
    elif args.executor == "slurm":
        script = slurm(groups, args)
        sys.stdout.write(printable(script, keep="\n") if sys.stdout.isatty() else script)
    return args.dry_run or args.executor == "slurm"


def summarize(ran: Sequence[Cell], args: argparse.Namespace, console: Any) -> None:
    """Write and show what came of the rows, and their report."""
    summary = over_seeds(ran)
    ended = [
        {"flags": c.flags, "status": c.status, "message": c.message, "run_dir": str(c.request.output.run_dir)}
        for c in ran
    ]
    numbers = {"table": str(args.table), "rows": ended, "summary": summary}
    text = markdown(summary, args.table.stem)
    files = {f"{args.name}.json": (json.dumps(numbers, indent=2) + "\n").encode(), f"{args.name}.md": text.encode()}
    write_owned(args.out, files)
    for line in text.split("\n"):
        console.print(line, soft_wrap=True)
    done = [cell.request.output.run_dir for cell in ran if cell.status == DONE]
    if done and args.only_group is None:
        page = write_report([open_run(path) for path in done if path], args.out)
        console.print(f"report: {page}", soft_wrap=True)


def main() -> None:
    """Read, run, summarize."""
    from quant.cli.console import console as make_console

    started, args = time.perf_counter(), parsed()
    groups, console = planned(args), make_console()
    if shown(args, groups, console):
        return
    if args.only_group is not None:
        if not 0 <= args.only_group < len(groups):
            raise InputError(f"--only-group {args.only_group}: there are {len(groups)} tasks, from 0")
        groups = [groups[args.only_group]]
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        hold_lock(args.out / f"{args.name}.lock", f"the sweep in {args.out}"),
        Board(sum(groups, []), console) as board,
    ):
        if args.executor == "ray":
            work = with_ray(groups, args, board.moved)
        else:
            work = sum(run_group(group, args.together, board.moved, board.watch) for group in groups)
    ran = [cell for group in groups for cell in group]
    summarize(ran, args, console)
    total = time.perf_counter() - started
    failed = sum(cell.status == FAILED for cell in ran)
    own = f"{total:.1f} s, of which {max(0.0, total - work):.1f} s are the sweep's own"
    console.print(f"{len(ran)} rows, {failed} failed; {own}; {args.out / args.name}.json", soft_wrap=True)
    if failed:
        raise RunError(f"{failed} of {len(ran)} rows failed, see above")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
