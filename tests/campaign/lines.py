"""Generated command lines: one bad value of a flag, and several flags that may not go together."""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from quant.cli.parser import Parser
from tests.campaign.mutations import make_thing, pick
from tests.campaign.processes import COMMANDS
from tests.campaign.stock import Stock

INTEGERS = [
    "x",
    "",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "0x10",
    "3,4",
    "0",
    "-1",
    "-2",
    "17",
    str(10**20),
    str(2**63),
    str(2**64),
    "9" * 5000,
]
FLOATS = [
    "x",
    "",
    "nan",
    "inf",
    "-inf",
    "1e309",
    "0",
    "-1",
    "-0.0",
    "1e308",
    "1e-320",
    "1e-45",
    "10" * 20,
    "1,5",
    "9" * 5000,
]
NAMES = [
    "",
    "x",
    ",",
    ",,x",
    "nothing/here",
    "-",
    "[/b]",
    "[red]x",
    "\x1b[31mred",
    "a\nerror: b",
    "\u202egpj",
    "x" * 5000,
    "=1+1",
    "{{7*7}}",
    "%s",
    "a b",
    "../x",
    "\udcff\udcfe",
    "C4",
]
PAIRS = [
    "x",
    "=",
    "=3",
    "x=",
    "num_iter=",
    "num_iter=nan",
    "num_iter=1e308",
    f"num_iter={10**20}",
    "num_iter=[",
    "percdamp=nan",
    "a=b=c",
    "x" * 5000,
]
THINGS = [
    "a pipe",
    "a directory",
    "a loop of links",
    "a link to nothing",
    "nothing",
    "a device",
    "a socket",
    "a file",
    "a full directory",
]
OUTPUTS = {
    "run_dir",
    "save",
    "save_dir",
    "out",
    "into",
    "output_dir",
    "cache_dir",
    "scales_output_path",
    "shifts_output_path",
}
RIGHT = {
    "int": ["1", "2", "3", "4", "8", "16"],
    "float": ["0.01", "0.5", "1", "2"],
    "str": ["x", "rtn", "gptq", "quantease", "demo"],
}
HARMLESS = {"net", "prompt"}  # any text is right


@dataclass(frozen=True)
class Line:
    """A generated command line. codes: exit codes that are right. most: lines of mistakes. reads: a directory that it
    must leave alone."""

    words: list[object]
    about: str
    codes: tuple[int, ...] = (0, 2)
    most: int = 1


def actions(command: str) -> list[argparse.Action]:
    """The flags and places of a command, from its own parser."""

    class Seen(Exception):  # noqa: N818
        pass

    def see(parser: Parser, *_: Any) -> None:
        raise Seen(parser)

    with mock.patch.object(Parser, "parse_args", see), mock.patch.object(sys, "argv", [command]):
        try:
            importlib.import_module(COMMANDS[command]).main()
        except Seen as seen:
            return [a for a in seen.args[0]._actions if a.dest not in ("help", "list")]
    raise AssertionError(f"{command} parsed nothing")


def kind_of(action: argparse.Action) -> str:
    """What a flag takes."""
    if action.nargs == 0:
        return "switch"
    if action.choices is not None:
        return "choice"
    return {int: "int", float: "float", Path: "place"}.get(
        action.type, "pair" if isinstance(action.default, list) else "str"
    )  # type: ignore[arg-type]


def place(rng: Random, base: Path) -> tuple[str, str]:
    """A path below ``base`` where something is that is not what was expected: (the path, what is there)."""
    name = rng.choice(["plain", "[/b]", "[bold]x", "\x1b[2J", "a\nb", "\u202egpj", "b\udcffd", "=x", "n" * 250])
    kind, base = rng.choice(THINGS), base / str(rng.randrange(10**6))
    path = base / name
    if rng.random() < 0.15:
        long = rng.choice(["p" * 300, "p/" * 2500, "x" * 4096])
        return str(base / long), f"a path of {len(long)} letters"
    if kind in ("a file", "a full directory"):
        path.parent.mkdir(parents=True)
        if kind == "a full directory":
            path.mkdir()
            path /= "precious.txt"
        path.write_text("precious")
        path = base / name
    else:
        make_thing(path, kind)
    return str(path), f"{kind} named {name[:20]!r}"


def bad_value(rng: Random, action: argparse.Action, folder: Path) -> tuple[str, str, bool]:
    """A bad value of a flag, what it is, and whether it must be refused."""
    kind = kind_of(action)
    if kind == "place":
        path, about = place(rng, folder / ("out" if action.dest in OUTPUTS else "in"))
        return path, about, action.dest not in OUTPUTS and "named" not in about
    values = {"int": INTEGERS, "float": FLOATS, "choice": NAMES, "str": NAMES, "pair": PAIRS, "switch": NAMES}[kind]
    value = rng.choice(values)
    if kind == "str" and action.dest in ("model", "dataset", "calib_dataset", "eval_datasets") and rng.random() < 0.5:
        return *place(rng, folder / "in"), False
    must = {
        "int": not value.lstrip("-").isdigit(),
        "float": value in ("x", "", "nan", "1,5"),
        "choice": True,
        "switch": True,
    }
    return value, repr(value[:40]), must.get(kind, False)


def one_flag(rng: Random, stock: Stock, folder: Path) -> Line:
    """A right command line with one bad value, or one flag that is misspelt or has no value."""
    command = rng.choice([*COMMANDS, "model_quantizer.py", "main.py"])
    words = stock.right(command, folder)
    action = pick(rng, actions(command), lambda a: a.dest)
    flag = rng.choice(action.option_strings or [""])
    if flag and rng.random() < 0.1:
        wrong = rng.choice(
            [
                [flag],
                [flag + "x", "1"],
                [flag[:-1] + "=" + "x" * 3000],
                ["--" + "z" * 3000],
                ["surplus", "words"],
                ["--"],
                ["-" + flag],
            ]
        )
        return Line([*words, *wrong], f"{wrong[0][:30]} alone or misspelt", (0, 2))
    value, about, refused = bad_value(rng, action, folder)
    if not flag:  # a place of its own: it is the first word
        words[1] = value
    elif kind_of(action) == "switch" or rng.random() < 0.5:
        words.append(f"{flag}={value}")
    else:
        words += [flag, value]
        refused = refused and not value.startswith("--")
    refused = refused and action.dest not in HARMLESS
    return Line(
        words, f"{flag or action.dest}: {about}", (2,) if refused else (0, 2), most=2
    )  # it may need another flag


def several_flags(rng: Random, stock: Stock, folder: Path) -> Line:
    """A right command line with two to five more flags at once, most of them with values that are right alone."""
    command = rng.choice(["model_quantizer.py", "main.py", "main.py", *(name for name in COMMANDS if name != "report")])
    words, names = stock.right(command, folder), []
    known = [
        a for a in actions(command) if a.option_strings and a.dest not in ("log_level", "executor", "address", *OUTPUTS)
    ]
    for _ in range(rng.randrange(2, 6)):
        action = pick(rng, known, lambda a: a.dest)
        kind, flag = kind_of(action), action.option_strings[0]
        if kind == "switch":
            words.append(flag)
        elif kind == "place" or rng.random() < 0.1:
            words.append(f"{flag}={bad_value(rng, action, folder)[0]}")
        else:
            values = list(action.choices or RIGHT.get(kind, RIGHT["int"] if kind == "int" else ["num_iter=2"]))
            words.append(f"{flag}={rng.choice(values)}")
        names.append(flag)
    return Line(words, " ".join(names), (0, 1, 2), most=8)


def shown(words: tuple[str, ...]) -> str:
    """A command line as a person would type it, and as a report can print it."""
    import shlex

    first = {"sweep": "python -m scripts.sweep"}.get(
        words[0], f"python -m quant {words[0]}" if "." not in words[0] else f"python {words[0]}"
    )
    return ascii(f"{first} {shlex.join(w if len(w) < 300 else f'{w[:40]}...({len(w)} letters)' for w in words[1:])}")[
        1:-1
    ]
