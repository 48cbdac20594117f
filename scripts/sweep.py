"""Run a table of quantizations: every row is a command, all rows of a model share its data and one evaluation.

A table is a .tsv with a header of flag names (and, if wanted, columns ``command`` and ``flags``, the latter with several
flags in a cell), or a .yaml with ``command``, ``fixed`` flags, a ``grid`` of lists whose product is taken (or a list of
such grids) and ``rows``; an entry of a grid's list may be a set of flags by itself. scripts/papers.tsv is the papers'
table: its rows are chosen with --paper, --family, --size and --setting, which take shell patterns.
Finished rows are skipped, a row that fails does not stop the others, and the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the command lines are imported for their parsers

from quant.cli.arguments import add_flags, bare_parser, flag_mistakes, parse  # noqa: E402
from quant.cli.errors import exit_code_of  # noqa: E402
from quant.cli.flags import AT_LEAST_0, AT_LEAST_1, SWEEP, Flag  # noqa: E402
from quant.core.errors import InputError, RunError  # noqa: E402
from quant.core.files import check_owned, hold_lock, write_owned  # noqa: E402
from quant.core.places import Place, check_places  # noqa: E402
from quant.core.text import printable  # noqa: E402
from quant.report.page import write_report  # noqa: E402
from quant.report.runs import open_run  # noqa: E402
from quant.run.request import places_read  # noqa: E402
from quant.run.stored import Allowed  # noqa: E402
from scripts.sweep_board import Board, markdown  # noqa: E402
from scripts.sweep_cells import (  # noqa: E402
    DONE,
    FAILED,
    Cell,
    cells_of,
    check_orders,
    groups_of,
    over_seeds,
    run_group,
    with_more,
)
from scripts.sweep_table import CHOICES, flags_of, read_table, words_of  # noqa: E402

EXAMPLES = """examples:
  python scripts/sweep.py scripts/sweeps/demo.yaml                       # 150 rows on the embedded models
  python scripts/sweep.py mine.tsv --out runs/sweeps/mine                # model<TAB>wbits<TAB>quantization-method<TAB>seed
  python scripts/sweep.py scripts/papers.tsv --paper omniquant --family llama-2 --size 7b --setting 'W4*' --seeds 0,1,2
  python scripts/sweep.py scripts/papers.tsv --paper quantease --dry-run # the commands; nothing is run
  python scripts/sweep.py scripts/papers.tsv --size 125m --models /data/models --flags='--seqlen 1024 --data-dir /data/text'
  python scripts/sweep.py mine.yaml --executor ray --gpus 1              # one model after the other on each GPU of a cluster
  python scripts/sweep.py mine.yaml --executor ray --gpus 1 --rows-per-task 1     # each row by itself
  python scripts/sweep.py mine.yaml --executor slurm > array.sh          # prints a job array, one task a model

Exit codes: 0 all rows done, 1 some failed, 2 a malformed table.
"""


def slurm(groups: Sequence[Sequence[Cell]], args: argparse.Namespace) -> str:
    """A job array: task i runs the i-th group of rows, into the same directory."""
    for name in ("gpus", "cpus"):
        if getattr(args, name) != int(getattr(args, name)):
            raise InputError(f"--{name} {getattr(args, name):g}: Slurm gives whole ones")
    again = ["--out", str(args.out), "--together", str(args.together)]
    for name in (*CHOICES, "models", "seeds", "flags", "rows_per_task"):
        value = getattr(args, name)
        again += [f"--{name.replace('_', '-')}={value}"] if value else []
    again += [f"--{name.replace('_', '-')}" for name in ("allow_paths", "trust_remote_code") if getattr(args, name)]
    return f"""#!/usr/bin/env bash
#SBATCH --array=0-{len(groups) - 1}
#SBATCH --gres=gpu:{int(args.gpus)}
#SBATCH --cpus-per-task={int(args.cpus)}
#SBATCH --job-name={re.sub(r"[^A-Za-z0-9._-]", "-", args.table.stem)}
# submit from the project's directory; afterwards the sweep command itself only collects: everything is done
{shlex.join([sys.executable, "scripts/sweep.py", str(args.table), *again])} --only-group "$SLURM_ARRAY_TASK_ID"
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


FLAGS = (
    Flag(None, {SWEEP: "--out"}, "default: runs/sweeps/<name of the table>", type=Path, metavar="DIR"),
    Flag(None, {SWEEP: "--executor"}, None, None, "local", choices=("local", "ray", "slurm")),
    Flag(None, {SWEEP: "--address"}, "of the Ray cluster (default: one on this machine)"),
    Flag(None, {SWEEP: "--gpus"}, "that a task asks for (default: 0)", None, 0.0, float, AT_LEAST_0),
    Flag(None, {SWEEP: "--cpus"}, "that a task asks for (default: 1)", None, 1.0, float, AT_LEAST_0),
    Flag(None, {SWEEP: "--rows-per-task"},
         "rows of one model that a task takes; full precision is then evaluated once a task (default: all)", None, None,
         int, AT_LEAST_1, metavar="N"),
    Flag(None, {SWEEP: "--together"}, "rows evaluated in one pass (default: 16)", None, 16, int, AT_LEAST_1,
         metavar="N"),
    Flag(None, {SWEEP: "--only-group"}, "run the I-th task alone, from 0 (a job array's)", type=int, metavar="I"),
    *(Flag(None, {SWEEP: f"--{name}"}, f"of scripts/papers.tsv: rows of this {name}", metavar="PATTERN")
      for name in CHOICES),
    Flag(None, {SWEEP: "--models"}, "of scripts/papers.tsv: DIR/<family>-<size>, not the hub", type=Path,
         metavar="DIR"),
    Flag(None, {SWEEP: "--seeds"}, "every row once with each of these seeds", None, "", metavar="A,B"),
    Flag(None, {SWEEP: "--flags"}, "more flags for every row, in one argument", None, "", metavar="WORDS"),
    Flag(None, {SWEEP: "--dry-run"}, "print the commands; nothing is run", type=bool),
    Flag(None, {SWEEP: "--allow-paths"}, "read the data and other files that the table names by path", type=bool),
    Flag(None, {SWEEP: "--trust-remote-code"}, "let rows that ask for it run code that comes with their model",
         type=bool),
)  # fmt: skip


def parsed() -> argparse.Namespace:
    """The flags. Raises InputError for what is wrong with them."""
    parser = bare_parser(SWEEP, __doc__, EXAMPLES)
    parser.add_argument("table", type=Path, help=".tsv or .yaml")
    add_flags(parser, SWEEP, FLAGS)
    add_flags(parser, SWEEP)
    args: argparse.Namespace = parse(parser)
    if lines := flag_mistakes(args, SWEEP, FLAGS):
        raise InputError(*lines)
    args.out = args.out or Path("runs") / "sweeps" / args.table.stem
    args.name = "sweep" if args.only_group is None else f"sweep-task{args.only_group}"  # tasks end side by side
    return args


def planned(args: argparse.Namespace) -> list[list[Cell]]:
    """The rows of the table, by task. Raises InputError for what is wrong with the table, its rows, or places."""
    outputs = [Place("--out", args.out / f"{args.name}{ending}") for ending in (".json", ".md")]
    check_places([Place("the table", args.table)], outputs)
    for output in outputs:
        check_owned(output.path)
    chosen = {name: getattr(args, name) for name in CHOICES if getattr(args, name)}
    rows = read_table(args.table, chosen, args.models)
    check_orders(rows, Allowed(args.trust_remote_code, args.allow_paths))
    more = with_more(rows, [s for s in args.seeds.split(",") if s], flags_of(args.flags, "--flags"))
    cells = cells_of(more, args.out)
    reads = dict.fromkeys(p for cell in cells for p in places_read(cell.request.session, [cell.request.run]))
    check_places(reads, [Place("--out", args.out, adds=True)])
    return groups_of(cells, args.rows_per_task)


def shown(args: argparse.Namespace, groups: Sequence[Sequence[Cell]], console: Any) -> bool:
    """Whether the commands or a job array were asked for instead of running them; they are printed then."""
    if args.dry_run:
        for number, cell in ((number, cell) for number, group in enumerate(groups) for cell in group):
            command = shlex.join(["python", cell.flags["command"], *words_of(cell.flags)])
            console.print(f"task {number}: {command}", soft_wrap=True)
    elif args.executor == "slurm":
        script = slurm(groups, args)
        sys.stdout.write(printable(script, keep="\n") if sys.stdout.isatty() else script)
    return args.dry_run or args.executor == "slurm"


def summarize(ran: Sequence[Cell], args: argparse.Namespace, console: Any) -> None:
    """Write and show what came of the rows, and their report."""
    summary = over_seeds(ran)
    ended = [
        {"flags": c.flags, "status": c.status, "message": c.message, "run_dir": str(c.request.output.run_dir)}
        for c in ran
    ]
    numbers = {"table": str(args.table), "rows": ended, "summary": summary}
    text = markdown(summary, args.table.stem)
    files = {f"{args.name}.json": (json.dumps(numbers, indent=2) + "\n").encode(), f"{args.name}.md": text.encode()}
    write_owned(args.out, files)
    for line in text.split("\n"):
        console.print(line, soft_wrap=True)
    done = [cell.request.output.run_dir for cell in ran if cell.status == DONE]
    if done and args.only_group is None:
        page = write_report([open_run(path) for path in done if path], args.out)
        console.print(f"report: {page}", soft_wrap=True)


def main() -> None:
    """Read, run, summarize."""
    from quant.cli.console import console as make_console

    started, args = time.perf_counter(), parsed()
    groups, console = planned(args), make_console()
    if shown(args, groups, console):
        return
    if args.only_group is not None:
        if not 0 <= args.only_group < len(groups):
            raise InputError(f"--only-group {args.only_group}: there are {len(groups)} tasks, from 0")
        groups = [groups[args.only_group]]
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        hold_lock(args.out / f"{args.name}.lock", f"the sweep in {args.out}"),
        Board(sum(groups, []), console) as board,
    ):
        if args.executor == "ray":
            work = with_ray(groups, args, board.moved)
        else:
            work = sum(run_group(group, args.together, board.moved, board.watch) for group in groups)
    ran = [cell for group in groups for cell in group]
    summarize(ran, args, console)
    total = time.perf_counter() - started
    failed = sum(cell.status == FAILED for cell in ran)
    own = f"{total:.1f} s, of which {max(0.0, total - work):.1f} s are the sweep's own"
    console.print(f"{len(ran)} rows, {failed} failed; {own}; {args.out / args.name}.json", soft_wrap=True)
    if failed:
        raise RunError(f"{failed} of {len(ran)} rows failed, see above")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
