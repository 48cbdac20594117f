"""The tables of a sweep: what a .tsv or a .yaml says, as rows of flags with their places in the file."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from quant.core.errors import InputError
from quant.core.files import check_plain_file
from quant.core.text import brief

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


@dataclass(frozen=True)
class Row:
    """One command of a table. flags: values by name, as on the command line ("": a flag without a value), and ``command``.
    where: the row's place in the table; places: those of its entries. name: of the row, where the table names rows."""

    flags: dict[str, str]
    where: str
    places: dict[str, str] = field(default_factory=dict)
    name: str = ""


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


def words_of(flags: Mapping[str, str]) -> list[str]:
    """Flags as the words of a command line, of which each is one flag, whatever its value begins with. Raises InputError
    for names that are none."""
    for name in flags:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise InputError(f"{name!r} is not the name of a flag")
    return [f"--{name}={value}" if value else f"--{name}" for name, value in flags.items() if name != "command"]


def place_of(message: str, row: Row) -> str:
    """Where the entry stands that a mistake names; the row's place if it names none."""
    spelt = {re.sub("[-_]", "", name).lower(): place for name, place in row.places.items()}
    named = [re.sub("[-_]", "", flag).lower() for flag in re.findall(r"--([A-Za-z_-]+)", message)]
    return next((spelt[name] for name in named if name in spelt), row.where)
