"""Our checkpoints in other people's software: perplexity and logits against our own evaluation, on the demo families.

python -m benchmarks.loaders --peer .venv-peers/bin/python [--out benchmarks/results/loaders.md]

Every checkpoint is made by one run (RTN, so that the table takes minutes), converted, read by our evaluator, and loaded
by transformers or gptqmodel in an environment of its own (requirements-pack.txt).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from data.demo import text
from quant.core.actquant import ActSpec
from quant.core.run import RunConfig, Session
from quant.export.convert import convert

ROOT = Path(__file__).parents[1]
FAMILIES = ("llama", "opt", "bloom", "falcon", "mistral")
SEQLEN, WINDOWS = 256, 32
TOLERANCE = 1e-3  # of the perplexity


@dataclass(frozen=True)
class Case:
    """One checkpoint and who loads it."""

    bits: int
    symmetric: bool
    format: str
    how: str
    group: int = 32
    act: int = 16


CASES = (
    Case(4, True, "gptq", "transformers"),
    Case(3, True, "gptq", "transformers"),
    Case(4, True, "gptq", "gptqmodel"),
    Case(3, True, "gptq", "gptqmodel"),
    Case(3, False, "gptq_v2", "gptqmodel"),
    Case(4, True, "compressed-tensors", "transformers"),
    Case(3, True, "compressed-tensors", "transformers"),
    Case(4, False, "compressed-tensors", "dequantize"),
    Case(3, False, "compressed-tensors", "dequantize"),
    Case(8, True, "compressed-tensors", "transformers", -1, 8),
)

EVERY_FAMILY = (CASES[0], CASES[1], CASES[8])  # the others of CASES on the first family only


def request(model: str | Path, run_dir: Path, case: Case | None) -> RunConfig:
    """A run of one case, or the evaluation of a checkpoint."""
    config = RunConfig(
        model=str(model), dataset="demo", nsamples=4, seqlen=SEQLEN, method="rtn", eval_datasets=("demo",),
        limit=WINDOWS, run_dir=run_dir, full_precision_eval=case is None,
    )  # fmt: skip
    if case is None:
        return config
    act = ActSpec(case.act, symmetric=case.act < 16)
    return replace(config, wbits=case.bits, group_size=case.group, symmetric=case.symmetric, act=act)


def checked(peer: str, family: str, case: Case, base: Path) -> dict[str, object]:
    """One row of the table."""
    name = f"{family}-{case.bits}-{case.symmetric}-{case.act}"
    if not (base / name).exists():
        Session(config := request(ROOT / "models/demo" / family, base / name, case)).run(config)
    checkpoint = base / f"{name}-{case.format}"
    if not checkpoint.exists():
        convert(base / name, case.format, checkpoint)
    session = Session(request(checkpoint, base / f"{name}-{case.format}-{case.how}-eval", None))
    ours = session.run(session.config)["perplexity"]["demo"]["fp"]
    ids = session.evaluation["demo"].ids
    save_file({"ids": ids}, base / "tokens.safetensors")
    out = base / "answer.safetensors"
    out.unlink(missing_ok=True)
    command = [
        peer,
        str(ROOT / "benchmarks/peer.py"),
        "load",
        case.how,
        str(checkpoint),
        str(base / "tokens.safetensors"),
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base, timeout=900)
    row: dict[str, object] = {"family": family, "case": case, "ours": ours}
    if done.returncode != 0 or not out.exists():
        return row | {"error": ([line for line in done.stderr.splitlines() if line.strip()] or ["no answer"])[-1][:160]}
    answer = load_file(out)
    logits = reference_logits(session, ids[:8])
    theirs = float(answer["losses"].mean().exp())
    distance = float((answer["logits"] - logits).norm() / logits.norm())
    return row | {"theirs": theirs, "logits": distance, "ok": abs(theirs / ours - 1) < TOLERANCE}


def reference_logits(session: Session, ids: torch.Tensor) -> torch.Tensor:
    """Our logits of some windows, in float32."""
    from quant.core.stream import BlockStream

    device = torch.device("cpu")
    outside = session.model.outside_weights(device)
    stream = BlockStream(session.model, ids, device=device, batch=4).capture(outside)
    for index in range(len(session.model.blocks)):
        stream.run(index, session.model.block_weights(index, device), advance=True, act=session.act)
    with torch.inference_mode():
        return stream.logits(slice(0, len(ids)), outside).float()


def other_way(peer: str, base: Path) -> dict[str, object]:
    """A checkpoint that gptqmodel made, by gptqmodel and by our evaluator."""
    file = base / "calibration.txt"
    file.write_text(text("train", 200))
    made = base / "made"
    command = [peer, str(ROOT / "benchmarks/peer.py"), "make", str(ROOT / "models/demo/llama"), str(file), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base, timeout=900)
    if done.returncode != 0:
        return {"error": done.stderr.splitlines()[-1][:160]}
    session = Session(request(made, base / "made-eval", None))
    ours = session.run(session.config)["perplexity"]["demo"]["fp"]
    save_file({"ids": session.evaluation["demo"].ids}, base / "tokens.safetensors")
    out = base / "made.safetensors"
    command = [
        peer,
        str(ROOT / "benchmarks/peer.py"),
        "load",
        "gptqmodel",
        str(made),
        str(base / "tokens.safetensors"),
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=base, timeout=900)
    theirs = float(load_file(out)["losses"].mean().exp())
    return {"ours": ours, "theirs": theirs, "ok": abs(theirs / ours - 1) < TOLERANCE}


def write_table(path: Path, lines: list[str]) -> None:
    """The table as far as it is measured."""
    path.write_text("# Our checkpoints in other people's software\n\n" + "\n".join(lines) + "\n")


def main() -> None:
    """All cases, one table; exit code 1 if a checkpoint that should load did not, or measured otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=".venv-peers/bin/python", help="Python of the environment of the others")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    peer = str(Path(args.peer).absolute())
    packages = ("torch", "transformers", "gptqmodel", "optimum", "compressed-tensors")
    code = f"from importlib.metadata import version as v; print(', '.join(f'{{p}} {{v(p)}}' for p in {packages}))"
    versions = subprocess.run([peer, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    lines = [f"Loaded by {versions}, on a CPU. Perplexity of {WINDOWS} windows of {SEQLEN} tokens of the demo text; logits: relative",
             "distance to ours in float32 (their kernels compute in the checkpoint's float16).", "",
             "| family | bits | grid | format | loaded by | ours | theirs | logits | |", "|-|-|-|-|-|-|-|-|-|"]  # fmt: skip
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        for family in args.families.split(","):
            for case in CASES if family == FAMILIES[0] else EVERY_FAMILY:
                row = checked(peer, family, case, Path(directory))
                grid = f"{'sym' if case.symmetric else 'asym'} g{case.group}" + (
                    f" A{case.act}" if case.act < 16 else ""
                )
                said = row.get("error") or ("same" if row["ok"] else "DIFFERENT")
                failed += said != "same"
                numbers = (
                    f"{row['ours']:.4f} | {row.get('theirs', float('nan')):.4f} | {row.get('logits', float('nan')):.1e}"
                )
                lines.append(f"| {family} | {case.bits} | {grid} | {case.format} | {case.how} | {numbers} | {said} |")
                print(lines[-1], flush=True)
                if args.out:
                    write_table(args.out, lines)
        made = other_way(peer, Path(directory))
    lines += ["", f"A checkpoint made by gptqmodel (llama, 4 bits, g32): {made}"]
    print(lines[-1])
    if args.out:
        write_table(args.out, lines)
    sys.exit(1 if failed or not made.get("ok") else 0)


if __name__ == "__main__":
    main()
