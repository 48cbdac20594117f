"""`--dry-run`: what a run would take, from the model's configuration and rates measured on this machine.

Memory (bytes)
  block       parameters of a block x bytes of the arithmetic's dtype
  statistics  4·in² for every Gram matrix alive: all groups of a block, or the largest with --true-sequential
  solver      of the largest linear: 4·(6·out·in + 3·in²): target, residual, work copy, codes and the matrices
  batch       --calib-batch x seqlen x (8·hidden + 3·widest linear) x bytes of the dtype
  device      block + statistics + the larger of solver and batch + embeddings and head while they are in use
  host        hidden states nsamples x seqlen x hidden (on the device or on disk instead, if asked for)
Time (seconds)
  calibrate   2·parameters of a block flops a token for each pass (one observes, one advances; with
              --true-sequential one partial pass a group), at the measured matrix-product rate of the dtype;
              Gram 2·in² flops a token and group at the float32 rate
  solve       the solver itself is timed on a 512 x 512 layer and scaled by out·in²
  evaluate    two passes (full precision and quantized) over EVAL_TOKENS a data set
The rates come from a fraction of a second of work; expect the estimate within a factor of two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from models import family_of
from models.load import build_meta, load_config
from quant.core import machine
from quant.core.registry import get_solver
from quant.core.run import DEFAULT_MAX_SEQLEN, RunConfig
from quant.core.stats import LayerStats
from quant.core.types import QuantSpec

EVAL_TOKENS = 300_000  # about WikiText-2's test split
SAMPLE = 512


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model: blocks, parameters of one block and outside, linears as groups of (name, out, in)."""

    n_blocks: int
    block: int
    outside: int
    hidden: int
    max_length: int
    groups: list[list[tuple[str, int, int]]]

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """All linears of a block."""
        return [linear for group in self.groups for linear in group]


def shapes_of(config: Any, trust_remote_code: bool = False) -> Shapes:
    """Sizes from a configuration alone; no weights are needed."""
    family = family_of(config.model_type)
    module = build_meta(config, torch.float32, trust_remote_code)
    blocks = module.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    found = dict(blocks[0].named_modules())
    groups = [
        [(name, found[name].out_features, found[name].in_features) for name in group]  # type: ignore[misc]
        for group in family.groups(config)
    ]
    per_block = sum(p.numel() for p in blocks[0].parameters())
    outside = sum(p.numel() for p in module.parameters()) - per_block * len(blocks)
    longest = int(getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_SEQLEN)
    return Shapes(len(blocks), per_block, outside, config.hidden_size, longest, groups)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rates:
    """Measured on this machine: flop/s of matrix products in the arithmetic's dtype and in float32; seconds that
    the solver takes for out·in² = SAMPLE³."""

    product: float
    product32: float
    solve: float


def measure(device: torch.device, dtype: torch.dtype, config: RunConfig) -> Rates:
    """Rates from short runs of the real operations."""
    size = 2048 if device.type == "cuda" else 1024
    flops = [
        2 * size**3 / _seconds(lambda a=a: a @ a, device)
        for a in (torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device))
    ]
    stats = LayerStats(SAMPLE, device)
    stats.update(torch.randn(2 * SAMPLE, SAMPLE, device=device))
    weight, spec = torch.randn(SAMPLE, SAMPLE, device=device), QuantSpec(config.wbits, -1, config.symmetric)
    solver = get_solver(config.method)
    return Rates(*flops, _seconds(lambda: solver(weight, stats, spec, **config.options), device, repeats=1))


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Best of a few runs, after one to warm up."""
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        result = work()
        if isinstance(result, Tensor):
            result.flatten()[0].item()  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def estimate(config: RunConfig, shapes: Shapes, itemsize: int, rates: Rates) -> dict[str, float]:
    """Bytes and seconds of a run; see the module's text for the formulas."""
    seqlen = config.seqlen or min(shapes.max_length, DEFAULT_MAX_SEQLEN)
    n_blocks, tokens = min(config.num_layers, shapes.n_blocks), config.nsamples * seqlen
    grams = [4 * group[0][2] ** 2 for group in shapes.groups]
    statistics = max(grams) if config.true_sequential else sum(grams)
    workspace = max(4 * (6 * out * n_in + 3 * n_in**2) for _, out, n_in in shapes.linears)
    widest = max(max(out, n_in) for _, out, n_in in shapes.linears)
    batch = config.calib_batch * seqlen * (8 * shapes.hidden + 3 * widest) * itemsize
    weights = sum(out * n_in for _, out, n_in in shapes.linears)
    spec = QuantSpec(config.wbits, config.group_size, config.symmetric)
    side = sum(out * spec.n_groups(n_in) * (16 + (0 if spec.symmetric else spec.bits)) for _, out, n_in in shapes.linears)

    before = [sum(out * n_in for g in shapes.groups[:i] for _, out, n_in in g) / weights for i in range(len(shapes.groups))]
    passes = 1 + (sum(before) if config.true_sequential else 1)
    forward = n_blocks * tokens * 2 * shapes.block * passes / rates.product
    gram = n_blocks * tokens * sum(2 * group[0][2] ** 2 for group in shapes.groups) / rates.product32
    solve = n_blocks * sum(out * n_in**2 for _, out, n_in in shapes.linears) / SAMPLE**3 * rates.solve
    variants = 2 if config.full_precision_eval else 1
    evaluated = EVAL_TOKENS * len(config.eval_datasets) * variants
    total_parameters = shapes.outside + shapes.block * shapes.n_blocks
    return {
        "device bytes: block": shapes.block * itemsize,
        "device bytes: statistics": statistics,
        "device bytes: solver": workspace,
        "device bytes: batch": batch,
        "device bytes: peak": max(
            shapes.block * itemsize + statistics + max(workspace, batch), shapes.outside * itemsize + batch
        ),
        "host bytes: hidden states": tokens * shapes.hidden * itemsize,
        "disk bytes: run directory": n_blocks * weights,
        "disk bytes: checkpoint": total_parameters * 2 if config.save else 0,
        "quantized bytes": n_blocks * (weights * spec.code_bits + side) / 8,
        "bits per weight": spec.code_bits + side / weights,
        "seconds: forward": forward,
        "seconds: gram": gram,
        "seconds: solve": solve,
        "seconds: evaluate": evaluated * 2 * total_parameters / rates.product,
        "seconds: total": forward + gram + solve + evaluated * 2 * total_parameters / rates.product,
    }


def show_plan(configs: Sequence[RunConfig], console: Console) -> None:
    """Print the estimates of every method side by side. Raises InputError for what a run would refuse."""
    first = configs[0]
    device = machine.pick_device(first.device)
    model_config, path = load_config(first.model, first.cache_dir, first.trust_remote_code, with_weights=False)
    dtype = machine.pick_dtype(first.dtype, device) or getattr(model_config, "dtype", None) or torch.float16
    shapes = shapes_of(model_config, first.trust_remote_code)
    plans = [estimate(c, shapes, dtype.itemsize, measure(device, dtype, c)) for c in configs if c.quantizes]
    parameters = (shapes.outside + shapes.block * shapes.n_blocks) / 1e9
    table = Table(
        title=f"{first.model}: {model_config.model_type}, {parameters:.2f}B parameters, {shapes.n_blocks} blocks, "
        f"{device} in {str(dtype).removeprefix('torch.')}; {first.nsamples} calibration windows; nothing is run",
        title_justify="left",
        header_style="bold",
    )
    table.add_column("estimate")
    for config in configs:
        table.add_column(f"{config.method} w{config.wbits}", justify="right")
    for key in plans[0] if plans else ():
        table.add_row(key.replace(" bytes", ""), *(_readable(key, plan[key]) for plan in plans))
    console.print(table)
    console.print(f"configuration: {path}; formulas: quant/core/plan.py", highlight=False, soft_wrap=True)


def _readable(key: str, value: float) -> str:
    if "bytes" in key:
        return f"{value / 1e9:.3f} GB"
    if key.startswith("seconds"):
        return f"{value:.1f} s" if value < 600 else f"{value / 60:.1f} min" if value < 36000 else f"{value / 3600:.1f} h"
    return f"{value:.3f}"
