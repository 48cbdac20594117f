"""What `--dry-run` told, beside what the run then took: seconds stage by stage, and peak memory.

    python -m benchmarks.planned --models SMOLLM2 --more "--quantization-method gptq" "--preset balanced"
    python -m benchmarks.planned --configs benchmarks/configs/llama-3-8b benchmarks/configs/qwen3-30b-a3b --blocks 1

Every row is one run of model_quantizer.py in a process of its own, planned in a fresh process just before it, on the same
threads. --configs makes checkpoints of random weights in bfloat16 with the shapes of a configuration and so many blocks, and
the tokenizer of the demo LLaMA: routers then spread tokens evenly. The peak is that of the process, on a CPU with the
libraries and the pages of the checkpoint that were read; limits of memory are held against it. A ratio is what was measured
over what was told.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.end_to_end import write_random
from benchmarks.measuring import about, flags, machine_line, report
from model_quantizer import request_from
from models.load import load_config
from quant.core import env
from quant.run.plan import estimate, with_process
from quant.run.rates import machine_rates, solver_cost
from quant.run.shapes import shapes_of

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "models" / "demo" / "llama"
STAGES = {
    "calibrate": ("forward", "gram"),
    "solve": ("solve",),
    "measure": ("measure",),
    "tune": ("tune", "learn"),
    "evaluate": ("evaluate",),
}


def main() -> None:
    """Plan, run, compare."""
    parser = flags(__doc__, "cpu")
    parser.add_argument("--models", nargs="*", default=[], help="checkpoints")
    parser.add_argument("--configs", nargs="*", type=Path, default=[], help="directories with a config.json")
    parser.add_argument("--blocks", type=int, default=1, help="blocks of a checkpoint that --configs makes")
    parser.add_argument("--more", nargs="+", default=["--quantization-method gptq", "--quantization-method quantease"])
    parser.add_argument("--data", default="--dataset demo --eval-datasets demo --nsamples 8 --seqlen 512 --limit 8")
    parser.add_argument("--grid", default="--wbits 4 --group-size 64")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plan:
        args.plan.write_text(json.dumps(planned(args.data.split(), args.models[0])))
        return
    head = ["# What the dry run told, and what came", "", about(__doc__), ""]
    head += [f"{machine_line(env.describe(env.pick_device(args.device)), env.versions())}.", ""]
    report(head, records(args), args.out)


def records(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A row for every model and line of flags."""
    with tempfile.TemporaryDirectory() as name:
        for model in [*map(Path, args.models), *args.configs]:
            place = model
            if model in args.configs:
                place = random_model(model, Path(name) / model.name, args.blocks)
            for more in args.more:
                words = [*args.data.split(), *args.grid.split(), *more.split(), "--device", args.device]
                yield {"model": model.name, "flags": more} | compare(place, words, Path(name))
            if model in args.configs:
                shutil.rmtree(place)


def random_model(config_at: Path, place: Path, blocks: int) -> Path:
    """A checkpoint of random weights with the first blocks of a configuration."""
    place.mkdir()
    config, _ = load_config(str(config_at), place, with_weights=False)
    config.num_hidden_layers = blocks
    write_random(config, place, torch.bfloat16)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / file, place)
    return place


def planned(words: list[str], model: str) -> dict[str, float]:
    """The estimate of a command line, in a process that has opened nothing yet."""
    request = request_from(["--model", model, *words])
    session = request.session
    device = env.pick_device(session.device)
    config, _ = load_config(session.model, session.cache_dir, with_weights=False)
    dtype = env.pick_dtype(session.dtype, device) or config.dtype
    shapes = shapes_of(config)
    rates = machine_rates(device, dtype)
    plan = estimate(request, shapes, dtype.itemsize, rates, solver_cost(device, request.run, rates))
    return with_process(plan, shapes, config.dtype.itemsize, env.resident_bytes())


def compare(model: Path, words: list[str], place: Path) -> dict[str, str]:
    """Plan and results of one command line."""
    file, run = place / "plan.json", place / "run"
    command = [sys.executable, "-m", "benchmarks.planned", "--models", str(model), "--plan", str(file)]
    subprocess.run([*command, f"--data={' '.join(words)}"], check=True, cwd=ROOT)
    told = json.loads(file.read_text())
    command = [sys.executable, "model_quantizer.py", "--model", str(model), *words, "--run-dir", str(run)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    results = json.loads((run / "results.json").read_text())
    shutil.rmtree(run)
    return cells(told, results)


def cells(told: dict[str, float], results: dict[str, Any]) -> dict[str, str]:
    """Told → measured (ratio) by stage, and of memory."""
    row = {}
    total = 0.0
    for stage, parts in STAGES.items():
        plan = sum(told.get(f"seconds: {part}", 0.0) for part in parts)
        came = sum(results["seconds"].get(part, 0.0) for part in parts)
        total += came
        row[f"{stage}, s"] = pair(plan, came) if plan or came else ""
    row["all, s"] = pair(told["seconds: total"], total)
    row["peak, GB"] = pair(told["host bytes: process"] / 1e9, results["peak_bytes"]["host"] / 1e9, 2)
    return row


def pair(told: float, came: float, digits: int = 0) -> str:
    """Both numbers and their ratio."""
    return f"{told:.{digits}f} → {came:.{digits}f} ({came / max(told, 1e-9):.2f})"


if __name__ == "__main__":
    main()
