"""Log-likelihoods of token sequences under several forms of a model, which passes its blocks one at a time.

All forms (full precision, quantized ones, with their quantized activations) are scored together, so every block is read
once for a set of requests. Sequences are padded on the right, which a causal model does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.load import LazyModel, Weights
from quant.blocks.stream import BlockStream
from quant.core import ranks
from quant.evaluate.passes import HEAD_ELEMENTS, Variant, captured, outside_of, pass_blocks, tokens_at_a_time

HIDDEN_BYTES = 4 << 30  # of hidden states held at a time, all variants together
PAD_TO = 32
Key = tuple[tuple[int, ...], int]  # tokens, how many at the end are scored
Score = tuple[float, bool]  # log-likelihood of them, whether each was the likeliest token


@dataclass
class Scorer:
    """Log-likelihoods under several variants of a model, remembered by request."""

    model: LazyModel
    variants: Mapping[str, Variant]
    device: torch.device
    batch: int
    store: str
    directory: Path
    progress: Callable[[int, int], None] = lambda done, total: None

    def __post_init__(self) -> None:
        self.known: dict[str, dict[Key, Score]] = {name: {} for name in self.variants}

    def scores(self, variant: str, requests: Sequence[Key]) -> list[Score]:
        """Scores of requests under one variant; what is new is computed for all of them, by several processes every n-th each."""
        known = self.known[variant]
        everyone = sorted({key for key in requests if key not in known}, key=lambda key: (len(key[0]), key))
        new = everyone[ranks.rank() :: ranks.size()]
        width = self.model.config.hidden_size * self.model.dtype.itemsize * len(self.variants)
        chunk: list[Key] = []
        chunks, held = [chunk], 0
        for key in new:
            if chunk and held + self._padded_length(key) * width > HIDDEN_BYTES:
                chunk, held = [], 0
                chunks.append(chunk)
            chunk.append(key)
            held += self._padded_length(key) * width
        for number, part in enumerate(chunks):
            if part:
                self._score(part, number, len(chunks))
        if ranks.size() > 1:
            self._learn_of_others(everyone)
        return [known[key] for key in requests]

    def _learn_of_others(self, keys: Sequence[Key]) -> None:
        """Take in what every process has found for its part of these."""
        mine = keys[ranks.rank() :: ranks.size()]
        for known in self.known.values():
            for place, scores in enumerate(ranks.all_told([known[key] for key in mine])):
                own = keys[place :: ranks.size()]
                known.update({key: (value, likely) for key, (value, likely) in zip(own, scores, strict=True)})

    def _padded_length(self, key: Key) -> int:
        """Length of the window that holds all tokens but the last, which nothing follows."""
        return min(-(-(len(key[0]) - 1) // PAD_TO) * PAD_TO, self.model.max_length)

    def _score(self, keys: list[Key], number: int, n_chunks: int) -> None:
        """Pass the blocks with all sequences of a chunk, then read the logits."""
        lengths: dict[int, list[Key]] = {}
        for key in keys:
            lengths.setdefault(self._padded_length(key), []).append(key)
        outside = self.model.outside_weights(self.device)
        streams: dict[int, dict[str, BlockStream]] = {}
        for length, group in lengths.items():
            ids = torch.zeros(len(group), length, dtype=torch.long)
            for row, (tokens, _) in enumerate(group):
                ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            settings = {"device": self.device, "batch": self.batch, "store": self.store, "directory": self.directory}
            streams[length] = captured(self.model, ids, self.variants, outside, **settings)
        del outside

        def progress(done: int, total: int) -> None:
            self.progress(number * total + done, n_chunks * total)

        pass_blocks(self.model, self.variants, streams.values(), self.device, progress)
        forms = outside_of(self.variants, self.model.outside_weights(self.device))
        for length, group in lengths.items():
            for name, stream in streams[length].items():
                with forms[name].mounted(self.model.module) as own:
                    self.known[name].update(zip(group, _read(stream, group, own), strict=True))


@torch.inference_mode()
def _read(stream: BlockStream, group: Sequence[Key], outside: Weights) -> list[Score]:
    """Scores of the sequences of one stream, in order."""
    (n, length), vocabulary = stream.tokens.shape, stream.model.config.vocab_size
    if length * vocabulary > HEAD_ELEMENTS:
        return [_read_long(stream, row, key, outside) for row, key in enumerate(group)]
    step = max(1, HEAD_ELEMENTS // (length * vocabulary))
    answers: list[Score] = []
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        # A large vocabulary's head costs more than the blocks: it sees the stretch that holds what is scored of these rows.
        first = min(len(tokens) - scored - 1 for tokens, scored in group[rows])
        last = max(len(tokens) - 1 for tokens, _ in group[rows])
        log_p = torch.log_softmax(stream.logits(rows, outside, slice(first, last)), -1)
        for row, (tokens, scored) in enumerate(group[rows]):
            end = len(tokens) - 1 - first
            answers.append(_score_of(log_p[row, end - scored : end], tokens[len(tokens) - scored :]))
    return answers


def _read_long(stream: BlockStream, row: int, key: Key, outside: Weights) -> Score:
    """The score of one sequence whose logits would be too many: those alone that are asked for, some tokens at a time."""
    (tokens, scored), total, likely = key, 0.0, True
    first, end = len(tokens) - scored - 1, len(tokens) - 1
    together = tokens_at_a_time(stream.model.config.vocab_size)
    for start in range(first, end, together):
        stop = min(start + together, end)
        log_p = torch.log_softmax(stream.logits(slice(row, row + 1), outside, slice(start, stop))[0], -1)
        part, same = _score_of(log_p, tokens[start + 1 : stop + 1])
        total, likely = total + part, likely and same
    return total, likely


def _score_of(log_p: Tensor, tokens: tuple[int, ...]) -> Score:
    """Of tokens, from the log-probabilities [n, vocabulary] at the places before each."""
    target = torch.tensor(tokens, device=log_p.device)
    likely = bool((log_p.argmax(-1) == target).all())
    return float(log_p.gather(-1, target[:, None]).double().sum()), likely
