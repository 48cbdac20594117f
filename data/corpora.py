"""Where text comes from: WikiText-2, PTB and C4 from the hub or a local copy of it, or a file.

One code path: `datasets.load_dataset` with a hub repository or, under `--data-dir`, a directory in its place.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.core.errors import InputError

EXTENSIONS = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
TEXT_FIELDS = ("text", "sentence", "content")


@dataclass(frozen=True)
class Corpus:
    """A corpus on the hub: repository, file of each split, name of the text field, git revision.

    plain: names of one-sentence-a-line files that a --data-dir may hold instead.
    """

    repository: str
    files: dict[str, str]
    field: str = "text"
    revision: str | None = None
    plain: dict[str, str] | None = None


CORPORA = {
    "wikitext2": Corpus(
        "Salesforce/wikitext",
        {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")},
    ),
    # The original is a script, which `datasets` no longer runs; the hub's own conversion to parquet is not.
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        {split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")},
        field="sentence",
        revision="refs/convert/parquet",
        plain={"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"},
    ),
    "c4": Corpus(
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
}


def is_file(source: str) -> bool:
    """Whether a source is meant as a path rather than a name."""
    return "/" in source or source.lower().endswith(EXTENSIONS)


def check_file(source: str) -> Path:
    """The path of a local text file. Raises InputError if it is not there or of an unknown kind."""
    path = Path(source)
    if not path.is_file():
        raise InputError(f"no such file: {source}")
    if not path.name.lower().endswith(EXTENSIONS):
        raise InputError(f"{source}: use one of {', '.join(EXTENSIONS)}")
    return path


def check_name(name: str, known: Sequence[str]) -> None:
    """Raise InputError for a data set that is neither known nor a path."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
        raise InputError(f"unknown data set {name!r}; {hint} or a path ({', '.join(EXTENSIONS)})")


def hub_documents(name: str, split: str, data_dir: Path | None) -> Sequence[str]:
    """Documents of a corpus, from data_dir if given (laid out as on the hub), else from the hub.

    Raises InputError, with the way to supply the text locally, where it cannot be reached.
    """
    corpus = CORPORA[name]
    if data_dir is None:
        return _load(corpus.repository, {split: corpus.files[split]}, corpus.field, corpus.revision)
    for root in (data_dir / corpus.repository, data_dir / corpus.repository.split("/")[1], data_dir):
        if (root / corpus.files[split]).exists():
            return _load(str(root), {split: corpus.files[split]}, corpus.field, None)
        if corpus.plain and (root / corpus.plain[split]).exists():
            lines = (root / corpus.plain[split]).read_text(encoding="utf-8").splitlines()
            return [line.strip() for line in lines]
    raise InputError(
        f"--data-dir {data_dir} holds no {name} {split} split: "
        f"expected {data_dir / corpus.repository / corpus.files[split]}"
        + (f" or {data_dir / corpus.plain[split]}" if corpus.plain else "")
    )


def file_documents(path: Path) -> Sequence[str]:
    """Documents of a local file: a .txt is one document, byte for byte but for line ends."""
    if path.name.lower().endswith(".txt"):
        return [path.read_text(encoding="utf-8")]
    kind = "parquet" if path.name.lower().endswith(".parquet") else "json"
    return _load(kind, {"train": str(path)}, None, None)


def _load(source: str, files: dict[str, str], field: str | None, revision: str | None) -> Sequence[str]:
    """The text column of one split. field None: the first of TEXT_FIELDS that is there."""
    from datasets import DatasetDict, disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    disable_progress_bars()
    (split,) = files
    try:
        loaded: Any = load_dataset(source, data_files=files, revision=revision, split=split)
    except (ConnectionError, DatasetNotFoundError, HfHubHTTPError, FileNotFoundError) as error:
        raise InputError(
            f"{source} ({files[split]}) cannot be reached ({type(error).__name__}): give a local copy with "
            f"--data-dir DIR as DIR/{source}/{files[split]}, or pass a text file instead of the name"
        ) from error
    except (DatasetGenerationError, ValueError) as error:
        raise InputError(
            f"{files[split]} cannot be read as {source}: {_first_line(error.__cause__ or error)}"
        ) from error
    assert not isinstance(loaded, DatasetDict)
    names = [field] if field else [name for name in TEXT_FIELDS if name in loaded.column_names]
    if not names or names[0] not in loaded.column_names:
        raise InputError(
            f"{files[split]} has no text: its fields are {', '.join(loaded.column_names)}; "
            f"expected {field or ' or '.join(TEXT_FIELDS)}"
        )
    column: Sequence[str] = loaded[names[0]]
    return column


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def sha256_of(documents: Sequence[str]) -> str:
    """Hash of documents, their order and their bounds."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
