"""The originals' sampling, re-computed the obvious way with Python's global generator, on a small local mirror."""

from __future__ import annotations

import gzip
import json
import logging
import random
from pathlib import Path

import pytest
import torch

from data import calibration, demo
from data.calibration import calibration_tokens, check_source, evaluation_tokens, tokenizer_sha256
from data.corpora import CORPORA
from models.load import load_tokenizer
from quant.core.errors import InputError
from tests.conftest import save_tokenizer
from tests.helpers import DEMO


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def sentences(seed: int, n: int, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice("abcdefgh ") for _ in range(rng.randint(1, longest))) for _ in range(n)]


@pytest.fixture
def mirror(tmp_path) -> Path:
    """Local copies laid out as on the hub."""
    from datasets import Dataset

    for number, split in enumerate(("train", "validation", "test")):
        wiki = tmp_path / "Salesforce/wikitext/wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        ptb = tmp_path / "ptb-text-only/ptb_text_only/penn_treebank" / split / "0000.parquet"
        for path in (wiki, ptb):
            path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({"text": sentences(number, 40)}).to_parquet(wiki)
        Dataset.from_dict({"sentence": sentences(10 + number, 40)}).to_parquet(ptb)
    c4 = tmp_path / "allenai/c4/en"
    c4.mkdir(parents=True)
    for number, name in enumerate(("c4-train.00000-of-01024", "c4-validation.00000-of-00008")):
        with gzip.open(c4 / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": t, "url": "x"}) + "\n" for t in sentences(20 + number, 300, 90))
    return tmp_path


class GlobalSeed:
    """The originals seed Python's global generator; put its state back afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = random.getstate()
        random.seed(self.seed)

    def __exit__(self, *error: object) -> None:
        random.setstate(self.state)


def encode(tokenizer, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt").input_ids


def original_windows(ids: torch.Tensor, nsamples: int, seed: int, seqlen: int) -> torch.Tensor:
    with GlobalSeed(seed):
        windows = []
        for _ in range(nsamples):
            i = random.randint(0, ids.shape[1] - seqlen - 1)
            windows.append(ids[:, i : i + seqlen])
    return torch.cat(windows)


def original_c4(tokenizer, texts: list[str], n: int, seed: int, seqlen: int) -> torch.Tensor:
    with GlobalSeed(seed):
        windows = []
        for _ in range(n):
            while True:
                i = random.randint(0, len(texts) - 1)
                ids = encode(tokenizer, texts[i])
                if ids.shape[1] > seqlen:
                    break
            i = random.randint(0, ids.shape[1] - seqlen - 1)
            windows.append(ids[:, i : i + seqlen])
    return torch.cat(windows)


TEXTS = {
    "wikitext2": ("\n\n".join(sentences(0, 40)), "\n\n".join(sentences(2, 40))),
    "ptb": ("\n\n".join(sentences(10, 40)), "\n\n".join(sentences(11, 40))),
    "ptb-new": (" ".join(sentences(10, 40)), " ".join(sentences(12, 40))),
}


@pytest.mark.parametrize("name", TEXTS)
def test_joined_protocols(name, mirror, tokenizer):
    train, test = TEXTS[name]
    tokens = calibration_tokens(name, tokenizer, nsamples=7, seqlen=32, seed=5, data_dir=mirror)
    assert torch.equal(tokens.ids, original_windows(encode(tokenizer, train), 7, 5, 32))
    scored = evaluation_tokens(name, tokenizer, seqlen=32, data_dir=mirror)
    ids = encode(tokenizer, test)[0]
    assert torch.equal(scored.ids, ids[: len(ids) // 32 * 32].view(-1, 32))
    assert tokens.name == scored.name == name and tokens.protocol.endswith("/train")


def test_c4_protocols(mirror, tokenizer):
    train, validation = sentences(20, 300, 90), sentences(21, 300, 90)
    for name in ("c4", "c4-new"):
        tokens = calibration_tokens(name, tokenizer, nsamples=9, seqlen=40, seed=2, data_dir=mirror)
        assert torch.equal(tokens.ids, original_c4(tokenizer, train, 9, 2, 40))
        assert tokens.protocol == "c4/train"
        # Negative control: the validation split gives other windows.
        assert not torch.equal(tokens.ids, original_c4(tokenizer, validation, 9, 2, 40))
    scored = evaluation_tokens("c4", tokenizer, seqlen=40, data_dir=mirror)
    assert torch.equal(scored.ids, original_c4(tokenizer, validation, 256, 0, 40))
    fresh = evaluation_tokens("c4-new", tokenizer, seqlen=40, data_dir=mirror)
    ids = encode(tokenizer, " ".join(validation[:1100]))[0, : 256 * 40]
    assert torch.equal(fresh.ids, ids[: len(ids) // 40 * 40].view(-1, 40))


def test_plain_ptb_files(tmp_path, tokenizer):
    (tmp_path / "ptb.valid.txt").write_text("\n".join(f" {s.strip() or 'a'} " for s in sentences(11, 40)) + "\n")
    tokens = evaluation_tokens("ptb", tokenizer, seqlen=16, data_dir=tmp_path)
    text = "\n\n".join(s.strip() or "a" for s in sentences(11, 40))
    ids = encode(tokenizer, text)[0]
    assert torch.equal(tokens.ids, ids[: len(ids) // 16 * 16].view(-1, 16))


def test_files_of_every_kind_give_the_same_tokens(tmp_path, tokenizer):
    from datasets import Dataset

    texts = sentences(3, 30)
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write(lines)
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet")
    answers = [
        calibration_tokens(str(tmp_path / f"a.{kind}"), tokenizer, nsamples=5, seqlen=24, seed=1)
        for kind in ("txt", "jsonl", "json.gz", "parquet")
    ]
    assert all(torch.equal(a.ids, answers[0].ids) for a in answers)
    assert {(a.name, a.protocol) for a in answers} == {("a", "local/wikitext2")}


def test_a_changed_file_is_read_again(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    hashes = set()
    for seed in (1, 2):
        file.write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(seed, 30)))
        hashes.add(evaluation_tokens(str(file), tokenizer, seqlen=24, cache_dir=tmp_path / "cache").text_sha256)
    assert len(hashes) == 2


def test_demo_source(tokenizer):
    tokens = calibration_tokens("demo", tokenizer, nsamples=3, seqlen=64, seed=0)
    assert torch.equal(tokens.ids, original_windows(encode(tokenizer, demo.text("train")), 3, 0, 64))


def test_limit_takes_the_first_windows(mirror, tokenizer):
    every, first = (evaluation_tokens("ptb", tokenizer, seqlen=32, data_dir=mirror, limit=n) for n in (None, 3))
    assert torch.equal(first.ids, every.ids[:3]) and first.sha256 != every.sha256


def test_cache_hits_skip_the_tokenizer(tmp_path, tokenizer, text, monkeypatch):
    options = {"nsamples": 4, "seqlen": 32, "seed": 0, "cache_dir": tmp_path / "cache"}
    first = calibration_tokens(str(text), tokenizer, **options)

    def refuse(*args: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(calibration, "_encode", refuse)
    again = calibration_tokens(str(text), tokenizer, **options)
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256
    for change in ({"seed": 1}, {"seqlen": 16}, {"nsamples": 5}):
        with pytest.raises(AssertionError, match="tokenized again"):
            calibration_tokens(str(text), tokenizer, **(options | change))


def test_cache_depends_on_tokenizer_and_text(tmp_path, tokenizer, text):
    from copy import deepcopy

    from tokenizers import normalizers

    other = deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Replace("1", "2")
    assert tokenizer_sha256(other) != tokenizer_sha256(tokenizer)
    options = {"nsamples": 4, "seqlen": 32, "seed": 0, "cache_dir": tmp_path / "cache"}
    plain, replaced = (calibration_tokens(str(text), t, **options) for t in (tokenizer, other))
    assert not torch.equal(plain.ids, replaced.ids) and plain.text_sha256 == replaced.text_sha256
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_damaged_cache_is_made_again(tmp_path, tokenizer, text, caplog):
    options = {"nsamples": 4, "seqlen": 32, "seed": 0, "cache_dir": tmp_path / "cache"}
    first = calibration_tokens(str(text), tokenizer, **options)
    (file,) = (tmp_path / "cache").iterdir()
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    for damage in (bytes(data), file.read_bytes()[:-8]):
        file.write_bytes(damage)
        assert torch.equal(calibration_tokens(str(text), tokenizer, **options).ids, first.ids)
    assert "damaged" in caplog.text


BAD = {
    "wikitxt2": "unknown data set 'wikitxt2'; did you mean wikitext2?",
    "no/such/file.txt": "no such file",
    "missing.jsonl": "no such file",
}


@pytest.mark.parametrize("source", BAD)
def test_bad_sources(source):
    with pytest.raises(InputError) as error:
        check_source(source)
    assert BAD[source] in str(error.value)


def test_wrong_kind_of_file(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"use one of \.txt"):
        check_source(str(tmp_path / "a.csv"))


def test_text_too_short(tmp_path, tokenizer, mirror):
    (tmp_path / "short.txt").write_text("abc def")
    with pytest.raises(InputError, match="has 7 tokens, a window of --seqlen 32 needs 33"):
        calibration_tokens(str(tmp_path / "short.txt"), tokenizer, nsamples=1, seqlen=32, seed=0)
    with pytest.raises(InputError, match="fewer than one window"):
        evaluation_tokens(str(tmp_path / "short.txt"), tokenizer, seqlen=32)
    with pytest.raises(InputError, match=r"none has more than --seqlen 500 tokens \(the longest has"):
        calibration_tokens("c4", tokenizer, nsamples=1, seqlen=500, seed=0, data_dir=mirror)


def test_rows_without_text_name_their_fields(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x", "id": 1}) + "\n")
    with pytest.raises(InputError, match="its fields are body, id"):
        evaluation_tokens(str(tmp_path / "a.jsonl"), tokenizer, seqlen=8)
    (tmp_path / "b.jsonl").write_text("{ not json\n")
    with pytest.raises(InputError, match="cannot be read"):
        evaluation_tokens(str(tmp_path / "b.jsonl"), tokenizer, seqlen=8)


def test_unreachable_sources_say_how_to_supply_them(tmp_path, tokenizer):
    for name in ("wikitext2", "ptb", "c4"):
        with pytest.raises(
            InputError, match=r"cannot be reached .*--data-dir DIR as DIR/.*or pass a text file"
        ) as error:
            evaluation_tokens(name, tokenizer, seqlen=8)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match="--data-dir .* holds no"):
            evaluation_tokens(name, tokenizer, seqlen=8, data_dir=tmp_path)


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, inner) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, *args: object, **options: object) -> object:
        self.calls += 1
        return self.inner(*args, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def letters(order: str = "\n abcdefgh", **options: object):
    """A token a letter with <s> in front: ids show every byte and every special token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    built = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<unk>", "<s>", *order])}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", bos_token="<s>", **options)


def write_c4(root: Path, split: str, texts: list[str]) -> None:
    path = root / CORPORA["c4"].files[split]
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": t}) + "\n" for t in texts)


@pytest.mark.parametrize("name", TEXTS)
def test_every_letter_counts(name, mirror):
    """Separators, line ends and <s> are tokens here. Negative control: near misses of the protocol differ."""
    train, _ = TEXTS[name]
    windows = calibration_tokens(name, letters(), nsamples=20, seqlen=32, seed=5, data_dir=mirror).ids
    assert torch.equal(windows, original_windows(encode(letters(), train), 20, 5, 32))
    assert not torch.equal(windows, original_windows(encode(letters(), train), 20, 6, 32))
    near = train.replace("\n\n", "\n") if "\n\n" in train else train.replace(" ", "\n\n")
    assert not torch.equal(windows, original_windows(encode(letters(), near), 20, 5, 32))


def test_text_is_exact_but_for_line_ends(tmp_path):
    text = "ab \n\n c\n" * 20 + "\n"
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode())
    ids = encode(letters(), text)[0]
    tokens = evaluation_tokens(str(tmp_path / "a.txt"), letters(), seqlen=16)
    assert torch.equal(tokens.ids, ids[: len(ids) // 16 * 16].view(-1, 16))


def test_the_last_token_starts_no_window(tmp_path):
    """A text of seqlen + 1 tokens has one window, its first: the originals' bounds leave the last token out."""
    (tmp_path / "a.txt").write_text("abcdefgh")
    write_c4(tmp_path, "train", ["abcdefgh", "abcdefg", "hh"])
    for source in (str(tmp_path / "a.txt"), "c4"):
        tokens = calibration_tokens(source, letters(), nsamples=9, seqlen=8, seed=0, data_dir=tmp_path)
        assert torch.equal(tokens.ids, encode(letters(), "abcdefg").expand(9, -1))


def test_c4_new_ends_with_document_1100(tmp_path, caplog):
    texts = sentences(30, 1200)
    write_c4(tmp_path, "validation", texts)
    for seqlen in (16, 499):  # 256 windows and a rest; the whole text, fewer than 256
        ids = encode(letters(), " ".join(texts[:1100]))[0]
        tokens = evaluation_tokens("c4-new", letters(), seqlen=seqlen, data_dir=tmp_path)
        assert torch.equal(tokens.ids, ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:256])
        assert (len(tokens.ids) == 256) == (seqlen == 16)
    assert not caplog.records
    write_c4(tmp_path, "validation", texts[:50])
    evaluation_tokens("c4-new", letters(), seqlen=16, data_dir=tmp_path)
    assert [r.getMessage() for r in caplog.records] == ["c4-new: 50 of the protocol's 1100 documents are there"]


def test_draws_end(tmp_path, monkeypatch):
    write_c4(tmp_path, "train", ["abc", "abcdefg", "ab"])
    counting = Counting(letters())
    with pytest.raises(InputError, match=r"3 documents drawn, none .* --seqlen 8 tokens \(the longest has 8\)"):
        calibration_tokens("c4", counting, nsamples=2, seqlen=8, seed=0, data_dir=tmp_path)
    assert counting.calls == 3  # each document once
    monkeypatch.setattr(calibration, "MAX_DRAWS", 10)
    write_c4(tmp_path, "train", ["abc"] * 5000)
    with pytest.raises(InputError, match="10 documents drawn, none"):
        calibration_tokens("c4", letters(), nsamples=2, seqlen=8, seed=0, data_dir=tmp_path)


def test_evaluation_and_c4_are_cached_too(tmp_path, mirror):
    counting, files = Counting(letters()), tmp_path / "new/cache"
    options = {"seqlen": 16, "data_dir": mirror, "cache_dir": files}
    hashes, calls = [], []
    for _ in range(2):
        cached = [calibration_tokens(n, counting, nsamples=4, seed=0, **options) for n in ("ptb", "ptb-new", "c4")]
        cached += [evaluation_tokens(n, counting, **options) for n in ("ptb", "c4", "c4-new")]
        hashes.append([(t.name, t.protocol, t.text_sha256, t.sha256) for t in cached])
        calls.append(counting.calls)
    assert calls[0] == calls[1] > 0 and hashes[0] == hashes[1]
    assert cached[0].text_sha256 == cached[1].text_sha256 and cached[0].sha256 != cached[1].sha256  # protocols apart
    assert evaluation_tokens("ptb", counting, limit=2, **options).ids.shape == (2, 16) and counting.calls == calls[0]
    assert len(list(files.iterdir())) == 6 and {f.suffix for f in files.iterdir()} == {".safetensors"}


@pytest.mark.parametrize("damaged", [b"", b"no safetensors file"])
def test_a_foreign_file_in_the_cache(damaged, tmp_path, text, tokenizer, caplog):
    first = evaluation_tokens(str(text), tokenizer, seqlen=32, cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(damaged)
    again = evaluation_tokens(str(text), tokenizer, seqlen=32, cache_dir=tmp_path / "cache")
    assert torch.equal(again.ids, first.ids) and str(file) in caplog.text
    caplog.clear()
    evaluation_tokens(str(text), tokenizer, seqlen=32, cache_dir=tmp_path / "cache")
    assert not caplog.records


def test_settings_are_in_the_tokenizer_hash():
    variants = [
        letters(),
        letters("\n bacdefgh"),
        letters(split_special_tokens=True),
        letters(add_eos_token=True, eos_token="a"),
    ]
    assert len({tokenizer_sha256(t) for t in variants}) == 4
    used = letters()
    used("abc abc", truncation=True, max_length=2)
    assert tokenizer_sha256(used) == tokenizer_sha256(letters())  # what a call sets is no setting


def test_long_text_is_no_warning(mirror, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    short = letters(model_max_length=4)
    calibration_tokens("ptb", short, nsamples=2, seqlen=16, seed=0, data_dir=mirror)
    assert "longer than" not in caplog.text
    short("abcdef")  # negative control: it does warn
    assert "longer than" in caplog.text


def test_unwritable_cache(tmp_path, text, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the token cache"):
        evaluation_tokens(str(text), tokenizer, seqlen=32, cache_dir=tmp_path / "file/cache")


def test_text_that_the_tokenizer_does_not_know_is_said(tmp_path, caplog):
    tokenizer = load_tokenizer(DEMO / "llama", False)
    for name, line in {"known": "the old tower stood near the river ", "foreign": "字 字 字 the "}.items():
        (tmp_path / f"{name}.txt").write_text(line * 100, encoding="utf-8")
        caplog.clear()
        evaluation_tokens(str(tmp_path / f"{name}.txt"), tokenizer, seqlen=32)
        said = f"{name}: 75% of the tokens are the one for unknown text"
        assert (said in caplog.text) == (name == "foreign"), caplog.text
