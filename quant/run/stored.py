"""What may be taken from a request that was stored: in a run's manifest, or in a table of runs.

Such a file may come from elsewhere. It says what a run was; what is executed, opened or written is said by the flags of
the command that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quant.core.errors import InputError

CODE = ("trust_remote_code",)
WRITES = ("run_dir", "runs", "save", "cache_dir", "overwrite")
READS = ("dataset", "eval_datasets", "data_dir", "task_path", "act_scales", "act_shifts", "resume")
FIELDS = {"calib_dataset": "dataset", "output_dir": "runs", "save_dir": "save"}  # of flags that are called otherwise


@dataclass(frozen=True)
class Allowed:
    """What the flags of the reading command allow. paths: to read the files that the request names."""

    trust_remote_code: bool = False
    paths: bool = False


NOTHING_ALLOWED = Allowed()


def allowed_entries(stored: Mapping[str, Any], origin: str, allowed: Allowed) -> dict[str, Any]:
    """The entries of a stored request that count, by name: all but those that say where to write.

    stored: fields of a RunConfig, or what a command line's parser made of flags, by its names. origin: where it is stored.
    Raises InputError for code, or for files to read, that the reading command's own flags do not allow.
    """
    kept: dict[str, Any] = {}
    for key, value in stored.items():
        name = FIELDS.get(key, key)
        if name in CODE and _is_on(value) and not allowed.trust_remote_code:
            raise InputError(
                f"{origin} asks for --trust-remote-code, which runs Python that comes with the model: "
                "give that flag to this command if you trust the model"
            )
        if name in READS and not allowed.paths and (path := next(_paths(name, value), None)):
            raise InputError(
                f"{origin} names a file to read ({name}: {path}): give --allow-paths if you know that it is meant"
            )
        if name not in WRITES:
            kept[key] = value
    return kept


def ordered_places(stored: Mapping[str, Any]) -> list[str]:
    """The entries of a request that say where to write, or that something may be replaced."""
    return [key for key, value in stored.items() if FIELDS.get(key, key) in WRITES and value not in (None, False)]


def _is_on(value: Any) -> bool:
    """Whether a flag without a value is given: true in JSON, an empty text among the flags of a table."""
    return value not in (False, None)


def _paths(name: str, value: Any) -> Iterator[str]:
    """What of an entry is a path and not the name of a data set."""
    from data.corpora import is_file
    from data.written import text_of

    values = value if isinstance(value, list | tuple) else str(value).split(",") if value else ()
    for one in values:
        text = text_of(str(one)) if name == "dataset" else str(one)  # beside what the model writes
        if name not in ("dataset", "eval_datasets") or (text is not None and is_file(text)):
            yield str(one)
