"""Learned methods and their ingredients by name: every file of this folder that registers some.

A paper's file holds the paper: the ingredients that are its own, and a `recipe` that says which ones it takes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from quant.core.errors import InputError
from quant.core.sources import Entry, registrations

Registered = TypeVar("Registered")


class Registry:
    """Functions or classes under names; ``@registry("name")`` adds one. Raises ValueError if the name is taken."""

    def __init__(self) -> None:
        self._entries: dict[str, Any] = {}

    def __call__(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator that adds what it decorates."""

        def register(entry: Registered) -> Registered:
            taken = self._entries.setdefault(name, entry)
            if taken.__module__ != entry.__module__:
                raise ValueError(f"{name!r} exists already in {taken.__module__}")
            self._entries[name] = entry
            return entry

        return register

    def entries(self) -> Mapping[str, Any]:
        """All of them, by name; imports the files of this folder."""
        for module in pkgutil.iter_modules(__path__):
            importlib.import_module(f"{__name__}.{module.name}")
        return dict(sorted(self._entries.items()))

    def pick(self, names: Iterable[str]) -> list[Any]:
        """The named ones, in that order. Raises InputError where there is none of a name."""
        names, entries = list(names), self.entries()
        unknown = sorted(set(names) - set(entries))
        if unknown:
            raise InputError(f"nothing to learn is called {unknown[0]!r}; known: {', '.join(entries)}")
        return [entries[name] for name in names]


recipe = Registry()  # (Learning asked for, wbits, abits) -> Learning, under the name of main.py's --method
ingredient = Registry()  # Block -> the Parametrizations that are learned of it
transform = Registry()  # Transform that takes the place of a scale where its `stands_at` says so
loss_term = Registry()  # (out, target) [n, T, hidden] -> scalar, for every target
attention_term = Registry()  # (logits, those of the full-precision block) [n, heads, T, T] -> scalar


def recipes() -> Mapping[str, Callable[..., Any]]:
    """Every learned method of this folder, by name."""
    return recipe.entries()


def recipe_entries() -> Mapping[str, Entry]:
    """What the files of this folder say of every learned method, by name; none of them is imported."""
    return registrations(__path__, "recipe")
