"""What is known of the inputs of a mixture's experts before they are solved.

An expert reads few of the calibration's tokens, and what it writes for token t is multiplied with the router's weight r_t: its
error there counts r_t² times. So its Gram matrix is the mean over its n tokens with these weights, shrunk towards tokens of
all kinds as if n0 = half its inputs of them had been seen too:

    H = n · Σ r_t² x_t x_tᵀ / Σ r_t²  +  n0 · mean over others of x xᵀ

For what reads the hidden states (gates and values) the others are all tokens, for what reads an expert's inner values they are
n0 tokens by a seed that were not routed to it. Products with the original model's inputs likewise. An expert that no token was
routed to is solved on the others alone. One expert's matrices are held at a time, besides those of all tokens; what the experts
are called with is kept where the hidden states are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.func import functional_call

from models.experts import READ_HIDDEN
from models.family import Groups, ModelFamily
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.blocks.linears import LinearRef
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.core.errors import InputError
from quant.core.gram import CHUNK, GramStats, shrunk
from quant.core.sample import InputSample
from quant.run.config import RunConfig
from quant.run.statistics import HELDOUT_TOKENS, InputStats, Original

BYTES_AT_ONCE = {"cuda": 2 << 30}  # by device, for what experts that are solved at once take in Gram matrices
COPIES = 4  # of each: its own, in the stack, damped, and factorized or with the original's inputs
log = logging.getLogger(__name__)
Call = tuple[Tensor, Tensor, Tensor]  # hidden states [tokens, hidden], experts and their weights [tokens, k]


class Calls:
    """What the experts of a block were called with, for every token of a stream, and the hidden states that the original model
    has there if ``paired``."""

    def __init__(self, stream: BlockStream, paired: bool) -> None:
        self._device, self._length, self._seen = stream.device, stream.tokens.shape[1], 0
        self._hidden = stream.new_store()
        self._full = stream.new_store() if paired else None
        self._index: list[Tensor] = []
        self._share: list[Tensor] = []

    def update(self, call: Call, full: Call | None = None) -> None:
        """Add the call for the next windows; full: the original's of the same windows."""
        hidden, index, share = call
        rows = slice(self._seen, self._seen + hidden.shape[0] // self._length)
        self._seen = rows.stop
        shape = (-1, self._length, hidden.shape[-1])
        self._hidden[rows] = hidden.view(shape)
        if self._full is not None:
            assert full is not None
            self._full[rows] = full[0].view(shape)
        self._index.append(index.clone())
        self._share.append(share.float())

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows."""
        return self._seen * self._length

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """The tokens that were routed to an expert, int64 [n] in order, and the router's weights of them, float32 [n]."""
        chosen = torch.cat(self._index) == expert
        return chosen.any(-1).nonzero().squeeze(1), torch.cat(self._share)[chosen]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states [n, hidden] of some tokens."""
        return _rows(self._hidden.data, tokens).to(self._device)

    def full(self, tokens: Tensor) -> Tensor | None:
        """Those of the original model, where there are any."""
        return None if self._full is None else _rows(self._full.data, tokens).to(self._device)


def _rows(store: Tensor, tokens: Tensor) -> Tensor:
    return store.view(-1, store.shape[-1])[tokens.to(store.device)]


class ExpertStats(Mapping[str, InputStats]):
    """The statistics of groups of linears by their first: of experts (``names``) made as they are asked for, one expert after
    another; of other linears (``beside``) as they are."""

    def __init__(
        self,
        stream: BlockStream,
        index: int,
        weights: BlockWeights,
        names: Sequence[str],
        act: ActSpec | None,
        calls: Calls,
        heldout: Calls | None,
        original: Original | None,
        beside: Mapping[str, InputStats],
    ) -> None:
        self._stream, self._block, self._index = stream, stream.model.blocks[index], index
        self._weights, self._act, self._original = weights, act, original
        self._calls, self._heldout, self._beside = calls, heldout, beside
        self._names = names
        self._last: tuple[str, InputStats] | None = None
        self._everyone: GramStats | None = None

    def __iter__(self) -> Iterator[str]:
        return iter((*self._beside, *self._names))

    def __len__(self) -> int:
        return len(self._beside) + len(self._names)

    def __getitem__(self, name: str) -> InputStats:
        if name in self._beside:
            return self._beside[name]
        if name not in self._names:
            raise KeyError(name)
        if self._last is None or self._last[0] != name:
            self._last = None  # room for the next
            with self._stream.clock.spent("observe"):
                self._last = (name, self._of(name))
        return self._last[1]

    @torch.inference_mode()
    def _of(self, name: str) -> InputStats:
        tokens, share = self._calls.of(number_of(name))
        n_in = self._weights.weight(name).shape[1]
        prior = max(1, n_in // 2)
        routed = self._sums(name, tokens, share.square())
        counts = ranks.all_told([len(tokens), float(share.square().sum())])
        n_routed, weight = (sum(own) for own in zip(*counts, strict=True))
        if name.endswith(READ_HIDDEN):
            if self._everyone is None:
                self._everyone = self._sums(name, torch.arange(self._calls.n_tokens))
            others = self._everyone
        else:
            seed = 1_000_003 * self._index + number_of(name)
            others = self._sums(name, self._drawn_others(tokens, prior, seed))
        if not n_routed:
            log.warning(
                "block %d %s: no calibration token was routed to it; solved on those of others", self._index, name
            )
        stats = shrunk(routed, weight, others, prior)
        return InputStats(stats, self._sample(name), routed=n_routed)

    def _drawn_others(self, routed: Tensor, n: int, seed: int) -> Tensor:
        """This process's of the tokens that are drawn among those of all: see `drawn_others`."""
        counts = ranks.all_told(self._calls.n_tokens)
        before = sum(counts[: ranks.rank()])
        drawn = drawn_others(sum(counts), ranks.all_rows(routed + before), n, seed)
        return drawn[(drawn >= before) & (drawn < before + self._calls.n_tokens)] - before

    def _sums(self, name: str, tokens: Tensor, weights: Tensor | None = None) -> GramStats:
        """Sums over what a linear reads where its expert gets these tokens, with weights [n] or without; those of all
        processes of the job."""
        stats = GramStats(self._weights.weight(name).shape[1], self._stream.device)
        parts = tokens.split(CHUNK)
        for part, own in zip(parts, [None] * len(parts) if weights is None else weights.split(CHUNK), strict=True):
            if len(part):
                stats.update(*self._inputs(name, self._calls, part), weights=own)
        return stats.add_up(self._original is not None)

    def _sample(self, name: str) -> InputSample | None:
        """What a linear reads at held-out tokens of its expert, times the router's weights; None where there are none."""
        if self._heldout is None:
            return None
        tokens, share = self._heldout.of(number_of(name))
        every = -(-len(tokens) // HELDOUT_TOKENS)
        if not len(tokens):
            return None
        sample, scale = InputSample(), share[::every, None]
        x, full = self._inputs(name, self._heldout, tokens[::every])
        sample.update(x * scale.to(x.dtype), None if full is None else full * scale.to(full.dtype))
        return sample

    def _inputs(self, name: str, calls: Calls, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a linear reads as its expert gets these tokens, as they are here and in the original model if there is one."""
        x, full = self._read(name, self._weights, self._act, calls.hidden(tokens)), calls.full(tokens)
        if full is None or self._original is None:
            return x, None
        return x, self._read(name, self._original.weights, None, full)

    def _read(self, name: str, weights: BlockWeights, act: ActSpec | None, hidden: Tensor) -> Tensor:
        """The input of a linear [n, in] as its expert is called with hidden states."""
        expert, seen = name.rpartition(".")[0], list[Tensor]()

        def see(x: Tensor) -> None:
            seen.append(x)
            raise _Seen

        with instrument(self._block, weights, act) as own, LinearRef.of_module(name).observe(self._block, own, see):
            inside = {n.removeprefix(f"{expert}."): t for n, t in own.items() if n.startswith(f"{expert}.")}
            with suppress(_Seen):
                functional_call(self._block.get_submodule(expert), inside, (hidden,))
        return seen[0]


def drawn_others(n_tokens: int, routed: Tensor, n: int, seed: int) -> Tensor:
    """At most n of the tokens below n_tokens that are not among ``routed``, int64 in order, drawn by a seed."""
    is_other = torch.ones(n_tokens, dtype=torch.bool)
    is_other[routed.cpu()] = False
    others = is_other.nonzero().squeeze(1)
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:n]
    return others[drawn].sort().values


class _Seen(BaseException):  # noqa: N818  (control flow, not an error)
    """Raised once a linear has its input."""


def number_of(name: str) -> int:
    """The number of the expert that a linear belongs to, by its name in the block."""
    return int(name.split(".")[-2])


def is_experts(name: str, family: ModelFamily) -> bool:
    """Whether a linear of a block is one of an expert that tokens are routed to."""
    return bool(family.experts) and name.startswith(f"{family.experts}.")


def stages(groups: Groups) -> list[list[tuple[str, ...]]]:
    """Groups that are solved one after another, each with inputs behind those before. Experts, and what all tokens share beside
    them, run side by side and are one stage: consecutive groups whose linears have the same last names."""
    found: list[list[tuple[str, ...]]] = []
    for group in groups:
        if found and _last_names(found[-1][0]) == _last_names(group):
            found[-1].append(group)
        else:
            found.append([group])
    return found


def _last_names(group: Sequence[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in group]


def experts_at_once(n_in: int, device: torch.device) -> int:
    """How many linears of experts with so many inputs are solved as one stack: as many as room is given, where launches cost
    more than products; on a CPU one after another."""
    return max(1, BYTES_AT_ONCE.get(device.type, 0) // (COPIES * 4 * n_in**2))


def check_mixture(family: ModelFamily, config: object, run: RunConfig) -> None:
    """Raise InputError for what runs on mixtures of experts are not offered."""
    if not family.experts:
        return
    asked = {
        f"--method {run.learner}": run.learning is not None,
        "--rotate": run.rotation is not None,
        "--column-scales": run.column_scales,
        "--tune": run.tuning is not None,
        "--saliency": run.saliency > 0,
        "--avg-bits": run.avg_bits is not None,
        "--bias-correction": run.bias_correction,
        "--a_dynamic_method static": run.act.active and run.act.method == "static",
    }
    if given := [flag for flag, is_given in asked.items() if is_given]:
        model_type = getattr(config, "model_type", "")
        raise InputError(
            f"{given[0]}: not for mixtures of experts ({model_type}); use rtn, gptq, quantease "
            "(with --preset fast or balanced), spqr, gptaq or qronos"
        )
