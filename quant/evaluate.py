"""Perplexity by named protocol and fidelity to full precision, block-streamed: it fits where quantization fits.

All variants of a model (full precision, and quantized ones) pass through the blocks side by side, so that every
block is read once. Perplexity is that of the originals: windows of seqlen tokens without overlap, the mean cross
entropy of each window over its seqlen - 1 predictions, exp of the mean over windows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.calibration import Tokens
from models.load import LazyModel, Weights
from quant.core.actquant import ActSpec, Deployed
from quant.core.stream import BlockStream

FULL = "fp"
RESAMPLES = 2000
HEAD_ELEMENTS = 1 << 27  # logits computed at a time: half a gigabyte in float32
Deploy = Callable[[int, Weights], Deployed]  # block index, full-precision weights -> the variant's weights


@dataclass(frozen=True)
class Variant:
    """A form of the model: its blocks' weights, and how its activations are quantized.

    packed: its linears are packed in every block, and none of theirs is taken from the full-precision weights.
    """

    deploy: Deploy
    act: ActSpec | None = None
    packed: bool = False


UNCHANGED = Variant(lambda _, weights: weights)


def pass_blocks(
    model: LazyModel,
    variants: Mapping[str, Variant],
    streams: Collection[Mapping[str, BlockStream]],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Carry streams (each by variant) through all blocks, side by side. Linears are read only where a variant needs them."""
    n_blocks = len(model.blocks)
    linears = [f"{name}.weight" for name in model.linear_shapes()]
    without = linears if all(variant.packed for variant in variants.values()) else []
    for index in range(n_blocks):
        weights = model.block_weights(index, device, without=without)
        for name, variant in variants.items():
            own = variant.deploy(index, weights)
            for by_variant in streams:
                by_variant[name].run(index, own, advance=True, act=variant.act)
        progress(index + 1, n_blocks)


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
    checkpoint: itself).

    full_streams: full precision behind the last block by corpus, of an earlier call; filled if empty, else full precision
    does not pass the blocks again.
    """
    kept: dict[str, BlockStream] = {} if full_streams is None else full_streams
    everything = ({FULL: full} if full is not None and not kept else {}) | dict(variants)
    outside = model.outside_weights(device)
    streams: dict[str, dict[str, BlockStream]] = {}
    for name, tokens in corpora.items():
        first = BlockStream(model, tokens.ids, device=device, batch=batch, store=store, directory=directory)
        first.capture(outside)
        streams[name] = {v: first if i == 0 else first.fork() for i, v in enumerate(everything)}
    del outside  # embeddings and head leave the device while blocks pass
    pass_blocks(model, everything, streams.values(), device, progress)
    if FULL in everything:
        kept |= {name: by_variant[FULL] for name, by_variant in streams.items()}
    elif full is not None:
        streams = {name: {FULL: kept[name]} | by_variant for name, by_variant in streams.items()}
    outside = model.outside_weights(device)
    return {name: _scores(by_variant, outside) for name, by_variant in streams.items()}


@torch.inference_mode()
def _scores(streams: Mapping[str, BlockStream], outside: Weights) -> dict[str, Scores]:
    """Head and losses of every variant, a batch at a time."""
    collected: dict[str, list[tuple[Tensor, ...]]] = {variant: [] for variant in streams}
    first = next(iter(streams.values()))
    n, length = first.tokens.shape
    step = max(1, HEAD_ELEMENTS // (length * first.model.config.vocab_size))
    for rows in (slice(i, min(i + step, n)) for i in range(0, n, step)):
        reference: Tensor | None = None
        for variant, stream in streams.items():
            targets = stream.tokens[rows, 1:].to(stream.device)
            log_p = torch.log_softmax(stream.logits(rows, outside)[:, :-1], dim=-1)
            nll = -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            parts = [nll]
            if variant == FULL:
                reference = log_p
            elif reference is not None:
                parts.append((reference.exp() * (reference - log_p)).sum(-1))
                parts.append((reference.argmax(-1) == log_p.argmax(-1)).float())
            collected[variant].append(tuple(part.double().mean(-1).cpu() for part in parts))
    return {v: Scores(*(torch.cat(column) for column in zip(*rows, strict=True))) for v, rows in collected.items()}


def ratio_interval(nll: Tensor, nll_fp: Tensor, seed: int = 0) -> list[float]:
    """95% interval of the perplexity ratio: percentile bootstrap over windows, paired, RESAMPLES draws."""
    difference = (nll - nll_fp).numpy()
    draws = np.random.default_rng(seed).integers(0, len(difference), size=(RESAMPLES, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
    return [float(np.exp(low)), float(np.exp(high))]


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


def main() -> None:
    """Measure a checkpoint by the ruler of the runs: python -m quant.evaluate --model PATH."""
    import json
    import tempfile

    from data.calibration import KNOWN, check_source
    from quant.core import cli
    from quant.core.config import RunConfig, places_read
    from quant.core.errors import InputError
    from quant.core.files import check_owned, write_owned
    from quant.core.flags import DEFAULT_CACHE, add_data_flags, add_machine_flags
    from quant.core.places import Place, check_places
    from quant.core.run import Session

    parser: Any = cli.Parser(prog="python -m quant.evaluate", description=main.__doc__)
    parser.add_argument("--model", required=True, metavar="ID|DIR", help="hub id or directory, also one of --save")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the numbers as JSON")
    group = add_data_flags(parser, seed=0)
    group.add_argument("--real_quant", action="store_true", help="keep a quantized checkpoint packed in memory")
    group.add_argument("--limit", type=int, metavar="N", help="the first N windows and items only")
    add_machine_flags(parser, DEFAULT_CACHE)
    args = parser.parse_args()
    cli.set_logging("warning")
    corpora = tuple(d for d in args.eval_datasets.split(",") if d)
    found = [
        f"--{name.replace('_', '-')} {value}: use {least} or more"
        for name, least in (("limit", 1), ("seqlen", 2), ("calib_batch", 1))
        if (value := getattr(args, name)) is not None and value < least
    ]
    found += [
        f"--{name.replace('_', '-')} {path} is not a directory"
        for name in ("task_path", "data_dir")
        if (path := getattr(args, name)) is not None and not path.is_dir()
    ]
    if found:
        raise InputError(*found)
    for source in corpora:
        check_source(source, KNOWN)
    with tempfile.TemporaryDirectory() as directory:
        config = RunConfig(
            model=args.model,
            eval_datasets=corpora,
            seqlen=args.seqlen,
            limit=args.limit,
            tasks=tuple(t for t in args.tasks.split(",") if t),
            task_path=args.task_path,
            num_fewshot=args.num_fewshot,
            data_dir=args.data_dir,
            cache_dir=args.cache_dir,
            device=args.device,
            dtype=args.dtype,
            calib_batch=args.calib_batch,
            activation_store=args.activation_store,
            trust_remote_code=args.trust_remote_code,
            packed=args.real_quant,
            deterministic=args.deterministic,
            run_dir=Path(directory) / "run",
        )
        if args.out is not None:
            check_places(places_read(config), [Place("--out", args.out), Place("--cache-dir", args.cache_dir)])
            check_owned(args.out)
        console = cli.console()
        with cli.ProgressBars(console) as bars:
            results = Session(config).run(config, bars.for_method("base"))
    console.print(cli.results_table([results], args.model))
    if results["zero_shot"]:
        console.print(cli.tasks_table([results]))
    if args.out is not None:
        kept = ("perplexity", "zero_shot", "evaluation")
        numbers = {"model": args.model} | {key: results[key] for key in kept}
        write_owned(args.out.parent, {args.out.name: (json.dumps(numbers, indent=2) + "\n").encode()})


if __name__ == "__main__":
    import sys

    from quant.core.cli import guarded

    sys.exit(guarded(main))
