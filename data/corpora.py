"""Where text comes from: WikiText-2, PTB and C4 from the hub (through `datasets`) or a local copy of it, or a file."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.rows import EXTENSIONS, read_rows, read_text
from data.written import written
from quant.core.errors import InputError
from quant.core.files import check_plain_file, resolve_links

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
    resolve_links(path)  # a loop of links, or a name that is too long
    if not path.exists():
        raise InputError(f"no such file: {source}")
    check_plain_file(path)
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
    """Raise InputError for a source that is neither a known name nor a readable kind of file; where ``mix`` is known, a
    model may also write some of it."""
    if "mix" in known and (own := written(source)) is not None:
        if own.beside is not None:
            check_source(own.beside, known)
        return
    if is_file(source):
        check_file(source)
    else:
        check_name(source, known)


def hub_documents(name: str, split: str, data_dir: Path | None, most: int | None = None) -> Sequence[str]:
    """Documents of a corpus (the first ``most``), from data_dir if given (laid out as on the hub), else from the hub.

    Raises InputError, with the way to supply the text locally, where it cannot be reached.
    """
    corpus = CORPORA[name]
    if data_dir is None:
        column = _from_hub(corpus, split)
        return column if most is None else column[:most]
    for root in (data_dir / corpus.repository, data_dir / corpus.repository.split("/")[1], data_dir):
        if (root / corpus.files[split]).is_file():
            return read_rows(root / corpus.files[split], corpus.field, most)
        if corpus.plain and (root / corpus.plain[split]).is_file():
            return [line.strip() for line in read_text(root / corpus.plain[split]).splitlines()]
    raise InputError(
        f"--data-dir {data_dir} holds no {name} {split} split: expected {_layout(corpus, split, data_dir)}"
    )


def file_documents(path: Path) -> Sequence[str]:
    """Documents of a local file: a .txt is one document."""
    return [read_text(path)] if path.name.lower().endswith(".txt") else read_rows(path)


def _layout(corpus: Corpus, split: str, root: Path | str) -> str:
    """Where a --data-dir holds a split, in words."""
    plain = f" or {root}/{corpus.plain[split]}" if corpus.plain else ""
    return f"{root}/{corpus.repository}/{corpus.files[split]}{plain}"


def _from_hub(corpus: Corpus, split: str) -> Sequence[str]:
    """The text column of a split; quiet, since errors become one line of ours."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # a transfer that breaks off

    logger = logging.getLogger("datasets")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    files = {split: corpus.files[split]}
    try:
        loaded = datasets.load_dataset(corpus.repository, data_files=files, split=split, revision=corpus.revision)
    except (OSError, HTTPError, DatasetsError) as error:  # OSError: ConnectionError, FileNotFoundError, hub errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{corpus.repository} cannot be reached on the hub ({reason}): give a local copy with "
            f"--data-dir DIR as {_layout(corpus, split, 'DIR')}, or pass a text file instead of the name"
        ) from error
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
    column: Sequence[str] = loaded[corpus.field]
    return column


def sha256_of(documents: Sequence[str]) -> str:
    """Hash of documents, their order and their bounds."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
