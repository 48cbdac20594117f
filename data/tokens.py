"""Token ids on their way into a model: what a tokenizer may add, where it may stand, and that the embedding has a row for it.

A tokenizer that was saved with an end token (``add_eos_token``) puts one behind every text. Behind a text that is
continued (a prompt, the context of a task) it is taken off again: it would be scored, or generation start behind an end.
Calibration and perplexity keep it, as the originals call the tokenizer: it stands at the end of the joined text, and of
C4 at the end of each document, so in few windows or in none.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.core.errors import InputError, first_line
from quant.core.files import read_json

if TYPE_CHECKING:  # command lines answer mistakes without waiting for torch
    from torch import Tensor

TEXT_MB = 128  # of text tokenized at once; a tokenizer takes 40 to 140 times that in memory
BOM = "\ufeff"
Ids = list[int]


def check_ids(ids: Ids | Tensor, rows: int, origin: str) -> None:
    """Raise InputError where the embedding, of so many rows, lacks one for an id; origin: whose ids, in words."""
    largest = max(ids, default=0) if isinstance(ids, list) else int(ids.max())
    if largest >= rows:
        raise InputError(
            f"{origin}: the tokenizer gives token {largest}, the model has {rows} (rows of its embedding): tokenizer and "
            "model do not belong together, or tokens were added and the embedding was not resized"
        )


def encode(tokenizer: Any, text: str, origin: str, *, special: bool = True, end: bool = True) -> Ids:
    """Ids of a text. special: with the tokenizer's own special tokens; end: also with those behind the text.

    Raises InputError, which begins with ``origin``, for text that the tokenizer does not take.
    """
    if len(text) > TEXT_MB << 20:
        raise InputError(
            f"{origin}: {len(text) >> 20} MB of text would be tokenized at once; the bound is {TEXT_MB} MB: give a part"
        )
    try:
        encoding = tokenizer(text, add_special_tokens=special, return_special_tokens_mask=not end, verbose=False)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises no other, remote code whatever it likes
        raise InputError(f"{origin} cannot be tokenized ({first_line(error).splitlines()[0][:200]})") from error
    ids: Ids = encoding["input_ids"]
    if None in ids:
        raise InputError(
            f"{origin} cannot be tokenized: the tokenizer has no token for a part of it, and none for unknown"
        )
    if end or not special:
        return ids
    mask: Ids = encoding["special_tokens_mask"]
    if all(mask):  # a text without tokens of its own
        mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    return ids[: len(ids) - _ones_behind(mask)]


def _ones_behind(mask: Ids) -> int:
    return next((i for i, added in enumerate(reversed(mask)) if not added), 0)


def prefix_token(tokenizer: Any) -> int | None:
    """What stands before a text that begins with nothing: BOS, else EOS; None where the tokenizer names neither."""
    token = tokenizer.bos_token_id
    return tokenizer.eos_token_id if token is None else token


def encode_prompt(tokenizer: Any, text: str, origin: str) -> Ids:
    """Ids of a text that is continued: with the tokenizer's special tokens in front (not twice where the text begins with
    the prefix token), without those behind. So lm-eval 0.4.13's HFLM.tok_encode, which leaves an end token where it is."""
    prefix = prefix_token(tokenizer)
    special = prefix is None or not text.startswith(tokenizer.decode(prefix))
    return encode(tokenizer, text, origin, special=special, end=False)


def encode_request(tokenizer: Any, context: str, answer: str, origin: str) -> tuple[Ids, Ids]:
    """Ids of a task's context and of its answer, neither empty, as lm-eval's TemplateLM has them: blanks at the end of the
    context belong to the answer, both are encoded as one text; before an empty context stands the prefix token.

    Raises InputError where nothing is scored, or nothing stands before it.
    """
    blanks = len(context) - len(context.rstrip())
    if context:
        whole = encode_prompt(tokenizer, context + answer, origin)
        before = encode_prompt(tokenizer, context[: len(context) - blanks], origin)
        scored = whole[len(before) :]
    else:
        before, scored = [], encode(tokenizer, answer, origin, special=False)
    if not before:
        prefix = prefix_token(tokenizer)
        if scored[:1] == [prefix]:
            before, scored = scored[:1], scored[1:]
        elif prefix is not None:
            before = [prefix]
        else:
            raise InputError(
                f"{origin}: a context is empty, and the tokenizer names neither a BOS nor an EOS token to stand before the "
                "answer: name one in tokenizer_config.json"
            )
    if not scored:
        raise InputError(f"{origin}: the answer {answer!r} has no tokens behind its context")
    return before, scored


def end_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """Ids at which a model stops: of its generation_config.json, its config.json and its tokenizer.

    Raises InputError where one of the files names something else than ids.
    """
    ends = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        if not (directory / name).exists():
            continue
        named = read_json(directory / name).get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(token) is int for token in ids):
            raise InputError(f"{directory / name}: eos_token_id is {named!r}; give an id or a list of ids")
        ends.update(ids)
    return frozenset(ends)
