"""The header of a GGUF file: facts by key, and where each tensor lies. Everything is held against the file's size first,
because a file says its own counts, lengths and offsets (format: ggml's page gguf.md)."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quant.core.errors import InputError
from quant.core.files import check_plain_file
from quant.core.text import brief

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type number
STRING, ARRAY = 8, 9
ALIGNMENT, LARGEST_ALIGNMENT = 32, 1 << 16
MOST_DIMENSIONS = 4
MOST_ENTRIES = 1 << 23  # of all arrays: a vocabulary of 262,144 has a million, and the library makes an object of each
KEPT = 4096  # numbers of an array that are kept; of longer ones, and of strings, the count
SMALLEST_FACT, SMALLEST_TENSOR = 8 + 1 + 4 + 1, 8 + 1 + 4 + 8 + 4 + 8  # bytes that an entry takes at least


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. shape: as torch has it, [out, in]. start: of its first byte in the file; size: in bytes."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """facts: values by key; an array is a list of numbers where it is short, else its length. tensors: by name, in the order
    of the file. length: bytes up to the first tensor."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    length: int


class _Cursor:
    """Reads forward, never past the end."""

    def __init__(self, data: mmap.mmap, where: Path) -> None:
        self.data, self.where, self.at = data, where, 0
        self.entries = 0  # of all arrays so far

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def wrong(self, what: str) -> InputError:
        return InputError(f"{self.where} is no GGUF file that can be read: {what}; download it again")

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise self.wrong(f"{what} ends behind the end of the file")
        start, self.at = self.at, self.at + size
        return self.data[start : self.at]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def text(self, what: str) -> str:
        raw = self.take(self.number("Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8") from error

    def skip_texts(self, count: int, what: str) -> None:
        for _ in range(count):
            self.take(self.number("Q", what), what)


def read_header(path: Path) -> Header:
    """The header of a file. Raises InputError, in one line, for anything but a whole little-endian file of version 2 or 3
    whose tensors lie apart from each other and inside it."""
    check_plain_file(path)
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; download it again")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        if cursor.take(4, "its magic number") != MAGIC:
            raise InputError(f"{path} is not a GGUF file: it does not begin with GGUF")
        version = cursor.number("I", "its version")
        if version not in VERSIONS:
            big = " (or the file is big-endian)" if version & 0xFFFF == 0 else ""
            raise InputError(
                f"{path} is a GGUF file of version {version}{big}, where 2 and 3 are read; convert it again"
            )
        n_tensors, n_facts = cursor.number("Q", "its count of tensors"), cursor.number("Q", "its count of facts")
        if n_facts * SMALLEST_FACT + n_tensors * SMALLEST_TENSOR > cursor.left:
            raise cursor.wrong(f"{n_tensors} tensors and {n_facts} facts do not go into it")
        facts = _by_name(cursor, n_facts, _fact)
        tensors = _by_name(cursor, n_tensors, _tensor)
        alignment = facts.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise cursor.wrong(f"general.alignment is {brief(repr(alignment), 40)}, where a power of two belongs")
        begin = -(-cursor.at // alignment) * alignment
        placed = {name: _placed(cursor, tensor, begin, alignment) for name, tensor in tensors.items()}
        _check_apart(cursor, placed)
        return Header(facts, placed, cursor.at)


def _by_name(cursor: _Cursor, count: int, read: Callable[[_Cursor, str], Any]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for number in range(count):
        name = cursor.text(f"name {number}")
        if not name or len(name) > KEPT or not name.isprintable() or name in entries:
            why = "stands there twice" if name in entries else "is no name"
            raise cursor.wrong(f"{brief(repr(name), 60)} {why}")
        entries[name] = read(cursor, name)
    return entries


def _fact(cursor: _Cursor, key: str) -> Any:
    what = f"the value of {brief(repr(key), 60)}"
    kind = cursor.number("I", what)
    if kind == STRING:
        return cursor.text(what)
    if kind in SCALARS:
        return cursor.number(SCALARS[kind], what)
    if kind != ARRAY:
        raise cursor.wrong(f"{what} has the unknown type {kind}")
    kind, count = cursor.number("I", what), cursor.number("Q", what)
    if kind != STRING and kind not in SCALARS:
        raise cursor.wrong(f"{what} is an array of the unknown type {kind}")
    if count * (8 if kind == STRING else struct.calcsize(f"<{SCALARS[kind]}")) > cursor.left:
        raise cursor.wrong(f"{what} has {count} entries, which do not go into the file")
    cursor.entries += count
    if cursor.entries > MOST_ENTRIES:
        raise cursor.wrong(
            f"{what} brings the entries of its arrays to {cursor.entries}, where {MOST_ENTRIES} are read"
        )
    if kind == STRING:
        cursor.skip_texts(count, what)
        return count
    raw = cursor.take(struct.calcsize(f"<{count}{SCALARS[kind]}"), what)
    return list(struct.unpack(f"<{count}{SCALARS[kind]}", raw)) if count <= KEPT else count


def _tensor(cursor: _Cursor, name: str) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the type and offset of a tensor, as the file says them."""
    what = f"the entry of {brief(repr(name), 60)}"
    n = cursor.number("I", what)
    if not 1 <= n <= MOST_DIMENSIONS:
        raise cursor.wrong(f"{what} has {n} dimensions, where 1 to {MOST_DIMENSIONS} can be")
    shape = tuple(cursor.number("Q", what) for _ in range(n))[::-1]
    return name, shape, cursor.number("I", what), cursor.number("Q", what)


def _placed(cursor: _Cursor, entry: tuple[str, tuple[int, ...], int, int], begin: int, alignment: int) -> StoredTensor:
    name, shape, number, offset = entry
    what = f"tensor {brief(repr(name), 60)}"
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise InputError(f"{cursor.where}: {what} is of type {number}, which the gguf package does not know") from error
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % per_block:
        raise cursor.wrong(f"{what} of type {kind.name} has the shape {brief(str(list(shape)), 80)}")
    size, start = math.prod(shape) // per_block * block_bytes, begin + offset
    if offset % alignment:
        raise cursor.wrong(f"{what} begins at {offset}, which is no multiple of {alignment}")
    if start + size > len(cursor.data):
        raise cursor.wrong(f"{what} ends behind the end of the file")
    return StoredTensor(name, kind, shape, start, size)


def _check_apart(cursor: _Cursor, tensors: Mapping[str, StoredTensor]) -> None:
    end = 0
    for tensor in sorted(tensors.values(), key=lambda t: t.start):
        if tensor.start < end:
            raise cursor.wrong(f"tensor {brief(repr(tensor.name), 60)} lies in the bytes of another")
        end = tensor.start + tensor.size
