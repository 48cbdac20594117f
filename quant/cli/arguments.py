"""What the table of flags is read for: a command line's parser, its mistakes flag by flag, and the values of a run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from data.corpora import CALIBRATION, KNOWN, check_source
from models.names import check_name
from quant.cli.errors import set_logging
from quant.cli.flags import OPTIONS, QUANTIZER, TABLE, Flag
from quant.cli.parser import Parser
from quant.core.errors import InputError


def flags_of(command: str, table: Sequence[Flag] = TABLE) -> list[Flag]:
    """The flags of a table that a command line has."""
    return [flag for flag in table if command in flag.names]


def build_parser(command: str, description: str | None, examples: str | None = None) -> Parser:
    """The parser of a command line with its flags of the table."""
    parser = bare_parser(command, description, examples)
    add_flags(parser, command)
    return parser


def bare_parser(command: str, description: str | None, examples: str | None = None) -> Parser:
    """A parser that has no flags yet."""
    return Parser(
        prog=command, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_flags(parser: Parser, command: str, table: Sequence[Flag] = TABLE) -> None:
    """Add the flags of the table, in its order, in their groups. ``solver_flags`` of what is parsed names the options of
    solvers: only these reach one, any other flag may have the name of an option by chance."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in flags_of(command, table):
        title = flag.of(command, "group")
        if title is not None and title not in groups:
            groups[title] = parser.add_argument_group(title)
        place = parser if title is None else groups[title]
        place.add_argument(*flag.names[command].split(), **_settings(flag, command))
    options = tuple(flag.dest(command) for flag in flags_of(command, table) if flag.field == OPTIONS)
    parser.set_defaults(**({"solver_flags": options} if options else {}))


def _settings(flag: Flag, command: str) -> dict[str, Any]:
    """What argparse is told of a flag besides its names."""
    about = flag.of(command, "help")
    if flag.type is bool:
        return {"action": "store_true", "help": about}
    if flag.type is list:
        return {"action": "append", "default": [], "metavar": flag.metavar, "help": about}
    settings = {"default": flag.of(command, "default"), "metavar": flag.metavar, "help": about}
    return settings | {"type": flag.type, "choices": flag.choices, "required": command in flag.required}


def parse(parser: Parser, words: Sequence[str] | None = None) -> Any:
    """The flags of the command that was given, with logging as they ask for it; None after --list, which says its part."""
    args = parser.parse_args(words)
    set_logging(args.log_level)
    if not getattr(args, "list", False):
        return args
    from quant.cli.listing import show_list

    show_list()
    return None


def flag_mistakes(args: argparse.Namespace, command: str, table: Sequence[Flag] = TABLE) -> list[str]:
    """What is wrong with each flag by itself."""
    lines = []
    for flag in flags_of(command, table):
        value = getattr(args, flag.dest(command))
        if not value and (missing := flag.of(command, "missing")):
            lines.append(missing)
        if wrong := flag.mistake(command, value):
            lines.append(flag.name(command) + wrong)
    return lines


def source_mistakes(evaluated: Sequence[str], calibration: str | None) -> list[str]:
    """What is wrong with the names or files of data sets. calibration: None where no windows are drawn."""
    lines: list[str] = []
    for source, known in [(s, KNOWN) for s in evaluated] + ([(calibration, CALIBRATION)] if calibration else []):
        try:
            check_source(source, known)
        except InputError as error:
            lines += error.args
    return lines


def place_mistakes(args: argparse.Namespace) -> list[str]:
    """What is wrong with --model and --device before anything is opened."""
    lines: list[str] = []
    for check, given in ((check_name, args.model), (check_device, args.device)):
        try:
            if given:
                check(given)
        except InputError as error:
            lines += error.args
    return lines


def check_device(name: str) -> None:
    """Raise InputError, as `quant.core.env.pick_device` does, for a device that is not there; torch is asked of CUDA."""
    if name in ("auto", "cpu"):
        return
    if not re.fullmatch(r"(cpu|cuda)(:\d+)?", name):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    from quant.core.env import pick_device

    pick_device(name)


def values_of(args: argparse.Namespace, command: str, part: str = "") -> dict[str, Any]:
    """What the flags say of a request's fields, or of those of a part of a run: ``learning``, ``transform``, ``act``."""
    fields = [(flag, *_split(flag.field)) for flag in flags_of(command) if flag.field not in (None, OPTIONS)]
    return {name: flag.value(getattr(args, flag.dest(command))) for flag, where, name in fields if where == part}


def _split(field: str | None) -> tuple[str, str]:
    where, _, name = (field or "").rpartition(".")
    return where, name


def in_words_of(command: str, line: str) -> str:
    """A message of a run, which names flags as model_quantizer.py does, with the names of another command line."""
    for flag in flags_of(command):
        if QUANTIZER in flag.names:
            line = re.sub(rf"(?<!\S){re.escape(flag.name(QUANTIZER))}(?![\w-])", flag.name(command), line)
    return line
