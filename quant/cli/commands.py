"""python -m quant COMMAND: one command, chosen by its name; nothing of the others is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from quant.cli.errors import exit_code_of
from quant.core.errors import InputError

COMMANDS = {
    "evaluate": "perplexity and task scores of a checkpoint",
    "generate": "let a quantized model continue a prompt",
    "report": "a page of finished runs; report compare: what differs between them",
    "repeat": "run a finished run again, and say whether the result is the same",
    "convert": "the codes of a run or a checkpoint in another format",
}


def run(words: Sequence[str]) -> int:
    """Run the command that the first word names; its exit code."""
    return exit_code_of(lambda: _run(list(words)), shared=list(words[:1]) == ["evaluate"])


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:10} {about}" for name, about in COMMANDS.items()]
        sys.stdout.write("\n".join(["usage: python -m quant COMMAND ...", "", *lines, ""]))
        return
    if words[0] not in COMMANDS:
        raise InputError(f"unknown command {words[0]!r}; use {', '.join(COMMANDS)}")
    sys.argv = [f"quant {words[0]}", *words[1:]]
    importlib.import_module(f"quant.cli.{words[0]}").main()
