"""Functions that the files of a folder register under names, read from their source: nothing is imported for it."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib.machinery import FileFinder
from pathlib import Path
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A function under a decorator with a name: first line of its file's docstring; its keyword options with their
    defaults, or None where a default is no literal."""

    about: str
    options: dict[str, Any] | None


def registrations(folders: Iterable[str], decorator: str) -> dict[str, Entry]:
    """Every function under ``@decorator("name", ...)`` in the files of the folders, by name, in the order of the names."""
    entries: dict[str, Entry] = {}
    for module in pkgutil.iter_modules(folders):
        assert isinstance(module.module_finder, FileFinder)
        path = Path(module.module_finder.path) / f"{module.name}.py"
        entries |= _entries(path.read_text(encoding="utf-8"), decorator) if path.is_file() else {}
    return dict(sorted(entries.items()))


@cache
def _entries(source: str, decorator: str) -> dict[str, Entry]:
    tree = ast.parse(source)
    about = (ast.get_docstring(tree) or "").strip().partition("\n")[0]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {name: Entry(about, _options(f)) for f in functions for name in _names(f, decorator)}


def _names(function: ast.FunctionDef, decorator: str) -> list[str]:
    calls = [node for node in function.decorator_list if isinstance(node, ast.Call) and node.args]
    named = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == decorator]
    return [call.args[0].value for call in named if isinstance(call.args[0], ast.Constant)]  # type: ignore[misc]


def _options(function: ast.FunctionDef) -> dict[str, Any] | None:
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    try:
        return {arg.arg: ast.literal_eval(value) for arg, value in pairs if value is not None}
    except ValueError:
        return None
