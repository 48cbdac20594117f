"""Windows of tokens for calibration and for perplexity, by the originals' protocols, each under its name.

wikitext2  train and test joined by blank lines, tokenized whole; calibration windows start anywhere; evaluation
           cuts windows without overlap and drops the rest. `demo` and files follow this protocol.
ptb        train and validation, one sentence a document, joined likewise; ptb-new: train and test joined by blanks.
c4         documents longer than a window are drawn at random, and a window of each. Calibration reads the train
           shard 0 (QuantEase's released code reads the validation shard: it calibrates on what it evaluates);
           evaluation draws 256 windows from the validation shard 0 with seed 0. c4-new: evaluation on the first
           1100 validation documents joined by blanks, 256 windows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.corpora import (
    CALIBRATION,
    check_file,
    check_source,
    file_documents,
    file_stem,
    hub_documents,
    is_file,
    sha256_of,
)
from data.tokens import encode
from data.written import Written, written
from quant.core.errors import InputError
from quant.core.files import write_atomically

MIXED = ("wikitext2", "ptb", "c4")  # OmniQuant's ``mix``: a third of the windows from each
PILE_DOCUMENTS = 1000
JOINED = {  # name: (corpus, calibration split, evaluation split, separator)
    "wikitext2": ("wikitext2", "train", "test", "\n\n"),
    "ptb": ("ptb", "train", "validation", "\n\n"),
    "ptb-new": ("ptb", "train", "test", " "),
}
C4_WINDOWS, C4_NEW_DOCUMENTS = 256, 1100
MOST_UNKNOWN = 0.5  # of the tokens of a text
MAX_DRAWS = 20_000  # documents drawn for one window before giving up; 1 in 200 of C4 exceeds 4096 tokens
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """Windows of tokens. ids: int64 [n, seqlen] on the CPU. name: as on the command line, a path's without extension.

    text_sha256: hash of the documents; sha256: hash of the ids with their shape.
    """

    ids: Tensor
    name: str
    protocol: str
    text_sha256: str
    sha256: str


@dataclass(frozen=True)
class Author:
    """What writes windows: from first tokens [n], a length and a seed, int64 [n, length]. key: all else that decides its
    text: the model, the temperature."""

    write: Callable[[Tensor, int, int], Tensor]
    key: list[Any]


def calibration_tokens(
    source: str,
    tokenizer: Any,
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    author: Author | None = None,
) -> Tokens:
    """Calibration windows [nsamples, seqlen], and behind them those that ``author`` writes, where the source asks for some.
    Raises InputError for text that is not there or too short."""
    check_source(source, CALIBRATION)
    if (own := written(source)) is not None:
        beside = None
        if own.beside is not None:
            beside = calibration_tokens(
                own.beside,
                tokenizer,
                nsamples=nsamples,
                seqlen=seqlen,
                seed=seed,
                data_dir=data_dir,
                cache_dir=cache_dir,
            )
        request = [own.n or nsamples, seqlen, seed]
        return _with_written(source, own, beside, author, tokenizer, request, cache_dir)
    if source == "mix":
        sizes = [nsamples // len(MIXED) + (i < nsamples % len(MIXED)) for i in range(len(MIXED))]
        shares = [
            calibration_tokens(
                name, tokenizer, nsamples=n, seqlen=seqlen, seed=seed, data_dir=data_dir, cache_dir=cache_dir
            )
            for name, n in zip(MIXED, sizes, strict=True)
            if n
        ]
        ids, text = torch.cat([part.ids for part in shares]), sha256_of([part.text_sha256 for part in shares])
        return Tokens(ids, source, " + ".join(part.protocol for part in shares), text, _sha256(ids))
    if source in ("c4", "c4-new"):
        documents = hub_documents("c4", "train", data_dir)
        make = lambda: _draw_windows(source, documents, tokenizer, nsamples, seqlen, seed)  # noqa: E731
        protocol = "c4/train"
    else:
        documents, separator, protocol = _join(source, "calibration", data_dir)
        make = lambda: _anywhere(source, _encode(source, tokenizer, separator.join(documents)), nsamples, seqlen, seed)  # noqa: E731
    return _from_cache(source, protocol, documents, tokenizer, [nsamples, seqlen, seed], cache_dir, make)


def _with_written(
    source: str,
    own: Written,
    text: Tokens | None,
    author: Author | None,
    tokenizer: Any,
    request: list[int],
    cache: Any,
) -> Tokens:
    """Windows that the author writes, behind those of ``text``; from the cache or written now. request: windows, tokens of
    each, seed."""
    if author is None:
        raise InputError(f"--dataset {source}: text of the model's own is for runs that quantize it")
    n, seqlen, seed = request
    first = first_tokens(n, seed, tokenizer, None if text is None else text.ids)
    key = hashlib.sha256(json.dumps(["self", author.key, _sha256(first), request]).encode()).hexdigest()
    file = None if cache is None else cache / f"{key}.safetensors"
    ids = _read_cache(file)
    if ids is None:
        ids = author.write(first, seqlen, seed).contiguous()
        if file is not None:
            _write_cache(file, ids)
    digest = sha256_of([json.dumps(author.key), _sha256(ids)])
    if text is None:
        return Tokens(ids, source, "self", digest, _sha256(ids))
    ids = torch.cat([text.ids, ids])
    name = text.name + source.removeprefix(str(own.beside))
    return Tokens(ids, name, f"{text.protocol} + self", sha256_of([text.text_sha256, digest]), _sha256(ids))


def first_tokens(n: int, seed: int, tokenizer: Any, text: Tensor | None) -> Tensor:
    """The token that every window of an author begins with, int64 [n]: drawn from all tokens of the windows ``text``, or
    evenly from the tokenizer's vocabulary without its special tokens. Raises InputError where there are none."""
    if text is None:
        ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        text = torch.tensor(ordinary, dtype=torch.long)
        if not ordinary:
            raise InputError("--dataset self: the tokenizer has no tokens to begin with; use SOURCE+self")
    pool = text.flatten()
    return pool[torch.randint(len(pool), (n,), generator=torch.Generator().manual_seed(seed))]


def evaluation_tokens(
    source: str,
    tokenizer: Any,
    *,
    seqlen: int,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    limit: int | None = None,
) -> Tokens:
    """Evaluation windows [n, seqlen], the first ``limit`` of them. Raises InputError as calibration_tokens does."""
    check_source(source)
    if source == "c4":
        documents, protocol = hub_documents("c4", "validation", data_dir), "c4/validation"
        make = lambda: _draw_windows(source, documents, tokenizer, C4_WINDOWS, seqlen, 0)  # noqa: E731
    elif source == "c4-new":
        documents, protocol = hub_documents("c4", "validation", data_dir, C4_NEW_DOCUMENTS), "c4-new/validation"
        if len(documents) < C4_NEW_DOCUMENTS:
            log.warning("%s: %d of the protocol's %d documents are there", source, len(documents), C4_NEW_DOCUMENTS)
        make = lambda: _in_order(source, _encode(source, tokenizer, " ".join(documents)), seqlen)[:C4_WINDOWS]  # noqa: E731
    else:
        documents, separator, protocol = _join(source, "evaluation", data_dir)
        make = lambda: _in_order(source, _encode(source, tokenizer, separator.join(documents)), seqlen)  # noqa: E731
    tokens = _from_cache(source, protocol, documents, tokenizer, ["evaluation", seqlen], cache_dir, make)
    if limit is None:
        return tokens
    ids = tokens.ids[:limit]
    return Tokens(ids, tokens.name, tokens.protocol, tokens.text_sha256, _sha256(ids))


def _join(source: str, use: str, data_dir: Path | None) -> tuple[Sequence[str], str, str]:
    """Documents, separator and protocol of the sources that are tokenized as one text."""
    if source == "demo":
        from data import demo

        split = "train" if use == "calibration" else "test"
        return [demo.text(split)], "\n\n", f"demo/{split}"
    if source == "pile":
        return hub_documents(source, "validation", data_dir, PILE_DOCUMENTS), "\n\n", "pile/validation"
    if source in JOINED:
        corpus, train, test, separator = JOINED[source]
        split = train if use == "calibration" else test
        return hub_documents(corpus, split, data_dir), separator, f"{source}/{split}"
    return file_documents(check_file(source)), "\n\n", "local/wikitext2"


def _encode(source: str, tokenizer: Any, text: str) -> Tensor:
    """Token ids [n] of a text as a whole, with the tokenizer's own special tokens at both ends, as the originals call it."""
    return torch.tensor(encode(tokenizer, text, source), dtype=torch.long)


def _anywhere(source: str, ids: Tensor, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Windows that start at random; they may overlap, as in the originals."""
    if len(ids) <= seqlen:
        raise InputError(
            f"{source} has {len(ids)} tokens, a window of --seqlen {seqlen} needs {seqlen + 1}: "
            "use a shorter --seqlen or a longer text"
        )
    rng = random.Random(seed)
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(nsamples)]
    return torch.stack([ids[start : start + seqlen] for start in starts])


def _in_order(source: str, ids: Tensor, seqlen: int) -> Tensor:
    """Windows without overlap; the rest of the text is dropped."""
    if len(ids) < seqlen:
        raise InputError(f"{source} has {len(ids)} tokens, fewer than one window of --seqlen {seqlen}")
    return ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)


def _draw_windows(source: str, documents: Sequence[str], tokenizer: Any, n: int, seqlen: int, seed: int) -> Tensor:
    """A window of each of n documents drawn at random among those longer than a window."""
    rng = random.Random(seed)
    lengths: dict[int, int] = {}  # of the documents found too short: not tokenized again
    windows = []
    for _ in range(n):
        ids = _draw(source, documents, tokenizer, seqlen, rng, lengths)
        start = rng.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return torch.stack(windows)


def _draw(
    source: str, documents: Sequence[str], tokenizer: Any, seqlen: int, rng: random.Random, lengths: dict[int, int]
) -> Tensor:
    """Ids of the next random document with more than seqlen tokens. Raises InputError where there is none."""
    for _ in range(MAX_DRAWS):
        if len(lengths) == len(documents):
            break
        index = rng.randint(0, len(documents) - 1)
        if index in lengths:
            continue
        ids = _encode(source, tokenizer, documents[index])
        if len(ids) > seqlen:
            return ids
        lengths[index] = len(ids)
    raise InputError(
        f"{source}: {len(lengths)} documents drawn, none has more than --seqlen {seqlen} tokens "
        f"(the longest has {max(lengths.values(), default=0)}): use a shorter --seqlen or another data set"
    )


def _from_cache(
    source: str,
    protocol: str,
    documents: Sequence[str],
    tokenizer: Any,
    request: list[Any],
    cache_dir: Path | None,
    make: Callable[[], Tensor],
) -> Tokens:
    """The windows from the cache, or made and put there."""
    name = file_stem(source) if is_file(source) else source
    text_sha256 = sha256_of(documents)
    key = hashlib.sha256(json.dumps([protocol, text_sha256, tokenizer_sha256(tokenizer), request]).encode()).hexdigest()
    file = None if cache_dir is None else cache_dir / f"{key}.safetensors"
    ids = _read_cache(file)
    if ids is None:
        ids = make().contiguous()
        if file is not None:
            _write_cache(file, ids)
    _warn_of_unknown(name, ids, tokenizer)
    return Tokens(ids, name, protocol, text_sha256, _sha256(ids))


def _warn_of_unknown(name: str, ids: Tensor, tokenizer: Any) -> None:
    """Say where the tokenizer knows less than half of a text: nothing measured on it tells anything of the model."""
    share = float((ids == tokenizer.unk_token_id).float().mean()) if tokenizer.unk_token_id is not None else 0.0
    if share > MOST_UNKNOWN:
        log.warning(
            "%s: %.0f%% of the tokens are the one for unknown text: is the text in a language of this model, and the "
            "tokenizer the model's?", name, 100 * share,
        )  # fmt: skip


def _read_cache(file: Path | None) -> Tensor | None:
    if file is None or not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            ids: Tensor = stored.get_tensor("ids")
            if stored.metadata()["sha256"] == _sha256(ids):
                return ids
    except (SafetensorError, KeyError, TypeError, OSError):
        pass
    log.warning("the token cache %s is damaged and is made again", file)
    return None


def _write_cache(file: Path, ids: Tensor) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save({"ids": ids}, {"format": "pt", "sha256": _sha256(ids)}))
    except OSError as error:
        raise InputError(f"cannot write the token cache {file.parent}: {error.strerror}; use --cache-dir") from error


def _sha256(ids: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what decides the ids: the fast tokenizer's definition, or a slow one's vocabulary, and the settings.

    Truncation and padding are left out: they are state that any call sets anew, and a plain call takes off.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        definition: Any = [sorted(tokenizer.get_vocab().items()), repr(tokenizer)]
    else:
        definition = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    names = ("add_bos_token", "add_eos_token", "split_special_tokens", "special_tokens_map")
    settings = [str(getattr(tokenizer, name, None)) for name in names]
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, settings, definition]).encode()).hexdigest()
