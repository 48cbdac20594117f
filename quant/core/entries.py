"""Entries of a JSON file as the types that its reader declares: each is of its type, or one line names it.

A file may be older than the reader, edited or damaged. `entries_as` reads it by a TypedDict: an entry that is not there is
None where its type allows that, and empty where it is a dict or a list; entries that are not declared stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from quant.core.errors import InputError

T = TypeVar("T")
Measured = Annotated[float, "may be infinite or no number"]  # of a model that broke; every other float is finite
LARGEST_INT, LARGEST_FLOAT = 2**63, 1e100  # beyond them are no sizes and no measurements, and their products overflow
DEEPEST = 50
KINDS = {
    bool: "true or false",
    int: "a whole number below 2^63",
    float: "a finite number below 1e100",
    str: "a text",
    list: "a list",
    dict: "an object",
}
MISSING: Any = object()


def entries_as(kind: type[T], value: Any, origin: str) -> T:
    """A JSON value as a TypedDict. origin: the file, for errors. Raises InputError that names the first other entry."""
    entries: T = _read(kind, value, origin, "")
    return entries


def _read(kind: Any, value: Any, origin: str, name: str) -> Any:
    """The value of one entry, called by its dotted name, as its type."""
    base, arguments = get_origin(kind), get_args(kind)
    if base in (Union, UnionType):
        if value is None or value is MISSING:
            return None
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return _read(kind, value, origin, name)
    if base is Annotated:
        broken = isinstance(value, float) and not math.isfinite(value)
        return value if broken else _read(arguments[0], value, origin, name)
    if kind is Any:
        return _not_deeper(value, origin, name)
    plain = dict if is_typeddict(kind) else list if base is tuple else base or kind
    if value is MISSING and plain in (dict, list) and base is not tuple:
        value = plain()
    if base is Literal:
        expected, legal = " or ".join(map(repr, arguments)), isinstance(value, str) and value in arguments
    else:
        expected, legal = KINDS[plain], _is_plain(plain, value)
    if base is tuple and legal:
        expected, legal = f"a list of {len(arguments)} numbers", len(value) == len(arguments)
    if not legal:
        _refuse(value, expected, origin, name)
    return _inner(kind, value, origin, name)


def _inner(kind: Any, value: Any, origin: str, name: str) -> Any:
    """A legal value with what it contains read too."""
    base, arguments = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        declared = {k: _read(its, value.get(k, MISSING), origin, _join(name, k)) for k, its in _hints(kind).items()}
        rest = {k: _not_deeper(v, origin, _join(name, k)) for k, v in value.items() if k not in declared}
        return {
            k: declared[k] if k in declared else rest[k] for k in (*value, *(d for d in declared if d not in value))
        }
    if base is dict:
        return {key: _read(arguments[1], inner, origin, _join(name, key)) for key, inner in value.items()}
    if base in (list, tuple):
        kinds = arguments if base is tuple else arguments * len(value)
        return [_read(k, v, origin, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))]
    return value


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_plain(kind: type, value: Any) -> bool:
    """Whether a value is of a type of JSON, and a number of a size that was measured or counted."""
    if kind in (int, float):
        number = not isinstance(value, bool) and isinstance(value, int if kind is int else int | float)
        return number and abs(value) <= (LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT)
    return isinstance(value, kind)


def _not_deeper(value: Any, origin: str, name: str, depth: int = 0) -> Any:
    """A value of any type, nested as files are that something can write again."""
    if depth > DEEPEST:
        raise InputError(f"{origin}: {name} is nested too deep")
    inner: Sequence[Any] = value if isinstance(value, list) else [*value.values()] if isinstance(value, dict) else ()
    for one in inner:
        _not_deeper(one, origin, name, depth + 1)
    return value


def _refuse(value: Any, expected: str, origin: str, name: str) -> None:
    said = "is missing" if value is MISSING else f"is {_show(value)}"
    raise InputError(f"{origin}: {name or 'all of it'} {said}, and has to be {expected}")


def _show(value: Any) -> str:
    """A value in an error line: numbers and texts themselves, briefly; for others their kind."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | float):
        return repr(value)[:60]
    if isinstance(value, int):
        return f"{value}" if abs(value) <= LARGEST_INT else "larger than 2^63"
    return KINDS[type(value)]
