"""Documents from a mirror of the hub, from files, and what is said when there are none."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.corpora import CORPORA, EXTENSIONS, check_file, file_documents, file_stem, hub_documents, sha256_of
from quant.core.errors import InputError

ROWS = ["first\n\n", "", " = zweite Zeile é = \r\n", 'quotes " and \\ \t', "last\u2028one"]


def write_rows(path: Path, rows: Iterable[str], field: str = "text") -> Path:
    """Rows as a parquet, json lines or zipped json lines file, by the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.lower().endswith(".parquet"):
        pq.write_table(pa.table({field: pa.array(list(rows), pa.string())}), path)
        return path
    lines = "".join(json.dumps({field: row, "url": "u"}) + "\n" for row in rows).encode()
    packers = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(packers.get(path.suffix, bytes)(lines))
    return path


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert error.value.__cause__ is None or isinstance(error.value.__cause__, Exception)
    return message


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet", "A.JSONL"]
)
@pytest.mark.parametrize("field", ["text", "sentence", "content"])
def test_rows_of_a_file_are_exact(tmp_path: Path, name: str, field: str) -> None:
    assert list(file_documents(write_rows(tmp_path / name, ROWS, field))) == ROWS


def test_a_list_of_rows_is_json_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": row} for row in ROWS]))
    assert list(file_documents(tmp_path / "a.json")) == ROWS


def test_the_first_known_field_is_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "no", "sentence": "no", "text": "yes"}\n')
    assert list(file_documents(tmp_path / "a.jsonl")) == ["yes"]


def test_txt_is_exact_but_for_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\n  one\r\ntwo \x0b\x0c\xc3\xa9\rthree\n\n\n")
    assert file_documents(tmp_path / "a.txt") == ["\n  one\ntwo \x0b\x0cé\nthree\n\n\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_changed_file_is_read_anew_even_with_its_old_mtime(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, ["aaaa"])
    stat = path.stat()
    assert list(file_documents(path)) == ["aaaa"]
    write_rows(path, ["bbbb"])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert list(file_documents(path)) == ["bbbb"]


def test_a_name_is_not_a_pattern(tmp_path: Path) -> None:
    write_rows(tmp_path / "a1.jsonl", ["wrong"])
    write_rows(tmp_path / "ab.jsonl", ["wrong"])
    assert list(file_documents(write_rows(tmp_path / "a[1].jsonl", ["right"]))) == ["right"]
    assert list(file_documents(write_rows(tmp_path / "a*.jsonl", ["right"]))) == ["right"]


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert list(file_documents(Path("a.jsonl"))) == ROWS


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("layout", ["owner and name", "name", "flat"])
def test_mirror_of_the_hub(tmp_path: Path, name: str, layout: str) -> None:
    corpus = CORPORA[name]
    owner, _, repository = corpus.repository.partition("/")
    root = {"owner and name": tmp_path / owner / repository, "name": tmp_path / repository, "flat": tmp_path}[layout]
    for split, file in corpus.files.items():
        write_rows(root / file, [*ROWS, split], corpus.field)
    for split in corpus.files:
        assert list(hub_documents(name, split, tmp_path)) == [*ROWS, split]


def test_a_clone_with_script_and_card_is_a_mirror(tmp_path: Path) -> None:
    root = tmp_path / "ptb_text_only"
    write_rows(root / "penn_treebank/test/0000.parquet", ROWS, "sentence")
    (root / "ptb_text_only.py").write_text("raise RuntimeError")
    (root / "README.md").write_text(
        "---\ndataset_info:\n  config_name: penn_treebank\n  features:\n  - name: sentence\n    dtype: string\n"
        "  splits:\n  - name: test\n    num_bytes: 1\n    num_examples: 3761\n---\n"
    )
    assert list(hub_documents("ptb", "test", tmp_path)) == ROWS


def test_ptb_as_plain_text(tmp_path: Path) -> None:
    for split, file in {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}.items():
        (tmp_path / file).write_text(f" aer banknote <unk> \n N of {split} \n")
        assert list(hub_documents("ptb", split, tmp_path)) == ["aer banknote <unk>", f"N of {split}"]


def test_addresses_on_the_hub() -> None:
    """Written out, since no test can ask the hub."""
    asked = {(name, c.repository, c.revision, next(iter(c.files.values()))) for name, c in CORPORA.items()}
    assert asked == {
        ("wikitext2", "Salesforce/wikitext", None, "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
        ("ptb", "ptb-text-only/ptb_text_only", "refs/convert/parquet", "penn_treebank/train/0000.parquet"),
        ("c4", "allenai/c4", None, "en/c4-train.00000-of-01024.json.gz"),
        ("pile", "mit-han-lab/pile-val-backup", None, "val.jsonl.zst"),
    }


@pytest.mark.parametrize("name", CORPORA)
def test_the_hub_is_asked_for_one_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: object, **options: object) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_dict({CORPORA[name].field: ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = CORPORA[name]
    for split, file in corpus.files.items():
        assert list(hub_documents(name, split, None)) == ROWS
        expected = {"data_files": {split: file}, "split": split, "revision": corpus.revision}
        assert calls.pop() == ((corpus.repository,), expected)


@pytest.mark.parametrize("name", CORPORA)
def test_unreachable_hub_says_how_to_supply_the_text(name: str) -> None:
    corpus = CORPORA[name]
    split, file = next(iter(corpus.files.items()))
    with pytest.raises(InputError, match="cannot be reached on the hub") as error:
        hub_documents(name, split, None)
    message = one_line(error)
    assert f"--data-dir DIR as DIR/{corpus.repository}/{file}" in message
    assert ("DIR/ptb.train.txt" in message) == (name == "ptb")
    assert error.value.__cause__ is not None


def test_broken_transfer_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HTTPError

    def load_dataset(*args: object, **options: object) -> None:
        raise HTTPError("peer closed\nthe connection")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="peer closed") as error:
        hub_documents("c4", "train", None)
    one_line(error)


def test_mirror_without_the_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "Salesforce/wikitext" / CORPORA["wikitext2"].files["test"], ROWS)
    with pytest.raises(InputError, match="holds no wikitext2 train split: expected") as error:
        hub_documents("wikitext2", "train", tmp_path)
    assert str(tmp_path / "Salesforce/wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet") in one_line(error)


BROKEN = {
    "keys.jsonl": (b'{"body": "x", "id": 1}\n', "its fields are body, id; expected text or sentence or content"),
    "null.jsonl": (b'{"text": "x"}\n{"text": null}\n', "row 2 has no text"),
    "some.jsonl": (b'{"text": "x"}\n{"id": 2}\n', "row 2 has no text"),
    "number.jsonl": (b'{"text": 1}\n', "row 1: the field text holds int, not text"),
    "list.jsonl": (b'{"text": ["a"]}\n', "the field text holds .*, not text"),
    "comma.jsonl": (b'{"text": "a"\nnope', "row 1 cannot be read: Expecting"),
    "empty.jsonl": (b"", "has no rows"),
    "no.json.gz": (b"no gzip", "cannot be read: Not a gzipped file"),
    "cut.json.gz": (gzip.compress(b'{"text": "abcdef"}\n' * 99)[:-20], "cannot be read"),
    "no.jsonl.zst": (b"no zstd", "cannot be read: zstd decompress"),
    "no.parquet": (b"no parquet", "cannot be read: Parquet magic bytes"),
    "latin.txt": (b"caf\xe9", "cannot be read as UTF-8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_file_is_one_line(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        file_documents(tmp_path / name)
    assert str(tmp_path / name) in one_line(error)
    assert not caplog.records


def test_loading_leaves_the_settings_of_datasets_alone(tmp_path: Path) -> None:
    logger = logging.getLogger("datasets")
    before = logger.level, datasets.are_progress_bars_disabled()
    file_documents(write_rows(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(InputError):
        hub_documents("c4", "train", None)
    assert (logger.level, datasets.are_progress_bars_disabled()) == before


def test_check_file(tmp_path: Path) -> None:
    for extension in EXTENSIONS:
        (tmp_path / f"a{extension}").write_text("")
        assert check_file(str(tmp_path / f"a{extension}")) == tmp_path / f"a{extension}"
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(InputError, match=r"a\.csv: use one of \.txt, "):
        check_file(str(tmp_path / "a.csv"))
    os.mkfifo(tmp_path / "pipe.txt")
    for name, says in (("b.txt", "no such file"), (".", "is a directory"), ("pipe.txt", "is a pipe")):
        with pytest.raises(InputError, match=says):
            check_file(str(tmp_path / name))


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a.txt", "a"),
        ("x.y/b.json.gz", "b"),
        ("b.jsonl.gz", "b"),
        ("B.PARQUET", "B"),
        ("wiki.train.raw.txt", "wiki.train.raw"),
        ("c4-train.00000-of-01024.json.gz", "c4-train.00000-of-01024"),
    ],
)
def test_name_of_a_file(path: str, stem: str) -> None:
    assert file_stem(path) == stem


def test_hash_knows_order_and_bounds() -> None:
    variants = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""], ["ab\x00", "c"]]
    assert len({sha256_of(documents) for documents in variants}) == len(variants)
    assert sha256_of(["ab", "c"]) == sha256_of(("ab", "c"))
