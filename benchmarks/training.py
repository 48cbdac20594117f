"""One training step of a block against three plain forward passes of it, peak memory, and a whole model extrapolated.

    python -m benchmarks.training                                               # a LLaMA-shaped block for a laptop
    python -m benchmarks.training --config benchmarks/configs/llama-2-7b --seqlen 2048 --device cuda --dtype bfloat16

Weights are random, which changes no time. A forward pass and its backward pass are three forward passes of work; what
a step takes beyond that is transforms, rounding, the optimizer, and a teacher's pass where attention is in the loss.
Losses are those of the methods' recipes. Eager attention is main.py's default.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.end_to_end import random_stream, write_random
from benchmarks.measuring import about, best_seconds, flags, machine_line, peak_of, report, show
from models.load import load_config
from quant.blocks.fake_quant import ActSpec
from quant.blocks.instrument import instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import env
from quant.core.types import QuantSpec
from quant.learn import recipes
from quant.learn.config import Learning, TransformSpec
from quant.learn.learner import Learner
from quant.learn.loop import optimizer_for, train_epoch
from quant.learn.losses import BlockLoss
from quant.learn.parametrization import InputRange

VARIANTS = {
    "omniquant W3A16, lwc": ("omniquant", 3, 16, {"let": False}),
    "omniquant W4A4, lwc and let": ("omniquant", 4, 4, {"let": True}),
    "affinequant W4A4, matrices of heads": ("affinequant", 4, 4, {"let": True, "matrix": True}),
    "affinequant W3A16, matrices behind norms": ("affinequant", 3, 16, {"let": True, "norm_matrix": True}),
    "abq W4A4": ("abq", 4, 4, {"let": True}),
}
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8,
         "num_hidden_layers": 1, "vocab_size": 1000}  # fmt: skip


def main() -> None:
    """Write the block, time forward passes and steps, print the rows."""
    parser = flags(__doc__)
    parser.add_argument("--config", help="directory with a config.json (default: 512 wide, LLaMA-shaped)")
    parser.add_argument("--nsamples", type=int, default=8, help="windows timed; 128 are extrapolated")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=20, help="extrapolated")
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa"], choices=("eager", "sdpa"))
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    device = env.pick_device(args.device)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config, _ = load_config(args.config or "benchmarks/configs/llama-2-7b", directory, with_weights=False)
        whole = config.num_hidden_layers
        config.update({"num_hidden_layers": 1} if args.config else SMALL)
        write_random(config, directory, torch.float16)
        shape = f"{config.hidden_size} x {config.intermediate_size}, {args.seqlen} tokens, {args.dtype}"
        block = f"block {shape}; {machine_line(env.describe(device), env.versions())}"
        show(block, "")
        head = ["# Training steps of one block", "", about(__doc__), "", block, ""]
        report(head, records_of(directory, args, whole), args.out)


def records_of(directory: Path, args: argparse.Namespace, whole: int) -> Iterator[dict[str, str]]:
    """Every variant with every kind of attention."""
    for attention in args.attention:
        stream = random_stream(directory, args, 1, "device", attention)
        weights = BlockWeights.read(stream.model, 0, stream.device)
        for label in VARIANTS:
            yield {"method": label, "attention": attention} | measure(label, args, stream, weights, whole)


def measure(
    label: str, args: argparse.Namespace, stream: BlockStream, weights: BlockWeights, whole: int
) -> dict[str, str]:
    """One variant's figures. Its peak is its own: of the process since the row began."""
    method, wbits, abits, transform = VARIANTS[label]
    asked = Learning(transform=TransformSpec(**transform), clip=True, epochs=1)
    learning = recipes()[method](asked, wbits, abits)
    model, device = stream.model, stream.device
    ranges = {n: InputRange(torch.ones(w), torch.zeros(w)) for n, (_, w) in model.linear_shapes().items()}
    gc.collect()
    env.reset_peak(device)
    learner = Learner(model, 0, weights, QuantSpec(wbits), ActSpec(abits, abits), learning, ranges)
    targets = [stream.fork().hidden for _ in range(1 + learning.augmented)]
    loss = BlockLoss(learner, weights, targets, stream if learning.attention else None)

    @torch.no_grad()
    def forward() -> None:
        with instrument(model.blocks[0], weights) as own:
            for rows, arguments in zip(stream.rows, stream.arguments, strict=True):
                stream.call(0, own, rows, arguments)

    optimizer = optimizer_for(learner, 1.0)
    plain = best_seconds(forward, device, 2, warm_up=True) / args.nsamples
    epoch = partial(train_epoch, learner, loss, stream, optimizer, 1.0)
    step = best_seconds(epoch, device, 2, warm_up=True) / args.nsamples
    hours = whole * args.epochs * 128 * (step + plain) / 3600  # the loss at the end of an epoch is a forward pass
    figures = {"forward ms": plain * 1e3, "step ms": step * 1e3, "step / 3 forward": step / (3 * plain),
               "products / 3 forward": flops_of(epoch) / (3 * flops_of(forward)),
               "peak GB": peak_of(device) / 1e9, "all blocks, hours": hours}  # fmt: skip
    return {name: f"{figure:.{1 if name.endswith('ms') else 2}f}" for name, figure in figures.items()}


def flops_of(work: Callable[[], object]) -> int:
    """Floating-point operations of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    total: int = counter.get_total_flops()
    return total


if __name__ == "__main__":
    main()
