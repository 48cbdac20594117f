"""Perplexity by named protocol and fidelity to full precision, block-streamed: it fits where quantization fits.

All variants of a model (full precision, and quantized ones) pass through the blocks side by side, so that every
block is read once. Perplexity is that of the originals: windows of seqlen tokens without overlap, the mean cross
entropy of each window over its seqlen - 1 predictions, exp of the mean over windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.calibration import Tokens
from models.load import LazyModel
from quant.blocks.outside import OutsideWeights
from quant.blocks.stream import BlockStream, own_windows
from quant.core import ranks
from quant.evaluate.bootstrap import paired_interval
from quant.evaluate.passes import (
    FULL,
    HEAD_ELEMENTS,
    UNCHANGED,
    Variant,
    captured,
    outside_of,
    pass_blocks,
    tokens_at_a_time,
)


@dataclass(frozen=True)
class Scores:
    """Per window of one variant on one corpus, float64 [n]: mean cross entropy; KL divergence to full precision
    (nats) and share of positions with the same most likely token, where full precision was run."""

    nll: Tensor
    kl: Tensor | None = None
    top1: Tensor | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean cross entropy over windows."""
        return float(self.nll.mean().exp())


def evaluate(
    model: LazyModel,
    corpora: Mapping[str, Tokens],
    variants: Mapping[str, Variant],
    *,
    device: torch.device,
    batch: int,
    store: str = "cpu",
    directory: Path = Path(),
    full: Variant | None = UNCHANGED,
    full_streams: dict[str, BlockStream] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Scores]]:
    """Scores by corpus and variant; full precision, where it is asked for, is the variant ``fp`` (of a quantized
    checkpoint: itself). Several processes pass a part of the windows each, and have the scores of all.

    full_streams: full precision behind the last block by corpus, of an earlier call; filled if empty, else full precision
    does not pass the blocks again.
    """
    kept: dict[str, BlockStream] = {} if full_streams is None else full_streams
    everything = ({FULL: full} if full is not None and not kept else {}) | dict(variants)
    outside = model.outside_weights(device)
    streams: dict[str, dict[str, BlockStream]] = {}
    for name, tokens in corpora.items():
        settings = {"device": device, "batch": batch, "store": store, "directory": directory}
        ids = tokens.ids[own_windows(len(tokens.ids), batch)]
        streams[name] = captured(model, ids, everything, outside, **settings)
    del outside  # embeddings and head leave the device while blocks pass
    pass_blocks(model, everything, streams.values(), device, progress)
    if FULL in everything:
        kept |= {name: by_variant[FULL] for name, by_variant in streams.items()}
    elif full is not None:
        streams = {name: {FULL: kept[name]} | by_variant for name, by_variant in streams.items()}
    everything = ({FULL: full} if full is not None else {}) | dict(variants)
    forms = outside_of(everything, model.outside_weights(device))
    return {name: _of_all(_scores(by_variant, forms)) for name, by_variant in streams.items()}


def _of_all(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    """Scores of the windows of all processes, in their order."""

    def of_all(column: Tensor | None) -> Tensor | None:
        return None if column is None else ranks.all_rows(column)

    return {
        variant: Scores(ranks.all_rows(own.nll), of_all(own.kl), of_all(own.top1)) for variant, own in scores.items()
    }


@torch.inference_mode()
def _scores(streams: Mapping[str, BlockStream], outside: Mapping[str, OutsideWeights]) -> dict[str, Scores]:
    """Head and losses of every variant, a few windows at a time, or a few tokens of one window where the logits of all of
    them would be too many."""
    collected: dict[str, list[tuple[Tensor, ...]]] = {variant: [] for variant in streams}
    first = next(iter(streams.values()))
    (n, length), vocabulary = first.tokens.shape, first.model.config.vocab_size
    step, together = max(1, HEAD_ELEMENTS // (length * vocabulary)), length
    if length * vocabulary > HEAD_ELEMENTS:
        together = tokens_at_a_time(vocabulary)
    for rows in (slice(i, min(i + step, n)) for i in range(0, n, step)):
        pieces: dict[str, list[tuple[Tensor, ...]]] = {variant: [] for variant in streams}
        for start in range(0, length - 1, together):
            for variant, losses in _losses(streams, outside, rows, slice(start, min(start + together, length))).items():
                pieces[variant].append(losses)
        for variant, losses_of_parts in pieces.items():
            whole = [torch.cat(parts, -1) for parts in zip(*losses_of_parts, strict=True)]
            collected[variant].append(tuple(part.double().mean(-1) for part in whole))
    if not n:  # fewer windows than processes
        nothing = torch.empty(0, dtype=torch.float64)
        return {v: Scores(*[nothing] * (1 if v == FULL or FULL not in streams else 3)) for v in streams}
    return {
        v: Scores(*(torch.cat(column).cpu() for column in zip(*rows, strict=True))) for v, rows in collected.items()
    }


def _losses(
    streams: Mapping[str, BlockStream], outside: Mapping[str, OutsideWeights], rows: slice, positions: slice
) -> dict[str, tuple[Tensor, ...]]:
    """Of every variant at some positions [b, t] of some windows: the cross entropy of what follows, and where full precision
    is there the divergence from it and whether both have the same most likely token. Nothing follows a window's last token."""
    losses: dict[str, tuple[Tensor, ...]] = {}
    reference: Tensor | None = None
    for variant, stream in streams.items():
        targets = stream.tokens[rows, positions.start + 1 : positions.stop + 1].to(stream.device)
        with outside[variant].mounted(stream.model.module) as own:
            logits = stream.logits(rows, own, positions)[:, : targets.shape[1]]
        log_p = torch.log_softmax(logits, dim=-1)
        parts = [-log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)]
        if variant == FULL:
            reference = log_p
        elif reference is not None:
            parts.append((reference - log_p).mul_(reference.exp()).sum(-1))
            parts.append((reference.argmax(-1) == log_p.argmax(-1)).float())
        losses[variant] = tuple(parts)
    return losses


def ratio_interval(nll: Tensor, nll_fp: Tensor) -> list[float]:
    """95% interval of the perplexity ratio: paired bootstrap over windows."""
    return [float(np.exp(bound)) for bound in paired_interval(nll.numpy(), nll_fp.numpy())]


def report(corpora: Mapping[str, Tokens], scores: Mapping[str, Mapping[str, Scores]], variant: str) -> dict[str, Any]:
    """The ``perplexity`` and ``fidelity`` entries of results.json for one variant (``fp`` for the base model)."""
    perplexity, fidelity = {}, {}
    for name, tokens in corpora.items():
        own, full = scores[name][variant], scores[name].get(FULL)
        perplexity[name] = {
            "protocol": tokens.protocol,
            "seqlen": tokens.ids.shape[1],
            "windows": tokens.ids.shape[0],
            "tokens": tokens.ids.numel(),
            "token_sha256": tokens.sha256,
            "fp": full.perplexity if full else None,
            "quantized": own.perplexity if variant != FULL else None,
            "ratio_ci95": ratio_interval(own.nll, full.nll) if full and variant != FULL else None,
        }
        if own.kl is not None and own.top1 is not None:
            fidelity[name] = {"kl_divergence": float(own.kl.mean()), "top1_agreement": float(own.top1.mean())}
    return {"perplexity": perplexity, "fidelity": fidelity}
