"""The experts of a mixture on a page: how many calibration tokens each saw."""

from __future__ import annotations

from collections.abc import Iterable

from quant.report.plots import INK, draw, new_figure
from quant.report.runs import EXPERT, Run


def tokens_by_expert(run: Run) -> dict[tuple[int, int], int]:
    """Calibration tokens that were routed to every expert, by block and expert; empty where there are none."""
    found = {}
    for record in run.records:
        match = EXPERT.search(record["name"])
        if match is not None and record["n_tokens"] is not None:
            found[record["block"], int(match[1])] = record["n_tokens"]
    return found


def experts_plot(run: Run) -> tuple[str, bytes] | None:
    """Tokens of every expert over an equal share of those of its block: a row a block, a column an expert; a cross where there
    were none. None for models without experts."""
    tokens = tokens_by_expert(run)
    if not tokens:
        return None
    blocks, experts = sorted({block for block, _ in tokens}), 1 + max(expert for _, expert in tokens)
    shares = [[_share(tokens, block, expert, experts) for expert in range(experts)] for block in blocks]
    with new_figure(7.2, 1.4 + min(8.0, 0.28 * len(blocks))) as figure:
        axes = figure.subplots()
        highest = max(2.0, max(map(max, shares)))
        # Vectors, as everything on the page: it shows no images, not even those that an SVG holds
        drawn = axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=highest)
        axes.invert_yaxis()
        nothing = [(x + 0.5, y + 0.5) for y, row in enumerate(shares) for x, share in enumerate(row) if share == 0]
        if nothing:
            axes.plot(*zip(*nothing, strict=True), "x", color="#d55e00", markersize=5)
        step = max(1, len(blocks) // 16)
        axes.set_yticks([y + 0.5 for y in range(0, len(blocks), step)], [str(block) for block in blocks[::step]])
        apart = max(1, experts // 16)
        axes.set_xticks([x + 0.5 for x in range(0, experts, apart)], [str(x) for x in range(0, experts, apart)])
        axes.set_xlabel("expert")
        axes.set_ylabel("block")
        bar = figure.colorbar(drawn, ax=axes, label="tokens / equal share", ticks=_ticks(highest))
        bar.outline.set_edgecolor(INK)
        bar.solids.set_rasterized(False)
        return draw(figure, "Calibration tokens of every expert, by block")


def _share(tokens: dict[tuple[int, int], int], block: int, expert: int, experts: int) -> float:
    """Tokens of an expert over what each would have if all had the same."""
    total = sum(tokens.get((block, other), 0) for other in range(experts))
    return tokens.get((block, expert), 0) * experts / total if total else 0.0


def _ticks(highest: float) -> Iterable[float]:
    return [0, 1, highest] if highest > 1.5 else [0, 1]
