"""Our checkpoints in other people's software: perplexity and logits against our own evaluation, on the demo families.

python -m benchmarks.loaders --peer .venv-peers/bin/python [--out benchmarks/results/loaders.md]

Every checkpoint is made by one run (RTN, so that the table takes minutes), converted, read by our evaluator, and loaded
by transformers or gptqmodel in an environment of its own (requirements-pack.txt). Where our rules say that transformers
does not take a checkpoint (quant/export/runtimes.py), gptqmodel reads it and the row says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measuring import about, report
from data.demo import text
from quant.blocks.fake_quant import ActSpec
from quant.export.runtimes import loadability
from quant.run.convert import convert
from quant.run.request import Request
from quant.run.session import open_session
from tests.helpers import DEMO, in_float32, reference_logits

PEER = Path(__file__).with_name("peer.py")
FAMILIES = ("llama", "opt", "bloom", "falcon", "mistral")
SEQLEN, WINDOWS = 256, 32
COMPARED = 8  # windows whose logits are compared
TOLERANCE = 1e-3  # of the perplexity
# Relative distance of the logits that a reader may have: transformers computes in float16, GPTQModel in bfloat16. With
# quantized activations the model is a copy in float32: in float16 the two sides round weights differently, and an input on
# the edge between two of its 256 levels turns that into a step (2e-2 in all, measured).
LOGITS = {"transformers": 5e-3, "dequantize": 5e-3, "gptqmodel": 2e-2}
LOGITS_A8 = 1e-2
BOUNDS = (
    f"Perplexity of {WINDOWS} windows of {SEQLEN} tokens of the demo text; logits: relative distance to ours in float32. same: "
    f"the perplexity within {TOLERANCE:.1%} and the logits within {', '.join(f'{how} {bound:g}' for how, bound in LOGITS.items())}, "
    f"{LOGITS_A8:g} with quantized activations (of a copy of the model in float32). transformers computes in the checkpoint's "
    "dtype, gptqmodel in bfloat16; dequantize: transformers with CompressedTensorsConfig(dequantize=True). transformers reads "
    "GPTQ through optimum, which replaces plain `nn.Linear` only and leaves Falcon's own linear class with random weights "
    "(hence `--target transformers --format gptq` refuses Falcon): gptqmodel reads those rows."
)
FIGURES = {"ours": ".4f", "theirs": ".4f", "logits": ".1e"}  # of a row, as they are written
REFUSED = "refused by our rules"
EXPECTED_REFUSED = {"opt": {"W8A8"}, "falcon": {"W8A8"}}  # by family: what transformers does not compute as it is


@dataclass(frozen=True)
class Case:
    """One checkpoint and who loads it. blocks: how many are quantized, from the first on."""

    bits: int
    symmetric: bool
    format: str
    how: str
    group: int = 32
    act: ActSpec = ActSpec()
    blocks: int = 1000

    @property
    def grid(self) -> str:
        """What the table says of it."""
        words = f"{'sym' if self.symmetric else 'asym'} g{self.group}"
        if self.act.active:
            words += f" A{self.act.bits} {'sym' if self.act.symmetric else 'asym'}"
        return words + (f", {self.blocks} blocks" if self.blocks < 1000 else "")

    @property
    def kind(self) -> str:
        """Weights and activations: what of a case decides whether a family is refused."""
        return f"W{self.bits}" + (f"A{self.act.bits}" if self.act.active else "")

    @property
    def name(self) -> str:
        """Of its run's directory: cases of one run differ in the format or the reader."""
        return f"w{self.bits}-{self.grid}".replace(" ", "-").replace(",", "")

    @property
    def bound(self) -> float:
        """Of the logits' distance."""
        return LOGITS_A8 if self.act.active else LOGITS[self.how]


EVERY_FAMILY = (
    Case(4, True, "gptq", "transformers"),
    Case(3, True, "gptq", "transformers"),
    Case(4, True, "compressed-tensors", "transformers"),
    Case(4, False, "compressed-tensors", "transformers"),
    Case(3, True, "compressed-tensors", "transformers"),
    Case(3, False, "compressed-tensors", "transformers"),
    Case(8, True, "compressed-tensors", "transformers", -1, ActSpec(8, symmetric=True)),
    Case(8, True, "compressed-tensors", "transformers", -1, ActSpec(8)),
)
FIRST_FAMILY = (
    Case(4, True, "gptq", "gptqmodel"),
    Case(3, True, "gptq", "gptqmodel"),
    Case(4, False, "gptq_v2", "gptqmodel"),
    Case(3, False, "gptq_v2", "gptqmodel"),
    Case(4, False, "gptq_v2", "transformers"),
    Case(3, False, "gptq_v2", "transformers"),
    Case(2, True, "gptq", "transformers"),
    Case(8, True, "gptq", "transformers"),
    Case(2, True, "compressed-tensors", "transformers"),
    Case(8, True, "compressed-tensors", "transformers"),
    Case(4, True, "gptq", "transformers", blocks=2),
    Case(4, True, "gptq", "gptqmodel", blocks=2),
)


def request(model: str | Path, run_dir: Path, case: Case | None, windows: int = WINDOWS) -> Request:
    """A run of one case, or the evaluation of a checkpoint."""
    asked = Request.of(
        model=str(model), dataset="demo", nsamples=4, seqlen=SEQLEN, solver="rtn",
        eval_datasets=("demo",) if case is None else (), limit=windows, run_dir=run_dir,
    )  # fmt: skip
    if case is None:
        return asked
    return asked.but(wbits=case.bits, group_size=case.group, symmetric=case.symmetric, act=case.act,
                   num_layers=case.blocks)  # fmt: skip


def prepare(family: str, case: Case, base: Path) -> tuple[Case, Path]:
    """The checkpoint of a case, and the case with the reader that takes it."""
    run = base / f"{family}-{case.name}"
    if not (run / "results.json").exists():
        model = whole_model(family, base) if case.act.active else DEMO / family
        asked = request(model, run, case)
        open_session(asked).run(asked.run, asked.output)
    checkpoint = base / f"{family}-{case.name}-{case.format}"
    content = convert(run, case.format, checkpoint, overwrite=True)
    if case.how != "transformers":
        return case, checkpoint
    rows = {runtime: (takes, needs) for runtime, takes, needs, _ in loadability(case.format, content)}
    takes, needs = rows["transformers"]
    other = "gptqmodel" if case.format.startswith("gptq") else REFUSED
    how = other if not takes else "dequantize" if "dequantize" in needs else "transformers"
    return replace(case, how=how), checkpoint


def whole_model(family: str, base: Path) -> Path:
    """A demo model with its weights in float32, made once."""
    copy = base / f"{family}-float32"
    return copy if copy.exists() else in_float32(family, copy)


def ours(checkpoint: Path, base: Path) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Our perplexity and logits of a checkpoint, and the tokens."""
    asked = request(checkpoint, base / f"{checkpoint.name}-eval", None)
    session = open_session(asked)
    perplexity = session.run(asked.run, asked.output)["perplexity"]["demo"]["fp"]
    ids = session.evaluation["demo"].ids
    return perplexity, reference_logits(session, ids[:COMPARED]), ids


def ask(peer: str, jobs: Sequence[tuple[str, Path, Path]], ids: torch.Tensor, base: Path) -> str:
    """Have checkpoints loaded in one process, job by job: (reader, checkpoint, file for the answer). Returns what the
    process said last where it failed.
    """
    tokens, listed = base / "tokens.safetensors", base / "jobs.json"
    save_file({"ids": ids}, tokens)
    listed.write_text(json.dumps([[how, str(model), str(tokens), str(out)] for how, model, out in jobs]))
    command = [peer, str(PEER), "load", str(listed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base, timeout=3600)
    return ([line for line in done.stderr.splitlines() if line.strip()] or ["no answer"])[-1] if done.returncode else ""


def compare(answer: Path, perplexity: float, logits: torch.Tensor, bound: float, failure: str) -> dict[str, Any]:
    """What a reader computed beside what we computed."""
    if not answer.exists():
        return {"ours": perplexity, "said": (failure or "no answer")[:160]}
    computed = load_file(answer)
    theirs = float(computed["losses"].mean().exp())
    distance = float((computed["logits"] - logits).norm() / logits.norm())
    same = abs(theirs / perplexity - 1) < TOLERANCE and distance < bound
    return {"ours": perplexity, "theirs": theirs, "logits": distance, "said": "same" if same else "DIFFERENT"}


def of_family(peer: str, family: str, cases: Sequence[Case], base: Path) -> list[tuple[Case, dict[str, Any]]]:
    """Rows of the table. Readers of GPTQ and of compressed-tensors get a process each. What our rules refuse is a row too:
    ``refused`` where that is expected, else ``REFUSED``; and what should have been refused is ``NOT REFUSED``."""
    made = [prepare(family, case, base) for case in cases]
    asked = [(case, path) for case, path in made if case.how != REFUSED]
    expected = EXPECTED_REFUSED.get(family, set())
    answers = {path: ours(path, base) for path in dict.fromkeys(path for _, path in asked)}
    rows: list[tuple[Case, dict[str, Any]]] = []
    for group in ("gptq", "compressed-tensors"):
        jobs = [(case, path, base / f"{path.name}-{case.how}.safetensors") for case, path in asked
                if case.format.startswith(group)]  # fmt: skip
        if jobs:
            failure = ask(peer, [(case.how, path, out) for case, path, out in jobs], answers[jobs[0][1]][2], base)
            rows += [(case, compare(out, *answers[path][:2], case.bound, failure)) for case, path, out in jobs]
    for case, row in rows:
        if case.kind in expected:
            row["said"] = "NOT REFUSED"
    refused = [case for case, _ in made if case.how == REFUSED]
    return rows + [(case, {"said": "refused" if case.kind in expected else "REFUSED"}) for case in refused]


def other_way(peer: str, base: Path) -> dict[str, Any]:
    """A checkpoint that gptqmodel made, by gptqmodel and by our evaluator."""
    file, made, out = base / "calibration.txt", base / "made", base / "made.safetensors"
    file.write_text(text("train", 200))
    command = [peer, str(PEER), "make", str(DEMO / "llama"), str(file), str(made)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=base, timeout=900)
    if done.returncode != 0:
        return {"said": done.stderr.splitlines()[-1][:160]}
    perplexity, logits, ids = ours(made, base)
    failure = ask(peer, [("gptqmodel", made, out)], ids, base)
    return compare(out, perplexity, logits, LOGITS["gptqmodel"], failure)


def record(family: str, case: Case, row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table."""
    own = {"family": family, "bits": str(case.bits), "grid": case.grid, "format": case.format, "loaded by": case.how}
    return own | outcome(row)


def outcome(row: Mapping[str, Any]) -> dict[str, str]:
    """Perplexities, distance, verdict; of what was not loaded, the verdict."""
    figures = {name: f"{row[name]:{form}}" if name in row else "-" for name, form in FIGURES.items()}
    return figures | {"": row["said"]}


def main() -> None:
    """All cases, one table; exit code 1 if a checkpoint that should load did not, measured otherwise, or is refused by our
    rules where another set of them is expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default=".venv-peers/bin/python", help="Python of the environment of the others")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    peer = str(Path(args.peer).absolute())
    packages = ("torch", "transformers", "gptqmodel", "optimum", "compressed-tensors")
    code = f"from importlib.metadata import version as v; print(', '.join(f'{{p}} {{v(p)}}' for p in {packages}))"
    versions = subprocess.run([peer, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    said: list[str] = []

    def records(base: Path) -> Iterator[dict[str, str]]:
        for family in args.families.split(","):
            cases = (*EVERY_FAMILY, *FIRST_FAMILY) if family == FAMILIES[0] else EVERY_FAMILY
            for case, row in of_family(peer, family, cases, base):
                said.append(row["said"])
                yield record(family, case, row)

    with tempfile.TemporaryDirectory() as directory:
        lines = report(
            [
                "# Our checkpoints in other people's software",
                "",
                about(__doc__),
                "",
                f"Loaded by {versions}, on a CPU. {BOUNDS}",
                "",
            ],
            records(Path(directory)),
            args.out,
        )
        made = other_way(peer, Path(directory))
    said.append(made["said"])
    lines += ["", "A checkpoint that gptqmodel made (llama, 4 bits, g32), read by us and by gptqmodel:", ""]
    report(lines, [outcome(made)], args.out)
    sys.exit(any(word not in ("same", "refused") for word in said))


if __name__ == "__main__":
    main()
