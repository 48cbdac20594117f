"""What is known of the inputs of a block's linears before they are solved: sums over calibration, and a few kept inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from quant.blocks.fake_quant import ActSpec
from quant.blocks.linears import ModuleCall, See
from quant.blocks.reading import BlockReader
from quant.blocks.saliency import TokenWeights
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.gram import GramStats
from quant.core.sample import InputSample
from quant.run.experts import Calls, ExpertStats, is_experts
from quant.run.statistics import HELDOUT_TOKENS, InputStats, Original

Place = str | ModuleCall  # a linear, or a module of which all arguments are seen


def observe(
    stream: BlockStream,
    index: int,
    weights: BlockWeights,
    groups: Sequence[Sequence[str]],
    act: ActSpec | None = None,
    original: Original | None = None,
    tokens: TokenWeights | None = None,
) -> Mapping[str, InputStats]:
    """Inputs of block ``index`` by the first linear of each group; the streams stay in front of it. original: whose inputs
    the statistics hold besides. tokens: what tokens weigh for each linear. Those of experts are made when they are asked for
    (`ExpertStats`)."""
    family = stream.model.family
    ordinary = [group for group in groups if not is_experts(group[0], family)]
    names = [group[0] for group in ordinary]
    sums: dict[str, Sums] = {}
    stats: dict[Place, Sums | Calls] = {}
    for group in ordinary:
        stats[group[0]] = sums[group[0]] = Sums(group, index, stream, weights.weight(group[0]).shape[1], tokens)
    heldout = stream.heldout
    samples: dict[Place, InputSample | Calls] = {}
    if heldout is not None:
        samples = {name: InputSample(-(-heldout.tokens.numel() // HELDOUT_TOKENS)) for name in names}
    mixture = ModuleCall(family.experts)
    if len(ordinary) < len(groups):
        stats[mixture] = Calls(stream, paired=original is not None)
        if heldout is not None:
            samples[mixture] = Calls(heldout, paired=original is not None)
    _run(stream, index, weights, stats, act, original)
    if heldout is not None:
        apart = None
        if original is not None:
            assert original.stream.heldout is not None
            apart = Original(original.stream.heldout, original.weights)
        _run(heldout, index, weights, samples, act, apart)
    plain = {}
    for name, one in sums.items():
        sample = samples.get(name)
        assert not isinstance(sample, Calls)
        plain[name] = InputStats(one.plain.add_up(original is not None), sample, one.weighted)
    calls, apart_calls = stats.get(mixture), samples.get(mixture)
    if not isinstance(calls, Calls):
        return plain
    assert apart_calls is None or isinstance(apart_calls, Calls)
    of_experts = [group[0] for group in groups if is_experts(group[0], family)]
    return ExpertStats(stream, index, weights, of_experts, act, calls, apart_calls, original, plain)


def _run(
    stream: BlockStream,
    index: int,
    weights: BlockWeights,
    stats: Mapping[Place, Sums | Calls] | Mapping[Place, InputSample | Calls],
    act: ActSpec | None,
    original: Original | None,
) -> None:
    """Show ``stats`` what goes into their places, of all windows."""
    if original is None:
        stream.run(index, weights, observe={place: one.update for place, one in stats.items()}, act=act)
        return
    for batch in range(len(stream.rows)):
        pair = _Pair(original, index, batch, list(stats))
        stream.run(index, weights, observe=pair.observers(stats), act=act, only=batch)


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

    def __init__(self, original: Original, index: int, batch: int, places: Sequence[Place]) -> None:
        self.writers = {name: place for name, place in original.residual_at.items() if name in places}
        self.full: dict[Place, Any] = {}
        self.lacking: dict[str, Tensor] = {}
        observers = {place: self._keep(place) for place in (*places, *self.writers.values())}
        original.stream.run(index, original.weights, observe=observers, only=batch)

    def _keep(self, place: Place) -> See:
        def see(x: Any) -> None:
            self.full[place] = x

        return see

    def observers(self, stats: Mapping[Place, Sums | Calls] | Mapping[Place, InputSample | Calls]) -> dict[Place, See]:
        """What to do with the quantized model's inputs of the same batch."""
        written: dict[Place, See] = {place: self._residual(place) for place in self.writers.values()}
        return written | {place: self._update(place, one, written.get(place)) for place, one in stats.items()}

    def _residual(self, place: str) -> See:
        def see(x: Tensor) -> None:
            self.lacking[place] = self.full[place].float() - x.float()

        return see

    def _update(self, place: Place, stats: Sums | InputSample | Calls, also: See | None) -> See:
        def see(x: Any) -> None:
            if also is not None:  # a linear that reads the stream itself
                also(x)
            if isinstance(place, str) and place in self.writers:
                assert isinstance(stats, Sums)
                stats.update(x, self.full[place], self.lacking[self.writers[place]])
            else:
                stats.update(x, self.full[place])

        return see


def original_behind(start: BlockStream) -> BlockStream:
    """The original model's stream over the windows of a stream in front of the first block, behind the last one."""
    full = start.fork()
    n_blocks = len(full.model.blocks)
    with BlockReader(full.model, full.device, n_blocks) as reader:
        for index in range(n_blocks):
            full.run(index, reader.read(index), advance=True)
    return full


def original_beside(stream: BlockStream) -> BlockStream:
    """The original model's stream over the same windows, those that are held out too; both are in front of the first block
    still."""
    full = stream.fork()
    if stream.heldout is not None:
        full.attach(stream.heldout.fork())
    return full
