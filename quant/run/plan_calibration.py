"""What calibration takes in a plan: passes through the blocks, and sums of products of inputs (formulas: quant/run/plan.py)."""

from __future__ import annotations

import torch

from quant.blocks import causal, kept
from quant.core.env import free_bytes
from quant.core.gram import BLOCK
from quant.core.linalg import PARTS
from quant.core.names import FULL_BITS
from quant.run.calibration import HELDOUT
from quant.run.config import RunConfig
from quant.run.experts import COPIES, experts_at_once, stages
from quant.run.rates import Rates
from quant.run.shapes import Kind, Shapes
from quant.run.statistics import HELDOUT_TOKENS
from quant.solvers import declaration_of

# Numbers of a token that a block reads and writes between its linears, in these widths, with what new memory costs: of the
# size that plans of SmolLM2 needed to agree with its runs (benchmarks/results/planned.md)
OF_HIDDEN, OF_WIDEST = 150, 16
OF_WEIGHTS = 150  # numbers read and written for one of a weight, where errors are measured


def calibration_cost(
    run: RunConfig, shapes: Shapes, tokens: int, beside: int, rates: Rates, itemsize: int, device: torch.device
) -> tuple[float, float, float]:
    """Bytes of the statistics, and seconds of the blocks' passes and of the sums. beside: models that calibration runs
    through."""
    blocks = list(shapes.first(min(run.num_layers, shapes.n_blocks)))
    seqlen = tokens // run.windows
    multiplied = sum(count * _multiplied(run, kind, tokens, itemsize, beside, device) for kind, count in blocks)
    passes = sum(count * beside * _passes(run, kind) for kind, count in blocks)
    attended = sum(count * beside * _attended(run, kind, tokens, itemsize, beside, device) for kind, count in blocks)
    again = sum(count * beside * _inner_flops(kind, tokens) for kind, count in blocks)
    products = sum(count * _products(run, kind, tokens, beside) for kind, count in blocks)
    apart = tokens + HELDOUT * seqlen  # windows that no solver sees go where the others go
    return (
        beside * max(_statistics(run, kind, device) for kind, _ in blocks),
        (apart * 2 * multiplied + again) / rates.products
        + apart * (attended * attention(shapes, seqlen, rates) + passes * copies(shapes, itemsize, rates)),
        products / rates.float32,
    )


def between(shapes: Shapes, seqlen: int, itemsize: int, rates: Rates) -> float:
    """Seconds of a token in one pass of a block besides the products of its linears."""
    return attention(shapes, seqlen, rates) + copies(shapes, itemsize, rates)


def attention(shapes: Shapes, seqlen: int, rates: Rates) -> float:
    """Seconds of a token in the products of one block's attention."""
    seen = seqlen if seqlen <= causal.TILE else (seqlen + causal.TILE) / 2
    return 4.0 * seen * shapes.heads * (shapes.head_dim or shapes.hidden // shapes.heads) / rates.products


def copies(shapes: Shapes, itemsize: int, rates: Rates) -> float:
    """Seconds of a token in what one block's norms, rotary embeddings, activations and sums read and write."""
    widest = max(out for _, out, _ in shapes.linears)
    return itemsize * (OF_HIDDEN * shapes.hidden + OF_WIDEST * widest) / rates.copied


def _steps(run: RunConfig, kind: Kind) -> list[list[str]]:
    """First linears of the groups whose statistics are alive together."""
    groups = tuple(tuple(name for name, _, _ in group) for group in kind.groups)
    steps = stages(groups) if run.true_sequential else [list(groups)]
    return [[group[0] for group in step] for step in steps]


def _statistics(run: RunConfig, kind: Kind, device: torch.device) -> int:
    """Bytes of the Gram matrices that are alive together."""
    by_name = {group[0][0]: group for group in kind.groups}

    def of_step(names: list[str]) -> int:
        groups = [by_name[name] for name in names]
        plain = sum(
            4 * group[0][2] ** 2 * (1 + run.saliency * len(group)) for group in groups if not kind.is_routed(group)
        )
        routed = [group[0][2] for group in groups if kind.is_routed(group)]
        if not routed:
            return plain
        together = experts_at_once(max(routed), device)
        stacked = COPIES * together if together > 1 else 0
        return plain + 4 * ((3 + stacked) * max(routed) ** 2 + routed[0] ** 2)

    return max(map(of_step, _steps(run, kind)))


def _passes(run: RunConfig, kind: Kind) -> int:
    """How often a block runs: once for every step, of which the first stops before anything is multiplied in
    --true-sequential, and once to go on."""
    return len(_steps(run, kind)) if run.true_sequential else 2


def _attended(run: RunConfig, kind: Kind, tokens: int, itemsize: int, beside: int, device: torch.device) -> int:
    """How often attention is computed: by the step that observes what it is multiplied with, and where its output is kept then,
    once behind it."""
    passes = _passes(run, kind)
    return min(2, passes) if _fits(kind, tokens, itemsize, beside, device) else passes


def _fits(kind: Kind, tokens: int, itemsize: int, beside: int, device: torch.device) -> bool:
    """Whether what a block's linears write is kept for its next passes."""
    size = itemsize * tokens * sum(out for group in kind.ordinary for _, out, _ in group)
    return size * beside <= kept.SHARE * free_bytes(device)


def _multiplied(run: RunConfig, kind: Kind, tokens: int, itemsize: int, beside: int, device: torch.device) -> float:
    """Parameters that a token meets in all passes of a block and of all models. Where what linears write is kept
    (quant/blocks/kept.py), the quantized model's are met once in --true-sequential and the original's once always."""
    by_name = {group[0][0]: group for group in kind.groups}
    if run.true_sequential:
        sizes = [
            sum(
                out * n_in * (kind.share if kind.is_routed(by_name[name]) else 1)
                for name in names
                for _, out, n_in in by_name[name]
            )
            for names in _steps(run, kind)
        ]
        whole = kind.active * (1 + sum(sum(sizes[:i]) / sum(sizes) for i in range(len(sizes))))
    else:
        whole = kind.active * 2
    if not _fits(kind, tokens, itemsize, beside, device):
        return beside * whole
    return (kind.active if run.true_sequential else whole) + (beside - 1) * kind.active


def _inner_flops(kind: Kind, tokens: int) -> float:
    """flops of computing once more what the experts' last linears read."""
    readers = [group for group in kind.routed if len(group) > 1]
    return 2.0 * sum(out * n_in for group in readers for _, out, n_in in group) * kind.share * tokens


def _products(run: RunConfig, kind: Kind, tokens: int, beside: int) -> float:
    """flops of the sums for Gram matrices and products with the original's inputs, of one block."""

    def of_token(n_in: int) -> float:
        return gram_flops(n_in) + 2 * (beside - 1) * n_in**2

    plain = sum((1 + run.saliency * len(group)) * of_token(group[0][2]) for group in kind.ordinary)
    routed = sum(kind.share * of_token(group[0][2]) for group in kind.routed)
    everyone = of_token(kind.routed[0][0][2]) if kind.routed else 0.0
    return tokens * (plain + routed + everyone)


def measuring_cost(run: RunConfig, kind: Kind, seqlen: int, beside: int, rates: Rates) -> float:
    """Seconds of one block's errors: three energies for a linear, in the metric of calibration and at held-out tokens, and what is
    read and written for them."""
    seconds = 0.0
    for group in kind.groups:
        tokens = min(HELDOUT_TOKENS, HELDOUT * seqlen * (kind.share if kind.is_routed(group) else 1))
        for _, out, n_in in group:
            seconds += measuring_seconds(out, n_in, tokens, beside, rates)
    return seconds if run.quantizes else 0.0


def measuring_seconds(n_out: int, n_in: int, tokens: float, beside: int, rates: Rates) -> float:
    """Of one linear, with so many tokens held out."""
    flops = 3 * (1 + 1 / PARTS) * n_in + 2 * (1 + 2 * beside) * tokens
    return n_out * n_in * (flops / rates.float32 + 4 * OF_WEIGHTS / rates.copied)


def uses_cross(run: RunConfig) -> bool:
    """Whether the solver itself asks for the original's inputs."""
    return run.wbits != FULL_BITS and declaration_of(run.solver).uses_cross


def gram_flops(n_in: int) -> float:
    """Of a token: blocks on and below the diagonal."""
    blocks = -(-n_in // BLOCK)
    return n_in**2 * (1 + 1 / blocks)
