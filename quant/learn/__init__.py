"""Learned methods by name: every file of this folder with a function under `@recipe("name")`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

_recipes: dict[str, Callable[..., Any]] = {}


def recipe(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what a paper makes of the learning asked for: (Learning, wbits, abits) -> Learning, for main.py."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _recipes[name] = function
        return function

    return register


def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def recipes() -> Mapping[str, Callable[..., Any]]:
    """Every learned method of this folder, by name."""
    _import_all()
    return dict(sorted(_recipes.items()))
