"""Seconds and peak memory of a whole quantization, calibration included, of a model with random weights.

    python -m benchmarks.end_to_end --config benchmarks/configs/llama-2-7b --device cuda --methods gptq quantease
    python -m benchmarks.end_to_end --config benchmarks/configs/falcon-180b --blocks 1 --device cuda   # extrapolated

Random weights and tokens take as long as trained ones, but for coordinate descent's sparse sweeps (which random
weights, if anything, make slower). The checkpoint is written to a temporary directory first; that is not timed,
reading it is. Once a run: opening the model, capturing what enters the first block, compiling the kernels. With --blocks
fewer than the model has, the seconds of all blocks are once + those of a block, its pass to the next one included, times
the number of blocks, and are said to be extrapolated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measuring import flags, peak_of, report, synchronize
from models import family_of
from models.load import build_meta, load_config, load_model
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core import env
from quant.core.gram import GramStats
from quant.core.types import QuantSpec
from quant.run.quantize import quantize_block
from quant.run.solving import Recipe
from quant.solvers import get_solver, solver_options

STAGES = ("read", "forward", "gram", "solve")


def write_random(config: Any, directory: Path, dtype: torch.dtype) -> None:
    """A checkpoint with the shapes of a configuration: one file a block, one for the rest, and the index."""
    module, prefix = build_meta(config, dtype), f"{family_of(config.model_type).blocks}."
    files: dict[str, list[tuple[str, torch.Size]]] = {}
    for name, parameter in module.named_parameters():
        file = f"block-{name.removeprefix(prefix).split('.')[0]}" if name.startswith(prefix) else "outside"
        files.setdefault(f"{file}.safetensors", []).append((name, parameter.shape))
    for file, entries in files.items():
        tensors = {name: torch.ones(shape, dtype=dtype) for name, shape in entries}
        for matrix in (tensor for tensor in tensors.values() if tensor.dim() > 1):
            matrix.normal_(0, 0.02)
        save_file(tensors, directory / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, entries in files.items() for name, _ in entries}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.dtype = dtype
    config.save_pretrained(directory)


def random_stream(
    directory: Path, args: argparse.Namespace, batch: int, store: str, attention: str | None = None
) -> BlockStream:
    """Random windows in front of the first block of the checkpoint."""
    device = env.pick_device(args.device)
    dtype = env.pick_dtype(args.dtype, device)
    model = load_model(str(directory), dtype=dtype, cache_dir=directory, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (args.nsamples, args.seqlen), generator=generator)
    stream = BlockStream(model, tokens, device=device, batch=batch, store=store, directory=directory)
    return stream.capture(model.outside_weights(device))


def quantize(directory: Path, method: str, args: argparse.Namespace, whole: int) -> dict[str, float]:
    """Seconds by stage of one method over every block of the checkpoint, of a model that has ``whole`` blocks."""
    device = env.pick_device(args.device)
    env.reset_peak(device)
    started = time.perf_counter()
    stream = random_stream(directory, args, args.calib_batch, args.activation_store)
    model = stream.model
    options = solver_options(get_solver(method)) | ({"num_iter": args.sweeps} if method == "quantease" else {})
    recipe = Recipe(method, get_solver(method), QuantSpec(args.wbits), options, args.true_sequential)
    compile_kernels(recipe, device)
    once = time.perf_counter() - started
    times = dict.fromkeys(("read", "solve"), 0.0)
    for index in range(len(model.blocks)):
        clock = time.perf_counter()
        weights = BlockWeights.read(model, index, device)
        times["read"] += time.perf_counter() - clock
        block = quantize_block(stream, index, weights, recipe)
        times["solve"] += block.seconds["solve"]
        if index + 1 < whole:  # also behind the last block that is done here: the whole model goes on
            stream.run(index, block.weights, advance=True)
    synchronize(device)
    peak = peak_of(device)
    spent = stream.clock.seconds
    times |= {"forward": spent["forward"], "gram": spent["observe"]}
    total = time.perf_counter() - started
    return times | {"once": once, "total": total, "peak": float(peak)}


def compile_kernels(recipe: Recipe, device: torch.device) -> None:
    """Solve a small layer, two blocks of columns wide."""
    stats = GramStats(256, device)
    stats.update(torch.randn(512, 256, device=device))
    assert recipe.spec is not None
    recipe.solver(torch.randn(64, 256, device=device), stats, recipe.spec, **recipe.options)


def all_blocks(times: Mapping[str, float], done: int, whole: int) -> float:
    """Seconds of the whole model: what happens once, and every block like those that were done."""
    return times["once"] + (times["total"] - times["once"]) * whole / done


def record(name: str, method: str, t: Mapping[str, float], done: int, whole: int) -> dict[str, str]:
    """One method's row."""
    seconds = {"seconds": t["total"], "of which once": t["once"], **{stage: t[stage] for stage in STAGES}}
    everything = f"{all_blocks(t, done, whole):.0f}" + (" (extrapolated)" if done < whole else "")
    return {"model": name, "blocks": f"{done} of {whole}", "method": method} | {k: f"{s:.1f}" for k, s in seconds.items()} | {
        "all blocks, seconds": everything, "peak GB": f"{t['peak'] / 1e9:.1f}"}  # fmt: skip


def main() -> None:
    """Write the model, run the methods, print the rows."""
    parser = flags(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="directory with a config.json")
    parser.add_argument("--methods", nargs="+", default=["gptq", "quantease"])
    parser.add_argument("--blocks", type=int, help="only that many blocks (default: all)")
    for name, default in {"wbits": 3, "sweeps": 30, "nsamples": 128, "seqlen": 2048, "calib-batch": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--true-sequential", action="store_true")
    parser.add_argument("--activation-store", default="device", choices=("device", "cpu", "disk"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--directory", type=Path, help="where the random checkpoint is written (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        config, _ = load_config(str(args.config), directory, with_weights=False)
        whole = config.num_hidden_layers
        done = config.num_hidden_layers = min(whole, args.blocks or whole)
        write_random(config, directory, torch.float16)
        times = ((method, quantize(directory, method, args, whole)) for method in args.methods)
        report([], (record(args.config.name, method, t, done, whole) for method, t in times), args.out)


if __name__ == "__main__":
    main()
