"""Texts out of local files: JSON lines (plain, gzip, zstandard), a JSON list, Parquet, plain text.

Files are read piece by piece and unpack within bounds; what is wrong is named by file and row. Rows of JSON lines are
counted as an editor counts lines.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.tokens import BOM, TEXT_MB
from quant.core.errors import InputError, first_line
from quant.core.text import is_text

EXTENSIONS = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".parquet")
TEXT_FIELDS = ("text", "sentence", "content")
MB = 1 << 20
ROW_MB, FILE_MB = 32, 4096  # unpacked; a shard of C4 has 800 MB
PIECE = 1 << 18


@dataclass
class _File:
    """A file that is being read. row: the one that is read just now."""

    path: Path
    row: int = 1

    def __str__(self) -> str:
        return f"{self.path}, row {self.row}"


def read_rows(path: Path, field: str | None = None, most: int | None = None) -> list[str]:
    """The text of every row of a file, or of the first ``most``. field None: the first of TEXT_FIELDS that row 1 has; texts
    are then a person's own, and a byte order mark in front of one goes.

    Raises InputError that names the file and the row for what cannot be unpacked, read as UTF-8 or parsed, for rows
    without text, and beyond ROW_MB a row and FILE_MB a file.
    """
    import pyarrow as pa
    import zstandard

    file, texts = _File(path), list[str]()
    parquet = path.name.lower().endswith(".parquet")
    rows: Iterator[str | bytes] = _parquet_rows(file, field) if parquet else _json_rows(file, field)
    try:
        for value in islice(rows, most):
            text = value.decode() if isinstance(value, bytes) else value
            if not (text.isascii() or is_text(text)):
                raise InputError(f"{file} holds half of a surrogate pair, which is no text")
            texts.append(text if field else text.removeprefix(BOM))
    except (InputError, MemoryError):
        raise
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pa.ArrowException, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {_reason(error)}") from error
    if not texts:
        raise InputError(f"{path} has no rows")
    return texts


def read_text(path: Path) -> str:
    """The text of a file: byte for byte but for line ends and a byte order mark in front. Raises InputError."""
    try:
        if path.stat().st_size > TEXT_MB * MB:
            raise InputError(f"{path} has {path.stat().st_size // MB} MB, more than {TEXT_MB} MB: give a part of it")
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise InputError(
                f"{path} holds bytes of zero, as UTF-16 and files that are no text do: give it as UTF-8 text"
            )
        return text
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} cannot be read as UTF-8 text: line {line}: {_reason(error)}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return (first_line(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _field(fields: Sequence[str], field: str | None, origin: str) -> str:
    """The field that holds text."""
    name = next((name for name in ([field] if field else TEXT_FIELDS) if name in fields), None)
    if name is None:
        raise InputError(
            f"{origin} has no text: its fields are {', '.join(fields) or 'none'}; expected {field or ' or '.join(TEXT_FIELDS)}"
        )
    return name


def _json_rows(file: _File, field: str | None) -> Iterator[str]:
    """Rows of JSON lines, blank ones left out, or of one list."""
    name = ""
    for parsed in _json_values(file):
        if not isinstance(parsed, dict):
            raise InputError(f"{file} holds {type(parsed).__name__}, not an object with a text")
        name = name or _field(list(parsed), field, str(file))
        value = parsed.get(name)
        if value is None:
            raise InputError(f"{file} has no {name}")
        if not isinstance(value, str):
            raise InputError(f"{file}: the field {name} holds {type(value).__name__}, not text")
        yield value


def _json_values(file: _File) -> Iterator[Any]:
    lines, begun = _lines(file), False
    for line in lines:
        content = line.decode("utf-8" if begun else "utf-8-sig").strip()
        if not content:
            continue
        if not begun and content.startswith("["):  # its rows may have several lines each
            for file.row, value in enumerate(json.loads("\n".join([content, *(rest.decode() for rest in lines)])), 1):
                yield value
            return
        begun = True
        yield json.loads(content)


def _lines(file: _File) -> Iterator[bytes]:
    """Lines of a file, unpacked. Raises InputError beyond ROW_MB a line and FILE_MB in all."""
    parts: list[bytes] = []
    size = total = 0
    for piece in _pieces(file.path):
        total += len(piece)
        if total > FILE_MB * MB:
            raise InputError(f"{file}: the file unpacks to more than {FILE_MB} MB: give a part of it")
        first, *others = piece.split(b"\n")
        parts.append(first)
        size += len(first)
        if size > ROW_MB * MB:
            raise InputError(f"{file} has more than {ROW_MB} MB: give a row for every document")
        for line in others:
            yield b"".join(parts)
            file.row += 1
            parts, size = [line], len(line)
    if size:
        yield b"".join(parts)


def _pieces(path: Path) -> Iterator[bytes]:
    """The content of a file, unpacked, some of it at a time."""
    name = path.name.lower()
    with (gzip.open if name.endswith(".gz") else open)(path, "rb") as stream:
        if not name.endswith(".zst"):
            while piece := stream.read(PIECE):
                yield piece
            return
        import zstandard

        frame = None
        while packed := stream.read(256):  # each byte of it may unpack to 32 KB
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the compressed data end before their end marker")


def _parquet_rows(file: _File, field: str | None) -> Iterator[bytes]:
    """Rows of the text column as bytes, few at a time: one that is not UTF-8 is then known by its number."""
    import pyarrow as pa
    from pyarrow import parquet

    with parquet.ParquetFile(file.path) as table:
        name = _field(table.schema_arrow.names, field, str(file.path))
        if table.schema_arrow.names.count(name) > 1:
            raise InputError(f"{file.path} has several fields {name}: give a file with one")
        kind = table.schema_arrow.field(name).type
        words = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(words) not in ("string", "large_string", "string_view"):
            raise InputError(f"{file.path}: the field {name} holds {kind}, not text")
        total = 0
        for batch in table.iter_batches(batch_size=16, columns=[name]):
            for value in batch.column(0).cast(words).cast(pa.large_binary()).to_pylist():
                if value is None:
                    raise InputError(f"{file} has no {name}")
                total += len(value)
                if len(value) > ROW_MB * MB:
                    raise InputError(f"{file} has more than {ROW_MB} MB: give a row for every document")
                if total > FILE_MB * MB:
                    raise InputError(f"{file}: the file unpacks to more than {FILE_MB} MB: give a part of it")
                yield value
                file.row += 1
