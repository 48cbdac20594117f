"""The two kinds of failure that a person can act on, and what libraries raise."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from quant.core.text import brief


class _LinesError(Exception):
    """Says what is wrong: an argument for each mistake, and each of them becomes a line of its own, whatever it holds."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class InputError(_LinesError, ValueError):
    """Bad arguments or unusable input: what is wrong and how to fix it, a line for each mistake; exit code 2."""


class RunError(_LinesError, RuntimeError):
    """A failure after work began: finished blocks stay resumable; exit code 1."""


def first_line(error: BaseException) -> str:
    """The first mistake that an error names, for a place with room for one; its type where it says nothing."""
    lines = error.args if isinstance(error, _LinesError) else ()
    return str(lines[0] if lines else error) or type(error).__name__


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, torch's on a device, or torch's on the host, which is known by its text alone."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    texts = "can't allocate memory|cannot allocate memory|not enough memory|out of memory"
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search(texts, str(error), re.IGNORECASE) is not None
    )


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Whatever a library raises from somebody's file becomes an InputError of one line: ``what`` is wrong, and why.

    Memory that runs out is nobody's mistake and passes.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _LinesError) or is_memory(error):
            raise
        lines = [line.strip().rstrip(":") for line in str(error).splitlines() if line.strip()]
        if isinstance(error, LookupError) or not lines:  # its text is the key alone
            lines = [type(error).__name__, *lines]
        raise InputError(f"{what} ({brief(': '.join(lines[:2]), 200)})") from error
