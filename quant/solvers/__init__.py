"""Solvers by name: every file of this folder with a function under `@solver("name")`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.scaling import at_any_magnitude
from quant.core.types import QuantizedWeight, QuantSpec


class Solver(Protocol):
    """weight float [out, in], statistics of its inputs, the grid asked for -> codes. Pure: changes no input.

    Keyword options are the method's own (`num_iter`, `percdamp`, ...); the CLIs pass those that a solver names.
    """

    def __call__(self, weight: Tensor, stats: GramStats, spec: QuantSpec, /, **options: Any) -> QuantizedWeight:
        """Solve one layer."""


_solvers: dict[str, Callable[..., QuantizedWeight]] = {}


def solver(name: str) -> Callable[[Callable[..., QuantizedWeight]], Callable[..., QuantizedWeight]]:
    """Register a solver, for weights of any magnitude, under the name that the command line uses. Raises ValueError if it
    is taken."""

    def register(function: Callable[..., QuantizedWeight]) -> Callable[..., QuantizedWeight]:
        if name in _solvers and _solvers[name].__module__ != function.__module__:
            raise ValueError(f"solver {name!r} exists already in {_solvers[name].__module__}")
        _solvers[name] = at_any_magnitude(function)
        return _solvers[name]

    return register


def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def solvers() -> Mapping[str, Callable[..., QuantizedWeight]]:
    """Every solver of this folder, by name."""
    _import_all()
    return dict(sorted(_solvers.items()))


def get_solver(name: str) -> Callable[..., QuantizedWeight]:
    """The solver of that name. Raises InputError with the nearest names."""
    known = solvers()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    raise InputError(f"unknown method {name!r}; {hint}")


def solver_options(function: Callable[..., QuantizedWeight]) -> dict[str, Any]:
    """Keyword options of a solver with their defaults; the tensors and objects a run supplies are left out."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("grid", "init")
    }
