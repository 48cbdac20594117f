"""Tokens on every way in: what lm-eval's own model encodes, no end behind a prompt, no id beyond the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from data.tokens import check_ids, encode, encode_prompt, encode_request, end_tokens, prefix_token
from quant.core.errors import InputError

BOS, EOS = 256, 257
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
SPACES = {
    "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "bytes behind a space": (pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
    "pieces behind a space": (pre_tokenizers.Metaspace("Ġ", prepend_scheme="first"), decoders.Metaspace("Ġ")),
}
REQUESTS = [
    ("the river", " froze ."),
    ("the river ", "froze ."),
    ("the river \n ", "froze"),
    ("the river", "froze"),
    ("", "froze ."),
    ("", " froze"),
    ("", "<s>froze"),
    ("", "</s>froze"),
    ("<s>the river", " froze"),
    ("<s> the river", " froze"),
    ("</s>the river", " froze"),
    ("a</s>", "</s>"),
    ("a", "</s>"),
    ("ä 河", "川 é"),
]


def built(template: str | None, space: str = "bytes", **names: Any) -> Any:
    """A token for every byte, merges of a few words, special tokens where a template has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "f"), ("r", "o"), ("Ġf", "ro"), ("h", "e")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>", *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = SPACES[space]
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    tokenizer.add_special_tokens(list(names.values()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def model(model_dir: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float32)


def of_harness(model: Any, tokenizer: Any, requests: list[tuple[str, str]], **options: Any) -> list[Any]:
    """What lm-eval's own Hugging Face model would score: ids of contexts and answers."""
    from lm_eval.models.huggingface import HFLM

    harness, kept = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=64, **options), []
    harness._loglikelihood_tokens = lambda new, **_: kept.extend(new)
    harness.loglikelihood([SimpleNamespace(args=request) for request in requests], disable_tqdm=True)
    return [(context, answer) for _, context, answer in kept]


def ours(tokenizer: Any, requests: list[tuple[str, str]]) -> list[Any]:
    return [encode_request(tokenizer, *request, "a task") for request in requests]


@pytest.mark.parametrize("names", [NAMES, {"bos_token": "<s>"}, {"eos_token": "</s>"}], ids=["both", "bos", "eos"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("template", ["<s> $A", None])
def test_requests_are_lm_evals_token_by_token(template: str | None, space: str, names: dict, model: Any) -> None:
    tokenizer = built(template, space, **names)
    asked = [r for r in REQUESTS if r != ("a", "</s>") or "eos_token" in names]
    assert ours(tokenizer, asked) == of_harness(model, tokenizer, asked)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("front", ["<s> ", ""])
def test_an_added_end_is_off(front: str, space: str, model: Any) -> None:
    """As lm-eval's with the tokenizer that adds no end; negative control: with this one it leaves the end behind contexts
    and takes a token from the answer."""
    ending, plain = (built(template, space, **NAMES) for template in (f"{front}$A </s>", front and "<s> $A"))
    assert ours(ending, REQUESTS) == ours(plain, REQUESTS) == of_harness(model, plain, REQUESTS)
    if not front:  # lm-eval's own way to have none
        assert ours(ending, REQUESTS) == of_harness(model, ending, REQUESTS, add_bos_token=False)
    (context, answer), *_ = of_harness(model, ending, REQUESTS)
    assert context[-1] == EOS and answer[-1] == EOS and len(answer) == len(ours(ending, REQUESTS)[0][1])


def test_a_prompt_keeps_what_was_written() -> None:
    both, none = built("<s> $A </s>", **NAMES), built(None, **NAMES)
    for text in ("ab", "a</s>", "</s></s>", "</s>", ""):
        assert encode_prompt(both, text, "--prompt") == [BOS, *none.encode(text)], text
        assert encode(both, text, "--prompt") == [BOS, *none.encode(text), EOS], text
    assert encode_prompt(both, "<s>ab", "--prompt") == none.encode("<s>ab"), "one BOS"
    assert encode_prompt(built("$A </s> </s>", **NAMES), "ab", "--prompt") == none.encode("ab"), "every end"
    assert encode_prompt(built("$A </s>", bos_token="<s>"), "ab", "--prompt") == none.encode("ab"), (
        "an end without a name"
    )


def test_a_tokenizer_without_names() -> None:
    bare = built(None)
    assert prefix_token(bare) is None
    assert encode_request(bare, "the river ", "froze", "a task") == (bare.encode("the river"), bare.encode(" froze"))
    with pytest.raises(InputError, match="task: a context is empty, and the tokenizer names neither a BOS nor an EOS"):
        encode_request(bare, "", "froze", "a task")
    with pytest.raises(InputError, match="names neither"):
        encode_request(bare, "  ", "froze", "a task")


def test_blanks_alone_stand_behind_the_prefix() -> None:
    tokenizer = built(None, **NAMES)
    assert encode_request(tokenizer, "  ", "froze", "a task") == ([BOS], tokenizer.encode("  froze"))
    with pytest.raises(InputError, match="a task: the answer '' has no tokens"):
        encode_request(tokenizer, "river", "", "a task")
    with pytest.raises(InputError, match="a task: the answer '' has no tokens"):
        encode_request(tokenizer, "", "", "a task")


def test_text_that_a_tokenizer_does_not_take_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^--prompt cannot be tokenized \(") as error:
        encode(built(None), "\udcff", "--prompt")
    assert "\n" not in str(error.value)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>")))
    with pytest.raises(InputError, match=r"^a\.txt cannot be tokenized \(WordLevel error"):
        encode(words, "b", "a.txt")
    with pytest.raises(InputError, match="cannot be tokenized: the tokenizer has no token for a part of it"):
        encode(lambda *_, **__: {"input_ids": [3, None]}, "b", "a.txt")


def test_the_bound_on_a_text_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tokens.TEXT_MB", 1)
    assert len(encode(built(None), "x" * (1 << 20), "a.txt")) == 1 << 20
    with pytest.raises(InputError, match=r"a\.txt: 2 MB of text would be tokenized at once; the bound is 1 MB"):
        encode(built(None), "x" * (2 << 20), "a.txt")


def test_ids_beyond_the_embedding() -> None:
    for ids in ([0, 7], torch.tensor([[7, 0], [1, 2]])):
        check_ids(ids, 8, "demo")
        with pytest.raises(
            InputError, match=r"demo: the tokenizer gives token 7, the model has 7 .* do not belong together"
        ):
            check_ids(ids, 7, "demo")
    check_ids([], 1, "nothing")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 9}, {7, 8, 9, EOS}),
        ({"eos_token_id": 7}, {}, {7, EOS}),
        ({"eos_token_id": None}, {"eos_token_id": []}, {EOS}),
        (None, {"eos_token_id": [3]}, {3, EOS}),
        ({}, None, {EOS}),
    ],
)
def test_ends_of_all_three_files(generation: Any, config: Any, expected: set, tmp_path: Path) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert end_tokens(tmp_path, built(None, **NAMES)) == expected
    assert end_tokens(tmp_path, built(None)) == expected - {EOS}


@pytest.mark.parametrize(
    "damage", ['{"eos_token_id": "7"}', '{"eos_token_id": [true]}', '{"eos_token_id": {}}', "{", "\xff"]
)
def test_ends_that_are_no_ids_name_the_file(damage: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(damage.encode("latin-1"))
    with pytest.raises(InputError, match=r"generation_config\.json") as error:
        end_tokens(tmp_path, built(None, **NAMES))
    assert "\n" not in str(error.value)
