"""How a family's checkpoints store what the library's modules compute with: under other names, several matrices stacked in
one tensor, or transposed. Readers and writers of checkpoints ask here; all else knows the modules' names alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command lines name families before torch is there
    from torch import Tensor

NUMBER = "#"  # in names of a layout: any number


@dataclass(frozen=True)
class Stack:
    """A tensor [n, rows, columns] that holds the weights of ``modules`` of every ``#``, one below the other in equal parts.

    name: end of its name, in the spelling of the modules.
    """

    name: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """renamed: (as checkpoints have it, as the module has it) for parts of names between dots, the first that fits counts.
    stacked: tensors that some checkpoints have in the place of one for each expert; what is written has the latter.
    transposed: ends of the names of weights [in, out] on disk, where linears hold [out, in].
    """

    renamed: tuple[tuple[str, str], ...] = ()
    stacked: tuple[Stack, ...] = ()
    transposed: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether checkpoints hold the tensors as the modules do."""
        return not (self.renamed or self.stacked or self.transposed)

    def in_module(self, stored: str) -> str:
        """The module's name for a name of a checkpoint."""
        return _renamed(stored, self.renamed)

    def on_disk(self, name: str) -> str:
        """The checkpoint's name for a module's name, of a tensor or of what stands in its place."""
        return _renamed(name, tuple((new, old) for old, new in self.renamed))

    def stack_of(self, name: str) -> Stack | None:
        """The stack that a tensor is, by its name in the module's spelling; None where it is none."""
        return next((stack for stack in self.stacked if name.endswith(f".{stack.name}")), None)

    def is_transposed(self, name: str) -> bool:
        """Whether checkpoints hold the transpose of the module's tensor of this name."""
        return any(name.endswith(f".{end}") for end in self.transposed)

    def written(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        """A module's tensor as a checkpoint holds it: its name there, and its values."""
        value = tensor.t().contiguous() if self.is_transposed(name) else tensor
        return self.on_disk(name), value


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        pattern, replacement = _expression(old, new)
        changed, count = pattern.subn(replacement, name, count=1)
        if count:
            return changed
    return name


@cache
def _expression(old: str, new: str) -> tuple[re.Pattern[str], str]:
    """A regular expression for whole parts of names, and what takes their place; numbers stay."""
    pattern = re.escape(old).replace(re.escape(NUMBER), r"(\d+)")
    counts = iter(range(1, new.count(NUMBER) + 1))
    replacement = re.sub(NUMBER, lambda _: rf"\g<{next(counts)}>", new)
    return re.compile(rf"(?<![^.]){pattern}(?![^.])"), replacement
