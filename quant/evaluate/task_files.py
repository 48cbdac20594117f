"""Files of tasks: no Python in them unless it is trusted, and their paths are taken from where they lie."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.core.errors import InputError, first_line
from quant.core.files import check_plain_file, resolve_links

LOCAL = (
    "json",
    "csv",
    "parquet",
    "text",
    "arrow",
    "pandas",
    "xml",
)  # names for `datasets` of a kind of file, not of a hub


def check_no_code(file: Path, seen: set[Path]) -> None:
    """Raise InputError where a task's YAML, or one that it includes, names Python to run (``!function``). seen: the files
    that were read, links resolved as lm-eval does; filled."""
    import yaml

    file = resolve_links(file)
    if file in seen:
        return
    seen.add(file)
    check_plain_file(file)
    try:
        root = yaml.compose(file.read_bytes(), Loader=yaml.SafeLoader)
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{file} is not a readable task ({first_line(error).splitlines()[0]})") from error
    nodes, known = [root] if root is not None else [], set()
    while nodes:
        node = nodes.pop()
        if id(node) in known:  # an alias
            continue
        known.add(id(node))
        if node.tag.startswith(("!", "tag:yaml.org,2002:python")):
            where = f"{file}, line {node.start_mark.line + 1}"
            raise InputError(f"{where}: {node.tag} runs Python; give --trust-remote-code if you trust the tasks")
        if isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
            included = [value for key, value in node.value if key.value == "include"]
            names = [part for value in included for part in (value.value if value.id == "sequence" else [value])]
            for name in names:
                check_no_code(file.parent / str(name.value), seen)
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value


def with_paths(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """A task's configuration, as read from a file, with the paths of its data absolute where they lie beside that file.

    What is not there is left to the working directory. Raises InputError that names both places where it is in neither.
    """
    source, options = config.get("dataset_path"), config.get("dataset_kwargs")
    if isinstance(source, str) and source not in LOCAL:  # a name on the hub, unless a directory is meant
        beside = file.parent / source
        return config | {"dataset_path": str(beside)} if beside.is_dir() else config
    if not isinstance(options, Mapping):
        return config
    final = source is not None  # else the file that includes this one says which kind of data they are
    keys = [key for key in ("data_files", "data_dir") if key in options]
    return config | {"dataset_kwargs": {**options, **{key: _locate(options[key], file, final) for key in keys}}}


def _locate(value: Any, file: Path, final: bool) -> Any:
    """A path, a list of paths or one by split, each from the directory of the file if it is there."""
    if isinstance(value, Mapping):
        return {key: _locate(part, file, final) for key, part in value.items()}
    if isinstance(value, list):
        return [_locate(part, file, final) for part in value]
    if not isinstance(value, str) or "://" in value:
        return value
    beside, here = file.parent / value, Path.cwd() / value  # the same where the path is absolute
    for place, root in ((beside, file.parent), (here, Path.cwd())):
        if place.exists():
            if not place.is_dir():
                check_plain_file(place)
                if place.stat().st_size == 0:
                    raise InputError(f"its data cannot be loaded: {file} names {value}, and {place} is empty")
            return glob.escape(str(place))  # a name is no pattern
        if not Path(value).is_absolute() and glob.glob(value, root_dir=root, recursive=True):  # noqa: PTH207
            return f"{glob.escape(str(root))}/{value}"
    if final:
        places = " nor ".join(map(str, dict.fromkeys((beside, here))))
        raise InputError(f"its data cannot be loaded: {file} names {value}, but there is no {places}")
    return value
