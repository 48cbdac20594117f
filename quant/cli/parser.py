"""The parser of every command line: all spellings of a flag, and the nearest flag for a misspelt one."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from typing import Any, NoReturn

from quant.core.errors import InputError
from quant.core.text import is_text


class Parser(argparse.ArgumentParser):
    """Accepts --group-size, --group_size and --groupsize alike; a misspelt flag is answered with the nearest one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after bringing every flag to its declared spelling."""
        given = list(sys.argv[1:] if args is None else args)
        for before, word in zip(["", *given], given, strict=False):
            if not is_text(word):
                flag = f"{before} " if before.startswith("--") and is_text(before) else ""
                self.error(f"{flag}{word!r} is not UTF-8 text: give another")
        declared = {_letters(flag): flag for flag in self._option_string_actions if flag.startswith("--")}
        spelt = [_respell(word, declared) for word in given]
        parsed, unknown = super().parse_known_args(spelt, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return parsed

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2 (see `quant.cli.errors`)."""
        raise InputError(message)


def _letters(flag: str) -> str:
    return re.sub("[-_]", "", flag).lower()


def _respell(word: str, declared: dict[str, str]) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return declared.get(_letters(flag), flag) + equals + value
