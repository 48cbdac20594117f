"""Names of calibration windows that a model writes itself: ``self``, ``self:N``, or behind another source ``SOURCE+self:N``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quant.core.errors import InputError

MOST = 10**7  # windows
NAME = re.compile(r"(?:(?P<beside>.+)\+)?self(?::(?P<n>[0-9]+))?")


@dataclass(frozen=True)
class Written:
    """What of a source the model writes. beside: the source whose --nsamples windows come first; n: windows, None for
    --nsamples."""

    beside: str | None
    n: int | None


def written(source: str) -> Written | None:
    """What the model writes of a source; None for a source of text alone. Raises InputError for 0 windows."""
    match = NAME.fullmatch(source)
    if match is None:
        return None
    n = None if match["n"] is None else int(match["n"])
    if match["beside"] is not None and NAME.fullmatch(match["beside"]):
        raise InputError(f"--dataset {source}: the model writes once; use self, self:N or SOURCE+self:N")
    if n is not None and n > MOST:
        raise InputError(f"--dataset {source}: use at most {MOST} windows")
    if n == 0:
        raise InputError(f"--dataset {source}: 0 windows; use self, self:N or SOURCE+self:N with N of 1 or more")
    return Written(match["beside"], n)


def text_of(source: str) -> str | None:
    """The part of a source that is text; None where the model writes all of it."""
    own = written(source)
    return source if own is None else own.beside


def windows_of(source: str, nsamples: int) -> int:
    """How many windows a source has, of which --nsamples are asked for."""
    own = written(source)
    if own is None:
        return nsamples
    return (nsamples if own.beside else 0) + (own.n or nsamples)
