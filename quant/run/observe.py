"""What is known of the inputs of a block's linears before they are solved: sums over calibration, and a few kept inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from quant.blocks.fake_quant import ActSpec
from quant.blocks.linears import See
from quant.blocks.saliency import TokenWeights
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.gram import GramStats, InputSample

HELDOUT_TOKENS = 2048  # that errors are measured on, of the windows that are kept out


@dataclass(frozen=True)
class InputStats:
    """What is known of the inputs of a group of linears: the statistics that are solved with, and inputs at tokens that
    were kept out of them, to measure on; None where there are none. weighted: by linear, the statistics that parts of its rows
    are solved with instead, where tokens count differently for each."""

    calibration: GramStats
    heldout: InputSample | None = None
    weighted: Mapping[str, Sequence[GramStats]] = field(default_factory=dict)


@dataclass(frozen=True)
class Original:
    """The original model beside the quantized one, in front of the same block: its stream, the block's weights in full
    precision, and for linears that add to the residual stream the module whose input that stream is."""

    stream: BlockStream
    weights: BlockWeights
    residual_at: Mapping[str, str] = field(default_factory=dict)


def observe(
    stream: BlockStream,
    index: int,
    weights: BlockWeights,
    groups: Sequence[Sequence[str]],
    act: ActSpec | None = None,
    original: Original | None = None,
    tokens: TokenWeights | None = None,
) -> dict[str, InputStats]:
    """Inputs of block ``index`` by the first linear of each group; the streams stay in front of it. original: whose inputs
    the statistics hold besides. tokens: what tokens weigh for each linear."""
    names = [group[0] for group in groups]
    shapes = {name: weights.weight(name).shape for name in names}
    stats = {group[0]: Sums(group, index, stream, shapes[group[0]][1], tokens) for group in groups}
    heldout = stream.heldout
    samples: dict[str, InputSample] = {}
    if heldout is not None:
        samples = {name: InputSample(-(-heldout.tokens.numel() // HELDOUT_TOKENS)) for name in names}
    if original is None:
        stream.run(index, weights, observe={name: stats[name].update for name in names}, act=act)
        if heldout is not None:
            heldout.run(index, weights, observe={name: samples[name].update for name in names}, act=act)
        return {name: InputStats(stats[name].plain, samples.get(name), stats[name].weighted) for name in names}
    for batch in range(len(stream.rows)):
        pair = _Pair(original, index, batch, names)
        stream.run(index, weights, observe=pair.observers(stats), act=act, only=batch)
    if heldout is not None:
        assert original.stream.heldout is not None
        apart = Original(original.stream.heldout, original.weights)
        for batch in range(len(heldout.rows)):
            observers: dict[str, See] = _Pair(apart, index, batch, names).observers(samples)
            heldout.run(index, weights, observe=observers, act=act, only=batch)
    return {name: InputStats(stats[name].plain, samples.get(name), stats[name].weighted) for name in names}


class Sums:
    """The statistics of a group of linears, as their shared input comes window by window: of all tokens alike, and where
    tokens have weights, of every part of every linear."""

    def __init__(
        self, group: Sequence[str], index: int, stream: BlockStream, n_in: int, tokens: TokenWeights | None
    ) -> None:
        self.plain = GramStats(n_in, stream.device)
        self._index, self._length, self._tokens, self._seen = index, stream.tokens.shape[1], tokens, 0
        self.weighted: dict[str, list[GramStats]] = {}
        if tokens is not None:
            self.weighted = {name: [GramStats(n_in, stream.device) for _ in tokens.rows(name)] for name in group}

    def update(self, x: Tensor, full: Tensor | None = None, lacking: Tensor | None = None) -> None:
        """Add inputs of the next windows, as `GramStats.update` takes them."""
        self.plain.update(x, full, lacking)
        windows = x.numel() // x.shape[-1] // self._length
        rows, self._seen = slice(self._seen, self._seen + windows), self._seen + windows
        for name, stats in self.weighted.items():
            assert self._tokens is not None
            weights = self._tokens.of(self._index, name, rows)
            for own, part, s in zip(stats, self._tokens.rows(name), weights.T, strict=True):
                own.update(x, full, None if lacking is None else lacking[..., part], s)


class _Pair:
    """The original's inputs at the tokens of one batch, waiting for those of the quantized model."""

    def __init__(self, original: Original, index: int, batch: int, names: Sequence[str]) -> None:
        self.writers = {name: place for name, place in original.residual_at.items() if name in names}
        self.full: dict[str, Tensor] = {}
        self.lacking: dict[str, Tensor] = {}
        observers = {name: self._keep(name) for name in (*names, *self.writers.values())}
        original.stream.run(index, original.weights, observe=observers, only=batch)

    def _keep(self, name: str) -> See:
        def see(x: Tensor) -> None:
            self.full[name] = x

        return see

    def observers(self, stats: Mapping[str, Sums] | Mapping[str, InputSample]) -> dict[str, See]:
        """What to do with the quantized model's inputs of the same batch."""
        places = {place: self._residual(place) for place in self.writers.values()}
        linears = {name: self._update(name, one, places.get(name)) for name, one in stats.items()}
        return places | linears

    def _residual(self, place: str) -> See:
        def see(x: Tensor) -> None:
            self.lacking[place] = self.full[place].float() - x.float()

        return see

    def _update(self, name: str, stats: Sums | InputSample, also: See | None) -> See:
        def see(x: Tensor) -> None:
            if also is not None:  # a linear that reads the stream itself
                also(x)
            if name in self.writers:
                assert isinstance(stats, Sums)
                stats.update(x, self.full[name], self.lacking[self.writers[name]])
            else:
                stats.update(x, self.full[name])

        return see


def original_beside(stream: BlockStream) -> BlockStream:
    """The original model's stream over the same windows, those that are held out too; both are in front of the first block
    still."""
    full = stream.fork()
    if stream.heldout is not None:
        full.attach(stream.heldout.fork())
    return full
