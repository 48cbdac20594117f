"""Options of solvers: from their flags and from --solver-option, by what the solvers' files say."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quant.cli.flags import OPTIONS, QUANTIZER, TABLE, Flag
from quant.core.errors import InputError
from quant.core.names import AUTO_SCOPE, AUTOROUND, TUNED_METHODS
from quant.solvers import check_name as check_method
from quant.solvers import entries

OPTION_FLAGS = {flag.dest(QUANTIZER): flag for flag in TABLE if flag.field == OPTIONS}


def solver_of(method: str) -> str:
    """The solver that a method begins with."""
    return TUNED_METHODS.get(method, method)


def tuning_of(args: argparse.Namespace, command: str, method: str | None) -> Any:
    """How the method's answers are tuned: as flags say, and as the method has it where they say nothing; None: not at all."""
    from quant.cli.arguments import values_of
    from quant.tune.config import AUTOROUND_TUNING, Tuning

    if method not in TUNED_METHODS and not args.tune:
        return None
    usual = AUTOROUND_TUNING if method == AUTOROUND else Tuning()
    given = {name: value for name, value in values_of(args, command, "tuning").items() if value is not None}
    scope, _, window = given.pop("scope", usual.scope).partition(":")
    given |= {"scope": "model" if scope == AUTO_SCOPE else scope, "window": int(window or 1)}
    return replace(usual, **given)


def choices_made(args: argparse.Namespace, requests: Sequence[Any]) -> list[str]:
    """A line for every run of which the memory decided what is tuned, on which text."""
    runs = [request.run for request in requests] if args.tune == AUTO_SCOPE else []
    return [f"{run.method}: --tune auto is --tune {run.tuning.name} here; data {run.dataset}" for run in runs]


def method_mistakes(args: argparse.Namespace, methods: Sequence[str], flag: str = "") -> list[str]:
    """What is wrong with the names of the methods, said after the flag that names them, and with --solver-option."""
    lines: list[str] = []
    for method in methods:
        try:
            check_method(solver_of(method))
        except InputError as error:
            lines.append(f"{flag}{error}")
            continue
        try:
            options_of(args, method)
        except InputError as error:
            lines += error.args
    return lines


def options_of(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """The options that the method's function names, from the flags of `solver_flags` and from --solver-option."""
    accepted = entries()[solver_of(method)].options or {}
    options = {name: getattr(args, name) for name in accepted if name in args.solver_flags}
    for pair in args.solver_option:
        key, equals, value = pair.partition("=")
        key = key.replace("-", "_")
        if not equals or key not in accepted:
            raise InputError(
                f"--solver-option {pair}: {method} takes {', '.join(accepted) or 'no options'} as KEY=VALUE"
            )
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # no literal, or one nested too deeply
            options[key] = value
        if accepted[key] is not None and not isinstance(options[key], type(accepted[key])):
            raise InputError(f"--solver-option {pair}: {key} is a {type(accepted[key]).__name__}")
        flag = OPTION_FLAGS.get(key, Flag(OPTIONS, {QUANTIZER: f"--{key}"}))
        if wrong := flag.mistake(QUANTIZER, options[key]):
            raise InputError(f"--solver-option {key}{wrong}")
    return options


def unused_options(args: argparse.Namespace, parser: argparse.ArgumentParser, methods: Sequence[str]) -> list[str]:
    """A line for every flag of a method's option that was given, where none of the methods has that option."""
    known = {name: entry.options or {} for name, entry in entries().items()}
    taken = {option for method in methods for option in known.get(solver_of(method), {})}
    given = [
        option
        for option in dict.fromkeys(option for options in known.values() for option in options)
        if option not in taken and option in args.solver_flags and getattr(args, option) != parser.get_default(option)
    ]
    return [
        f"--{option.replace('_', '-')} is an option of {', '.join(n for n, o in known.items() if option in o)}, "
        f"not of {', '.join(methods)}"
        for option in given
    ]
