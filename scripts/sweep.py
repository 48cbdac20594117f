"""Run a table of quantizations: every row is a command, all rows of a model share its data and one evaluation.

A table is a .tsv with a header of flag names (and, if wanted, a column ``command``), or a .yaml with ``command``,
``fixed`` flags and a ``grid`` of lists whose product is taken; an entry of a list may be a set of flags by itself.
Finished rows are skipped, a row that fails does not stop the others, and the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the command lines are imported for their parsers

from quant.core.errors import InputError, RunError  # noqa: E402
from quant.core.journal import write_atomically, write_json  # noqa: E402
from quant.core.run import RunConfig, Session  # noqa: E402
from quant.report import open_run, write_report  # noqa: E402

EXAMPLES = """examples:
  python scripts/sweep.py scripts/sweeps/demo.yaml                       # 150 rows on the embedded models
  python scripts/sweep.py mine.tsv --out runs/sweeps/mine                # model<TAB>wbits<TAB>quantization-method<TAB>seed
  python scripts/sweep.py mine.yaml --executor ray --gpus 1              # one model after the other on each GPU of a cluster
  python scripts/sweep.py mine.yaml --executor slurm > array.sh          # prints a job array, one task a model

Exit codes: 0 all rows done, 1 some failed, 2 a malformed table.
"""
COMMANDS = ("model_quantizer.py", "main.py")
Row = dict[str, str]
DONE, FAILED, WAITING = "done", "failed", "waiting"


@dataclass
class Cell:
    """One row on its way. flags: as on the command line. config: what they mean. label: what tells it from others."""

    flags: Row
    config: RunConfig
    label: str
    status: str = WAITING
    message: str = ""
    results: dict[str, Any] = field(default_factory=dict)


def read_table(path: Path) -> list[Row]:
    """Rows of flags. Raises InputError with line and column where the table is malformed."""
    if not path.is_file():
        raise InputError(f"no such table: {path}")
    if path.suffix == ".tsv":
        return _read_tsv(path)
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path)
    raise InputError(f"{path}: a table is a .tsv or a .yaml file")


def _read_tsv(path: Path) -> list[Row]:
    with path.open(newline="") as stream:
        lines = [
            (n, cells) for n, cells in enumerate(csv.reader(stream, delimiter="\t"), 1)
            if cells and any(cells) and not cells[0].startswith("#")
        ]  # fmt: skip
    if len(lines) < 2:
        raise InputError(f"{path}: needs a header of flag names and at least one row")
    header = [name.strip().lstrip("-") for name in lines[0][1]]
    for column, name in enumerate(header, 1):
        if not name:
            raise InputError(f"{path}, line {lines[0][0]}, column {column}: a column without a name")
    rows = []
    for number, cells in lines[1:]:
        if len(cells) > len(header):
            raise InputError(f"{path}, line {number}, column {len(header) + 1}: more cells than the header has names")
        rows.append({name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()})
    return rows


def _read_yaml(path: Path) -> list[Row]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where}: {error.problem}") from error
    if not isinstance(content, dict) or not set(content) <= {"command", "fixed", "grid", "rows"}:
        raise InputError(f"{path}: expected the entries command, fixed, grid or rows")
    fixed = {"command": content.get("command", COMMANDS[0])} | content.get("fixed", {})
    grid = {name: v if isinstance(v, list) else [v] for name, v in content.get("grid", {}).items()}
    products = [_combined(grid, values) for values in itertools.product(*grid.values())] if grid else []
    listed = [*products, *content.get("rows", [])]
    return [{k: _text(v) for k, v in (fixed | row).items() if v is not False} for row in listed]


def _combined(grid: dict[str, list[Any]], values: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in zip(grid, values, strict=True):
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _text(value: Any) -> str:
    return "" if value is True else str(value)


def cells_of(rows: Sequence[Row], out: Path, table: Path) -> list[Cell]:
    """Rows as configurations, by the command lines' own parsers. Raises InputError naming the row."""
    import main as learned
    import model_quantizer

    found, seen = [], set()
    names = dict.fromkeys(name for row in rows for name in row)
    varying = [n for n in names if n != "seed" and (n == "model" or len({row.get(n) for row in rows}) > 1)]
    for number, row in enumerate(rows, 1):
        command = row.get("command", COMMANDS[0])
        if command not in COMMANDS:
            raise InputError(f"{table}, row {number}: command {command!r}; use {' or '.join(COMMANDS)}")
        words = [w for k, v in row.items() if k != "command" for w in ([f"--{k}", v] if v else [f"--{k}"])]
        module: Any = learned if command == "main.py" else model_quantizer
        try:
            config = module.config_from(words)
        except InputError as error:
            raise InputError(f"{table}, row {number}: {str(error).splitlines()[0]}") from error
        slug = "".join(c if c.isalnum() or c in "._" else "-" for c in "-".join([command, *row.values(), *row]))
        place = out / "rows" / f"{number:04d}-{slug[:80]}"
        key = json.dumps(row, sort_keys=True)
        if key in seen:
            raise InputError(f"{table}, row {number}: stands there twice")
        seen.add(key)
        label = " ".join(Path(row[n]).name if n == "model" else f"{n}={row[n]}" for n in varying if n in row)
        found.append(Cell(row, replace(config, run_dir=place), label))
    return found


def session_key(config: RunConfig) -> str:
    """What rows must share to be evaluated together: the model as opened, and what it is evaluated on."""
    shifts = config.learning is not None and config.learning.transform.shift
    parts = (config.model, config.seqlen, config.eval_datasets, config.limit, config.tasks, config.num_fewshot, config.dtype,
             config.device, config.attn_implementation, config.full_precision_eval, config.calib_batch, shifts)  # fmt: skip
    return repr(parts)


def run_group(cells: Sequence[Cell], together: int, moved: Callable[[Cell], None] = lambda cell: None) -> float:
    """Quantize every row, then evaluate those that worked, ``together`` at a time. Returns seconds of actual work.

    A row that fails says why in its message.
    """
    started = time.perf_counter()
    try:
        session = Session(cells[0].config)
    except (InputError, RunError, OSError) as error:
        for cell in cells:
            _fail(cell, error, moved)
        return time.perf_counter() - started
    for cell in cells:
        try:
            session.quantize(cell.config)
        except (InputError, RunError, OSError) as error:
            _fail(cell, error, moved)
    alive = [cell for cell in cells if cell.status != FAILED]
    for part in (alive[i : i + together] for i in range(0, len(alive), together)):
        try:
            finished = session.run_all([replace(cell.config, overwrite=False) for cell in part])
        except (InputError, RunError, OSError) as error:
            for cell in part:
                _fail(cell, error, moved)
            continue
        for cell, results in zip(part, finished, strict=True):
            cell.status, cell.results = DONE, results
            moved(cell)
    return time.perf_counter() - started


def _fail(cell: Cell, error: BaseException, moved: Callable[[Cell], None]) -> None:
    cell.status, cell.message = FAILED, str(error).splitlines()[0]
    moved(cell)


def figures(cell: Cell) -> dict[str, float]:
    """The numbers of a finished row: bits, perplexity ratio by corpus, KL divergence, relative error, accuracies."""
    r = cell.results
    found = {"bits": r["bits_per_weight"]}
    for name, scores in r["perplexity"].items():
        found[f"ppl {name}"] = scores["quantized"] if scores["quantized"] is not None else scores["fp"]
    found |= {f"KL {name}": f["kl_divergence"] for name, f in r["fidelity"].items()}
    found |= {name: t["quantized"] for name, t in r["zero_shot"].items() if t["quantized"] is not None}
    return found | {"error": r["mean_relative_error"]}


def over_seeds(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Mean and standard deviation (None for one seed) of rows that differ in their seed alone, in the table's order."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.label, []).append(cell)
    summary = []
    for label, group in groups.items():
        done = [figures(cell) for cell in group if cell.status == DONE]
        names = [name for name in (done[0] if done else {}) if all(name in f for f in done)]
        summary.append(
            {
                "row": label,
                "seeds": len(done),
                "failed": sum(cell.status == FAILED for cell in group),
                "message": next((cell.message for cell in group if cell.message), ""),
                "figures": {
                    n: [mean(f[n] for f in done), stdev(f[n] for f in done) if len(done) > 1 else None] for n in names
                },
            }
        )
    return summary


def markdown(summary: Sequence[dict[str, Any]], name: str) -> str:
    """The summary as a table."""
    columns = list(dict.fromkeys(n for line in summary for n in line["figures"]))
    lines = [f"# {name}", "", "| row | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for line in summary:
        cells = []
        for column in columns:
            value = line["figures"].get(column)
            cells.append(
                "-" if value is None else f"{value[0]:.4g}" + ("" if value[1] is None else f" ± {value[1]:.2g}")
            )
        note = f" (failed: {line['message']})" if line["failed"] else ""
        lines.append(f"| {line['row']}{note} | {line['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


class Board:
    """The rows so far: a live table on a terminal, else a line for every row that ends."""

    def __init__(self, cells: Sequence[Cell], console: Any) -> None:
        from rich.live import Live

        self.cells, self.console = cells, console
        self.live = Live(console=console, refresh_per_second=2) if console.is_terminal else None

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.update(self._table())
            self.live.stop()

    def moved(self, cell: Cell) -> None:
        """A row has ended."""
        if self.live:
            self.live.update(self._table())
            return
        shown = cell.message or "  ".join(f"{k} {v:.4g}" for k, v in figures(cell).items())
        done = sum(c.status != WAITING for c in self.cells)
        self.console.print(f"{done} of {len(self.cells)} {cell.status}: {cell.label} seed={cell.flags.get('seed', '-')}  {shown}",
                           highlight=False, soft_wrap=True)  # fmt: skip

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(title=f"{sum(c.status != WAITING for c in self.cells)} of {len(self.cells)} rows")
        for name in ("row", "seed", "status", "bits", "perplexity", "relative error"):
            table.add_column(name)
        for cell in [c for c in self.cells if c.status != WAITING][-30:]:
            f = figures(cell) if cell.status == DONE else {}
            perplexity = " ".join(f"{v:.3f}" for k, v in f.items() if k.startswith("ppl "))
            error = f"{f['error']:.4f}" if f else cell.message
            table.add_row(
                cell.label, cell.flags.get("seed", "-"), cell.status, f"{f.get('bits', 0):.3f}", perplexity, error
            )
        return table


def slurm(groups: Sequence[Sequence[Cell]], args: argparse.Namespace) -> str:
    """A job array: task i runs the rows of the i-th model, into the same directory."""
    return f"""#!/usr/bin/env bash
#SBATCH --array=0-{len(groups) - 1}
#SBATCH --gres=gpu:{args.gpus}
#SBATCH --cpus-per-task={args.cpus}
#SBATCH --job-name={args.table.stem}
# submit from the project's directory; afterwards the sweep command itself only collects: everything is done
{sys.executable} scripts/sweep.py {args.table} --out {args.out} --only-group "$SLURM_ARRAY_TASK_ID"
"""


def with_ray(groups: Sequence[Sequence[Cell]], args: argparse.Namespace, moved: Callable[[Cell], None]) -> float:
    """Every group as a task of a Ray cluster that asks for its resources; run directories must be on shared storage."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--executor ray needs ray: pip install ray") from error
    ray.init(address=args.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})

    def work(group: list[Cell]) -> tuple[list[Cell], float]:
        spent = run_group(group, args.together)
        return group, spent

    task = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus)(work)
    waiting, seconds = {task.remote(list(group)): list(group) for group in groups}, 0.0
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        own = waiting.pop(ready)
        finished, spent = ray.get(ready)
        seconds += spent
        for cell, other in zip(own, finished, strict=True):
            cell.status, cell.message, cell.results = other.status, other.message, other.results
            moved(cell)
    ray.shutdown()
    return seconds


def main() -> None:
    """Read, run, summarize."""
    from quant.core import cli

    started = time.perf_counter()
    parser: Any = cli.Parser(
        prog="scripts/sweep.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", type=Path, help=".tsv or .yaml")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/sweeps/<name of the table>")
    parser.add_argument("--executor", default="local", choices=("local", "ray", "slurm"))
    parser.add_argument("--address", help="of the Ray cluster (default: one on this machine)")
    parser.add_argument("--gpus", type=float, default=0, help="that a group of rows asks for (default: 0)")
    parser.add_argument("--cpus", type=float, default=1, help="that a group of rows asks for (default: 1)")
    parser.add_argument(
        "--together", type=int, default=16, metavar="N", help="rows evaluated in one pass (default: 16)"
    )
    parser.add_argument("--only-group", type=int, help="run the rows of one model (a job array's task)")
    args = parser.parse_args()
    cli.set_logging("error")
    args.out = args.out or Path("runs") / "sweeps" / args.table.stem
    cells = cells_of(read_table(args.table), args.out, args.table)
    by_key: dict[str, list[Cell]] = {}
    for cell in cells:
        by_key.setdefault(session_key(cell.config), []).append(cell)
    groups, console = list(by_key.values()), cli.console()
    if args.executor == "slurm":
        sys.stdout.write(slurm(groups, args))
        return
    if args.only_group is not None:
        groups = groups[args.only_group : args.only_group + 1]
    with Board(cells, console) as board:
        if args.executor == "ray":
            work = with_ray(groups, args, board.moved)
        else:
            work = sum(run_group(group, args.together, board.moved) for group in groups)
    ran = [cell for group in groups for cell in group]
    summary = over_seeds(ran)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [{"flags": c.flags, "status": c.status, "message": c.message, "run_dir": str(c.config.run_dir)} for c in ran]
    write_json(args.out / "sweep.json", {"table": str(args.table), "rows": rows, "summary": summary})
    write_atomically(args.out / "sweep.md", markdown(summary, args.table.stem).encode())
    console.print(markdown(summary, args.table.stem), highlight=False, soft_wrap=True, markup=False)
    done = [cell.config.run_dir for cell in ran if cell.status == DONE and cell.config.run_dir]
    if done:
        console.print(str(write_report([open_run(path) for path in done], args.out)), highlight=False, soft_wrap=True)
    total = time.perf_counter() - started
    failed = sum(cell.status == FAILED for cell in ran)
    console.print(f"{len(ran)} rows, {failed} failed; {total:.1f} s, of which {max(0.0, total - work):.1f} s are the sweep's own; "
                  f"{args.out / 'sweep.json'}", highlight=False, soft_wrap=True)  # fmt: skip
    if failed:
        raise RunError(f"{failed} of {len(ran)} rows failed, see above")


if __name__ == "__main__":
    from quant.core.cli import guarded

    sys.exit(guarded(main))
