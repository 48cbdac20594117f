"""Where a command reads and writes, checked against each other before anything is opened.

A place that is written must not be, contain or lie inside one that is read, or another that is written: a checkpoint
that is put in place would take the run directory, the model or the data with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.core.errors import InputError
from quant.core.files import resolve_links

SAME, INSIDE, AROUND = "is the same place as", "lies inside", "contains"
ALL = frozenset((SAME, INSIDE, AROUND))


@dataclass(frozen=True)
class Place:
    """A path with the flag that it came from.

    may: how a place that is written may lie to one that is read all the same. adds: files of their own names come to it
    and nothing else goes, so that it may lie in and around others of this kind. root: a directory that is read, in which
    named files are looked for, and into which others may be written.
    """

    flag: str
    path: Path
    may: frozenset[str] = frozenset()
    adds: bool = False
    root: bool = False

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"


def check_places(reads: Iterable[Place], writes: Sequence[Place]) -> None:
    """Raise InputError, naming both, for the first two places that get in each other's way; links and dots resolved.

    Also for a place to write that no file library can take: a loop of links, a name that is too long or not text.
    """
    for place in writes:
        try:
            os.fsencode(place.path).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{place.flag} {str(place.path)!r}: the name is not UTF-8; use another place") from error
        resolve_links(place.path)
    sources = list(reads)
    for number, target in enumerate(writes):
        for other in sources:
            relation = _relation(target.path, other.path)
            if relation in ALL - target.may - (frozenset((INSIDE,)) if other.root and target.adds else frozenset()):
                raise InputError(f"{target} {relation} {other}, which is read: use another place for {target.flag}")
        for other in writes[number + 1 :]:
            relation = _relation(target.path, other.path)
            if relation == SAME or (relation is not None and not (target.adds and other.adds)):
                raise InputError(
                    f"{target} {relation} {other}, which is written too: use another place for one of them"
                )


def _relation(first: Path, second: Path) -> str | None:
    """How two places lie to each other, in words; None where they are apart."""
    inside, around = _is_inside(first, second), _is_inside(second, first)
    if inside and around:
        return SAME
    return INSIDE if inside else AROUND if around else None


def _is_inside(path: Path, other: Path) -> bool:
    """Whether a place is another, or below it: by the files themselves where they exist (two spellings of one directory,
    upper and lower case, mounts), else by name."""
    path, other = resolve_links(path), resolve_links(other)
    if other == path or other in path.parents:
        return True
    return other.exists() and any(p.exists() and p.samefile(other) for p in (path, *path.parents))
