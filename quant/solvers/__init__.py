"""Solvers by name: every file of this folder with a function under `@solver("name")`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from quant.core.errors import InputError
from quant.core.sources import Entry, registrations

if TYPE_CHECKING:  # names and options are known without torch
    from quant.core.types import QuantizedWeight

# (weight float [out, in], `GramStats` of its inputs, `QuantSpec` asked for, **options) -> answer. Pure: changes no input.
# Keyword options are the method's own (`num_iter`, `percdamp`, ...); the command lines pass those that a solver names.
Solver = Callable[..., "QuantizedWeight"]
Options = Mapping[str, Any]  # all options that a solver names, with its defaults where none were given


class Declaration(NamedTuple):
    """What must be known of a solver before it runs.

    outliers: whether its answers may hold more than codes on a grid whose scales are stored as they are. workspace: bytes of
    its largest phase for (out, in, options, group size), the weight included, the Gram matrix not. rows_coupled: whether
    rows of the answer depend on each other. starts_at_nearest: whether (options, group size) make it begin with the grid
    that rounding to nearest has, so that it may be given that one. uses_cross: whether it asks for statistics with the
    inputs of the original model (`GramStats.cross`). outlier_bits: of a weight, for outliers, where known beforehand.
    stacks: whether, with these options, it solves layers of one shape at once (`quant.core.stacks.StackedStats`).
    label: what tables say of the options behind the solver's name. flops: of its matrix products and factors for (out, in,
    options); 0 where they are not what it takes.
    """

    outliers: Callable[[Options], bool] = lambda options: False
    workspace: Callable[[int, int, Options, int], float] = lambda n_out, n_in, options, group_size: 0.0
    rows_coupled: bool = False
    starts_at_nearest: Callable[[Options, int], bool] = lambda options, group_size: False
    uses_cross: bool = False
    outlier_bits: Callable[[Options], float] = lambda options: 0.0
    stacks: Callable[[Options], bool] = lambda options: False
    label: Callable[[Options], str] = lambda options: ""
    flops: Callable[[int, int, Options], float] = lambda n_out, n_in, options: 0.0


SUPPLIED = ("grid", "init")  # keyword arguments that a run gives, not a person

_solvers: dict[str, Solver] = {}
_declarations: dict[str, Declaration] = {}


def solver(name: str, **declared: Any) -> Callable[[Solver], Solver]:
    """Register a solver, for weights of any magnitude, under the name that the command line uses. Raises ValueError if it
    is taken. declared: fields of `Declaration`; the defaults fit a solver that takes no more memory than measuring its
    error does."""
    declaration = Declaration(**declared)

    def register(function: Solver) -> Solver:
        from quant.core.scaling import at_any_magnitude

        if name in _solvers and _solvers[name].__module__ != function.__module__:
            raise ValueError(f"solver {name!r} exists already in {_solvers[name].__module__}")
        _solvers[name], _declarations[name] = at_any_magnitude(function), declaration
        return _solvers[name]

    return register


def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def solvers() -> Mapping[str, Solver]:
    """Every solver of this folder, by name."""
    _import_all()
    return dict(sorted(_solvers.items()))


def get_solver(name: str) -> Solver:
    """The solver of that name. Raises InputError with the nearest names."""
    known = solvers()
    if name in known:
        return known[name]
    raise _unknown(name, known)


def check_name(name: str) -> None:
    """Raise InputError, as `get_solver` does, for the name of no solver; no file of this folder is imported."""
    known = entries()
    if name not in known:
        raise _unknown(name, known)


def entries() -> Mapping[str, Entry]:
    """What the files of this folder say of every solver, by name; none of them is imported, but where the default of an
    option is no literal."""
    registered = registrations(__path__, "solver")
    return {name: entry._replace(options=_options_of(name, entry)) for name, entry in registered.items()}


def _options_of(name: str, entry: Entry) -> dict[str, Any]:
    if entry.options is None:
        return solver_options(get_solver(name))
    return {option: default for option, default in entry.options.items() if option not in SUPPLIED}


def _unknown(name: str, known: Mapping[str, Any]) -> InputError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return InputError(f"unknown method {name!r}; {hint}")


def declaration_of(name: str) -> Declaration:
    """What the solver of that name declares. Raises InputError with the nearest names."""
    get_solver(name)
    return _declarations[name]


def declaration_for(function: Solver) -> Declaration:
    """What a solver declares; the defaults for one that is in no file of this folder."""
    name = next((name for name, own in _solvers.items() if own is function), None)
    return Declaration() if name is None else _declarations[name]


def solver_options(function: Solver) -> dict[str, Any]:
    """Keyword options of a solver with their defaults; the tensors and objects a run supplies are left out."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in SUPPLIED
    }


def with_defaults(name: str, options: Options) -> dict[str, Any]:
    """All options of the solver of that name: those given, and the defaults of the others."""
    return solver_options(get_solver(name)) | dict(options)
