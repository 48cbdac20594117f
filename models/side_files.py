"""What belongs to a model besides its weights, and whether it is the model's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from quant.core.errors import InputError
from quant.core.files import resolve_links

ABOUT = (
    "README*",
    "*LICEN[CS]E*",
    "*NOTICE*",
    "COPYING*",
    "*USE_POLICY*",
    "*TERMS*.md",
    "*TERMS*.txt",
)  # a person's own stay
# *.py: classes that a config.json with auto_map names
SIDE_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "tokenizer.*", "additional_chat_templates/*",
              "*.py", *ABOUT]  # fmt: skip


def side_files(path: Path) -> Iterator[Path]:
    """What belongs to a model besides its weights, in the order of the names."""
    inside = (*path.iterdir(), *path.glob("additional_chat_templates/*"))
    named = (file for file in inside if is_one_of(file.relative_to(path), SIDE_FILES))
    yield from sorted(file for file in named if file.suffix or not file.is_dir())  # LICENSES/ is no file


def is_one_of(file: Path, patterns: Iterable[str]) -> bool:
    """Whether a file's name, relative to the model's directory, fits one of some patterns, in capitals or not."""
    return any(fnmatchcase(file.as_posix().lower(), pattern.lower()) for pattern in patterns)


def check_own(file: Path, directory: Path) -> None:
    """Raise InputError for a file of a model that is a link to somewhere else: it would be copied with the model. Links
    into the hub's cache, and to the file of the same name in another model's directory, are taken for what they are.
    """
    target = resolve_links(file)
    hub = target.parent.name == "blobs" and (
        target.parent.parent.name.startswith("models--") or target.parent.parent == directory.resolve().parent.parent
    )
    other_model = (
        target.name == file.name
        and (target.parent / "config.json").is_file()
        and any(target.parent.glob("*.safetensors"))
    )
    if not (target.is_relative_to(directory.resolve()) or hub or other_model):
        raise InputError(f"{file} is a link to {target}, outside of the model: put a copy of it in its place")
