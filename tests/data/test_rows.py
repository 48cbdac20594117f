"""Rows of local files: every kind of damage is one line that names file and row, and nothing unpacks without end."""

from __future__ import annotations

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data import rows
from data.rows import read_rows, read_text
from quant.core.errors import InputError

PACKERS = {
    "a.jsonl": bytes,
    "a.json": bytes,
    "a.jsonl.gz": gzip.compress,
    "a.json.gz": gzip.compress,
    "a.jsonl.zst": zstandard.ZstdCompressor().compress,
}
GOOD = b'{"text": "one"}\n'


def fails(path: Path, *says: str) -> str:
    """The line of a file that is refused: it names the file."""
    with pytest.raises(InputError) as error:
        read_rows(path)
    (line,) = error.value.args
    assert line.startswith(str(path)) and "\n" not in line and len(line) < 600 + len(str(path))
    for part in says:
        assert part in line, line
    return line


def parquet(path: Path, values: pa.Array, field: str = "text") -> Path:
    pq.write_table(pa.table({"id": pa.array(range(len(values))), field: values}), path)
    return path


DAMAGED_ROWS = {
    "not UTF-8": (b'{"text": "\xff\xfe"}', "cannot be read: 'utf-8' codec"),
    "a surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "cannot be read: 'utf-8' codec"),
    "half of a pair": (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    "no JSON": (b"nope", "cannot be read: Expecting value"),
    "cut": (b'{"text": "on', "cannot be read: Unterminated string"),
    "two in a line": (GOOD.strip() * 2, "cannot be read: Extra data"),
    "a list": (b'["one"]', "holds list, not an object"),
    "a text": (b'"one"', "holds str, not an object"),
    "a number": (b"7", "holds int, not an object"),
    "null": (b"null", "holds NoneType, not an object"),
    "nested lists": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "nested objects": (b'{"text": ' + b'{"a":' * 100_000 + b"7" + b"}" * 100_001, "nested too deeply"),
    "a long number": (b'{"text": ' + b"9" * 10_000 + b"}", "cannot be read: Exceeds the limit"),
    "no text": (b'{"body": "x"}', "no text"),
    "text is null": (b'{"text": null}', "no text"),
    "text is a number": (b'{"text": 1}', "the field text holds int, not text"),
    "text is true": (b'{"text": true}', "the field text holds bool, not text"),
    "text is a list": (b'{"text": ["a"]}', "the field text holds list, not text"),
    "text is an object": (b'{"text": {"a": "b"}}', "the field text holds dict, not text"),
}


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("damage", DAMAGED_ROWS)
def test_a_damaged_row_is_named(damage: str, name: str, tmp_path: Path) -> None:
    row, says = DAMAGED_ROWS[damage]
    (tmp_path / name).write_bytes(PACKERS[name](GOOD * 2 + row + b"\r\n" + GOOD))
    fails(tmp_path / name, "row 3", says)
    (tmp_path / name).write_bytes(PACKERS[name](b"\r\n" + row + b"\n" + GOOD))  # lines as an editor counts them
    if damage != "a list":  # one in the first place is what the file is
        fails(tmp_path / name, "row 2", says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"text": "one"}, {"text": 7}]', "row 2: the field text holds int"),
        (b'[{"text": "one"},\n {"body": "x"}\n]', "row 2 has no text"),
        (b'["one"]', "row 1 holds str, not an object"),
        (b'[{"text": "one"},\n', "row 2 cannot be read"),
        (b"[" * 100_000, "row 1 cannot be read: nested too deeply"),
        (b"[]", "has no rows"),
        (b"", "has no rows"),
        (b"\n \r\n\n", "has no rows"),
        (b"\xef\xbb\xbf", "has no rows"),
        (b'{"body": "x", "id": 1}', "row 1 has no text: its fields are body, id; expected text or sentence or content"),
        (b"{}", "row 1 has no text: its fields are none;"),
        ('{"text": "one"}'.encode("utf-16"), "row 1 cannot be read: 'utf-8' codec"),
    ],
)
def test_a_damaged_file_is_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    fails(tmp_path / "a.json", says)


def test_line_ends_blank_lines_and_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        '\ufeff\r\n{"text": "\ufeffone\\r\\n"}\r\n\r\n  \n{"text": ""}\n\t{"text": "two \ufeff"} '.encode()
    )
    assert read_rows(path) == ["one\r\n", "", "two \ufeff"]
    assert read_rows(path, "text")[0] == "\ufeffone\r\n", "what is published stays as it is"
    path.write_bytes('\ufeff[{"text": "one"},\r\n\r\n{"text": "two", "id": 7}]'.encode())
    assert read_rows(path) == ["one", "two"]
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ufeff".encode())
    assert read_text(tmp_path / "a.txt") == "one\n\ufeff"


@pytest.mark.parametrize("name", PACKERS)
def test_the_first_rows_are_read_and_no_more(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PACKERS[name](GOOD * 3 + b"nope\n"))
    assert read_rows(tmp_path / name, most=3) == ["one"] * 3
    fails(tmp_path / name, "row 4")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_packed_files_that_are_cut_or_hurt(name: str, tmp_path: Path) -> None:
    """Cut at every place, also between rows, and with one byte changed: a line, or all rows; never some of them."""
    rng, path = random.Random(0), tmp_path / name
    lines = [f"{rng.random()}" for _ in range(300)]
    whole = PACKERS[name]("".join(json.dumps({"text": line}) + "\n" for line in lines).encode())
    for cut in (0, 1, 5, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:cut])
        fails(path)
    for _ in range(40):
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        try:
            assert len(read_rows(path)) == len(lines)
        except InputError as error:
            assert len(error.args) == 1 and "\n" not in str(error) and str(path) in str(error)
    path.write_bytes(whole + whole)  # members, frames
    assert read_rows(path) == lines * 2
    path.write_bytes(whole + b"rest")
    fails(path, "cannot be read: ")


@pytest.mark.parametrize("name", PACKERS)
def test_a_row_unpacks_within_a_bound(name: str, tmp_path: Path) -> None:
    row = b'{"text": "' + b"x" * (rows.ROW_MB << 20) + b'"}\n'
    (tmp_path / name).write_bytes(PACKERS[name](GOOD + row * 4))
    tracemalloc.start()
    fails(tmp_path / name, f"row 2 has more than {rows.ROW_MB} MB")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * (rows.ROW_MB << 20), "no more of it is unpacked"


@pytest.mark.parametrize("name", PACKERS)
def test_a_file_unpacks_within_a_bound(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FILE_MB", 1)
    content = GOOD * ((1 << 20) // len(GOOD))
    (tmp_path / name).write_bytes(PACKERS[name](content))
    assert len(read_rows(tmp_path / name)) == len(content) // len(GOOD)
    (tmp_path / name).write_bytes(PACKERS[name](content + GOOD * 2))
    fails(tmp_path / name, "unpacks to more than 1 MB")


def test_a_text_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (1 << 20))
    monkeypatch.setattr(rows, "TEXT_MB", 1)
    assert len(read_text(tmp_path / "a.txt")) == 1 << 20
    (tmp_path / "a.txt").write_bytes(b"x" * (2 << 20))
    with pytest.raises(InputError, match=r"a\.txt has 2 MB, more than 1 MB: give a part of it"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("content", [b"one\ntwo \xe9\n", "one".encode("utf-16"), b"\xed\xa0\x80"])
def test_a_text_that_is_not_utf_8_names_the_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"a\.txt cannot be read as UTF-8 text: line {2 if b'two' in content else 1}: "
    ):
        read_text(tmp_path / "a.txt")


def bytes_as_text(*values: bytes) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


def test_damaged_parquet_names_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    fails(parquet(path, bytes_as_text(*[b"good"] * 50, b"\xff\xfe", b"good")), "row 51 cannot be read: 'utf-8' codec")
    fails(parquet(path, pa.array(["a", "b", None])), "row 3 has no text")
    fails(parquet(path, pa.array([1, 2])), "the field text holds int64, not text")
    fails(parquet(path, pa.array([["a"]])), "the field text holds list")
    fails(parquet(path, pa.array([b"a"], pa.binary())), "the field text holds binary, not text")
    fails(parquet(path, pa.array(["a"]), "body"), "has no text: its fields are id, body; expected text or sentence")
    fails(parquet(path, pa.array([], pa.string())), "has no rows")
    assert read_rows(parquet(path, pa.array(["a", ""], pa.large_string()))) == ["a", ""]
    assert read_rows(parquet(path, pa.array(["x"] * 100)), most=99) == ["x"] * 99
    monkeypatch.setattr(rows, "ROW_MB", 1)
    fails(
        parquet(path, pa.array(["a", "x" * (1 << 20) + "x"])), "row 2 has more than 1 MB: give a row for every document"
    )
    monkeypatch.setattr(rows, "FILE_MB", 1)
    fails(parquet(path, pa.array(["x" * (1 << 19)] * 3)), "row 3: the file unpacks to more than 1 MB")


def test_parquet_bytes_that_are_changed(tmp_path: Path) -> None:
    """One byte at a time, everywhere in a small file: the rows, other text or a line."""
    path, rng = parquet(tmp_path / "a.parquet", pa.array([f"row {i}" for i in range(40)])), random.Random(1)
    whole = path.read_bytes()
    for place in rng.sample(range(len(whole)), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        try:
            assert all(isinstance(text, str) for text in read_rows(path))
        except InputError as error:
            assert len(error.args) == 1 and re.match(re.escape(str(path)), str(error)), error
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, "row 1 cannot be read: Parquet magic bytes not found")


def test_text_columns_of_every_encoding_are_read(tmp_path: Path) -> None:
    words = pa.array(["one", "two", "one"])
    for name, values in {
        "plain": words,
        "category": words.dictionary_encode(),
        "view": words.cast(pa.string_view()),
    }.items():
        assert read_rows(parquet(tmp_path / f"{name}.parquet", values)) == ["one", "two", "one"]


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    words = pa.array(["one"])
    pq.write_table(pa.table([words, words], names=["text", "text"]), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", "has several fields text")


def test_text_with_zeros_is_no_utf8_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("a text of Windows".encode("utf-16-le"))
    with pytest.raises(InputError, match="holds bytes of zero, as UTF-16"):
        read_text(path)
