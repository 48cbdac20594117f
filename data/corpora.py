"""Where text comes from: WikiText-2, PTB and C4 from the hub or a local copy of it, or a file.

One code path: `_load` calls `datasets.load_dataset` for the hub, for a file under `--data-dir` and for a file given.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.core.errors import InputError

EXTENSIONS = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet")
TEXT_FIELDS = ("text", "sentence", "content")
KNOWN = ("wikitext2", "ptb", "ptb-new", "c4", "c4-new", "demo")
CALIBRATION = (*KNOWN, "mix", "pile")


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
    "pile": Corpus("mit-han-lab/pile-val-backup", {"validation": "val.jsonl.zst"}),
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


def file_stem(source: str) -> str:
    """File name without EXTENSIONS; other dots stay, so that wiki.train.txt and wiki.test.txt differ."""
    name = Path(source).name
    return name[: -max(len(e) for e in EXTENSIONS if name.lower().endswith(e))]


def check_name(name: str, known: Sequence[str]) -> None:
    """Raise InputError for a data set that is neither known nor a path."""
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
        raise InputError(f"unknown data set {name!r}; {hint} or a path ({', '.join(EXTENSIONS)})")


def check_source(source: str, known: Sequence[str] = KNOWN) -> None:
    """Raise InputError for a source that is neither a known name nor a readable kind of file."""
    if is_file(source):
        check_file(source)
    else:
        check_name(source, known)


def hub_documents(name: str, split: str, data_dir: Path | None) -> Sequence[str]:
    """Documents of a corpus, from data_dir if given (laid out as on the hub), else from the hub.

    Raises InputError, with the way to supply the text locally, where it cannot be reached.
    """
    corpus = CORPORA[name]
    if data_dir is None:
        return _from_hub(corpus, split)
    for root in (data_dir / corpus.repository, data_dir / corpus.repository.split("/")[1], data_dir):
        if (root / corpus.files[split]).is_file():
            return _from_file(root / corpus.files[split], corpus.field)
        if corpus.plain and (root / corpus.plain[split]).is_file():
            return [line.strip() for line in _read_text(root / corpus.plain[split]).splitlines()]
    raise InputError(
        f"--data-dir {data_dir} holds no {name} {split} split: expected {_layout(corpus, split, data_dir)}"
    )


def file_documents(path: Path) -> Sequence[str]:
    """Documents of a local file: a .txt is one document, byte for byte but for line ends."""
    return [_read_text(path)] if path.name.lower().endswith(".txt") else _from_file(path, None)


def _layout(corpus: Corpus, split: str, root: Path | str) -> str:
    """Where a --data-dir holds a split, in words."""
    plain = f" or {root}/{corpus.plain[split]}" if corpus.plain else ""
    return f"{root}/{corpus.repository}/{corpus.files[split]}{plain}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {_first_line(error)}") from error


def _from_hub(corpus: Corpus, split: str) -> Sequence[str]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # a transfer that breaks off

    try:
        loaded = _load(corpus.repository, {split: corpus.files[split]}, revision=corpus.revision)
    except (OSError, HTTPError, DatasetsError) as error:  # OSError: ConnectionError, FileNotFoundError, hub errors
        raise InputError(
            f"{corpus.repository} cannot be reached on the hub ({_first_line(error)}): give a local copy with "
            f"--data-dir DIR as {_layout(corpus, split, 'DIR')}, or pass a text file instead of the name"
        ) from error
    return _column(loaded, corpus.files[split], corpus.field)


def _from_file(path: Path, field: str | None) -> Sequence[str]:
    """The text column of a json or parquet file. field None: the first of TEXT_FIELDS that is there.

    `datasets` takes a local file as unchanged when its path and mtime are, so its cache is kept apart by content.
    """
    import zstandard
    from datasets import config
    from datasets.exceptions import DatasetsError

    try:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        kind = "parquet" if path.name.lower().endswith(".parquet") else "json"
        cache = Path(config.HF_DATASETS_CACHE) / "by-content" / content[:32]
        # a name is no pattern: "a[1].jsonl" must not read a1.jsonl
        loaded = _load(kind, {"train": glob.escape(str(path.absolute()))}, cache_dir=str(cache))
    except StopIteration as error:
        raise InputError(f"{path} has no rows") from error
    except (OSError, EOFError, zlib.error, ValueError, DatasetsError, zstandard.ZstdError) as error:
        raise InputError(f"{path} cannot be read: {_first_line(error.__cause__ or error)}") from error
    return _column(loaded, str(path), field)


def _load(source: str, files: dict[str, str], **options: str | None) -> Any:
    """The one call of `datasets`, for a single split; quiet, since errors become one line of ours."""
    import datasets

    (split,) = files
    logger = logging.getLogger("datasets")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, data_files=files, split=split, **options)
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _column(loaded: Any, origin: str, field: str | None) -> Sequence[str]:
    """The text of every row. Raises InputError if there is none, or if rows lack it."""
    names = [name for name in ([field] if field else TEXT_FIELDS) if name in loaded.column_names]
    if not names:
        raise InputError(
            f"{origin} has no text: its fields are {', '.join(loaded.column_names)}; "
            f"expected {field or ' or '.join(TEXT_FIELDS)}"
        )
    kind = getattr(loaded.features[names[0]], "dtype", "nested")
    if kind not in ("string", "large_string"):
        raise InputError(f"{origin}: the field {names[0]} holds {kind}, not text")
    if missing := loaded.data.column(names[0]).null_count:
        raise InputError(f"{origin}: {missing} of {len(loaded)} rows have no {names[0]}")
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
