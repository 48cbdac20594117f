"""A tokenizer as the facts of a GGUF file. llama.cpp has tokenizers of its own, chosen by name: only those are written that
do what tokenizer.json says (llama.cpp, convert_hf_to_gguf.py, src/llama-vocab.cpp)."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from models.gguf_facts import Facts
from quant.core.errors import InputError
from quant.core.text import brief

log = logging.getLogger(__name__)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
SPACE = "▁"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES, RAW_BYTES = ("ByteLevel", True), ("ByteLevel", False)  # with GPT-2's way to cut words, or without
# How text is cut before merges, step by step as in tokenizer.json, and llama.cpp's name of it
CUTS: dict[tuple[Any, ...], str] = {
    (BYTES,): "gpt-2",
    (("Digits", True), BYTES): "smollm",
    (("Split", WORDS % "{1,3}", "Isolated"), RAW_BYTES): "llama-bpe",
    (("Split", WORDS % "", "Isolated"), RAW_BYTES): "qwen2",
    (("Punctuation", "Contiguous"), BYTES, ("Digits", False), ("Split", "[0-9][0-9][0-9]", "Isolated")): "falcon",
    (("Split", r" ?[^(\s|[.,!?…。，、।۔،])]+", "Isolated"), RAW_BYTES): "bloom",
}
WHOLE_WORDS = ("llama-bpe",)  # of these llama.cpp takes a word of the vocabulary as it is, whatever the merges say
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
Json = Mapping[str, Any]


def vocabulary(tokenizer: Any, rows: int) -> Facts:
    """The facts of a tokenizer, for a model with so many rows of its embedding. Raises InputError for a tokenizer that
    llama.cpp does not have."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("it has no tokenizer.json")
    described = json.loads(backend.to_str())
    kind = described["model"]["type"]
    if kind not in ("BPE", "WordLevel"):
        raise _unknown(f"its model is {kind}")
    tokens, types = _tokens(described, rows)
    if kind == "WordLevel":
        facts = _words(described, tokens)
    else:
        facts = _pieces(described, tokens, types) if described["model"].get("byte_fallback") else _bytes(described)
    facts |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return facts | _special(tokenizer)


def _unknown(why: str) -> InputError:
    return InputError(
        f"gguf: llama.cpp has no such tokenizer ({why}): use format bitplane or compressed-tensors, whose tokenizer.json "
        "is kept"
    )


def _tokens(described: Json, rows: int) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens; rows of the embedding that no token has are unused ones."""
    model = described["model"]
    named = {number: (text, NORMAL) for text, number in model["vocab"].items()}
    for added in described.get("added_tokens") or ():
        kind = CONTROL if added["special"] else USER_DEFINED
        text = added["content"] if added["special"] else added["content"].replace(SPACE, " ")
        named[added["id"]] = (text, kind)
    if max(named) >= rows:
        raise InputError(f"gguf: the tokenizer has {max(named) + 1} tokens, but the model's embedding {rows} rows")
    texts = [named.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    unknown = model.get("unk_token")
    kinds = [UNKNOWN if text == unknown and kind != USER_DEFINED else kind for text, kind in texts]
    return [text for text, _ in texts], kinds


def _bytes(described: Json) -> Facts:
    """Merges of bytes, as of GPT-2."""
    model = described["model"]
    steps = tuple(_steps(described.get("pre_tokenizer")))
    name = CUTS.get(steps)
    if name is None:
        raise _unknown(f"it cuts text by {brief(str(steps), 120)}")
    normalizer = described.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unknown(f"it normalizes text by {normalizer['type']}")
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS):
        raise _unknown(f"it cuts text as {name}, with ignore_merges {model.get('ignore_merges')}")
    merges = [" ".join(pair) for pair in _pairs(model)]
    if not merges:
        raise _unknown("it has no merges")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": merges,
    }


def _pieces(described: Json, tokens: Sequence[str], types: list[int]) -> Facts:
    """Pieces of SentencePiece with bytes for what has none. llama.cpp joins those two neighbours first whose piece has the
    highest score, so that minus the rank of its merges does what they do, as far as every way to a piece is a merge."""
    ranks: dict[str, int] = {}
    pairs = list(_pairs(described["model"]))
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    _check_merges(pairs, {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL})
    for number, text in enumerate(tokens):
        if types[number] == NORMAL and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = BYTE
    steps = tuple(_steps(described.get("normalizer"))) + tuple(_steps(described.get("pre_tokenizer")))
    prefix = [step for step in steps if step[0] in ("Prepend", "Metaspace")]
    known = (("Replace", " ", SPACE), ("Prepend", SPACE), ("Split", " ", "MergedWithPrevious"))
    if any(step not in known and step[0] != "Metaspace" for step in steps):
        raise _unknown(f"its pieces stand behind {brief(str(steps), 120)}")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(text, 0)) for text in tokens],
        "tokenizer.ggml.add_space_prefix": bool(prefix) and prefix[0] != ("Metaspace", "never"),
    }


def _check_merges(pairs: Sequence[tuple[str, str]], pieces: Collection[str]) -> None:
    """Raise InputError where two pieces make a third that no merge makes, or merges to one are not behind each other."""
    known = set(pairs)
    for piece in pieces:
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        if missing := [pair for pair in splits if pair not in known and pair[0] in pieces and pair[1] in pieces]:
            raise _unknown(f"{brief(repr(missing[0]), 60)} are pieces of a third, but no merge")
    done: set[str] = set()
    for (left, right), before in zip(pairs, ("", *map("".join, pairs)), strict=False):
        if left + right != before and left + right in done:
            raise _unknown(f"its merges to {brief(repr(left + right), 40)} are not behind each other")
        done.add(left + right)


def _words(described: Json, tokens: Sequence[str]) -> Facts:
    """Whole words, for which llama.cpp's unigrams stand in: of words that are in the vocabulary they find the same."""
    steps = tuple(_steps(described.get("pre_tokenizer")))
    if not steps or steps[-1] != ("Metaspace", "always") or described.get("normalizer") is not None:
        raise _unknown(f"it cuts words by {brief(str(steps), 120)}")
    log.warning(
        "gguf: llama.cpp cuts words that are not in the vocabulary, and line breaks, otherwise than this tokenizer"
    )
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-1.0] * len(tokens),
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }


def _steps(step: Json | None) -> Iterator[tuple[Any, ...]]:
    """What is done to text one after the other, each with what decides it."""
    if step is None:
        return
    kind = step["type"]
    if kind == "Sequence":
        for inner in step.get("pretokenizers") or step.get("normalizers") or ():
            yield from _steps(inner)
    elif kind == "ByteLevel":
        yield (kind, bool(step.get("use_regex", True)), *(["add_prefix_space"] if step.get("add_prefix_space") else []))
    elif kind == "Digits":
        yield kind, bool(step.get("individual_digits"))
    elif kind == "Split":
        pattern = step["pattern"]
        yield kind, next(iter(pattern.values())), step["behavior"], *(["invert"] if step.get("invert") else [])
    elif kind == "Replace":
        yield kind, next(iter(step["pattern"].values())), step["content"]
    else:
        known = {"Punctuation": "behavior", "Prepend": "prepend", "Metaspace": "prepend_scheme"}
        yield kind, step.get(known.get(kind, ""))


def _pairs(model: Json) -> Iterator[tuple[str, str]]:
    """The merges: pairs of texts, or (older files) both in one text."""
    for merge in model.get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _special(tokenizer: Any) -> Facts:
    """The tokens that begin and end texts, whether they are added, and the template of chats."""
    facts: Facts = {}
    for name, key in SPECIAL.items():
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            facts[f"tokenizer.ggml.{key}"] = int(number)
    ids, plain = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    facts["tokenizer.ggml.add_bos_token"] = len(ids) > len(plain) and ids[0] == tokenizer.bos_token_id
    facts["tokenizer.ggml.add_eos_token"] = len(ids) > len(plain) and ids[-1] == tokenizer.eos_token_id
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        facts["tokenizer.chat_template"] = template
    return facts
