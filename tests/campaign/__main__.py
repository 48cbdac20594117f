"""Try, judge, and say how many held; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

from tests.campaign import processes

ENDLESS = 1000.0  # seconds: no case takes so long
PARTS = {  # by name: what is tried, and the share of the time
    "flags": ("one bad flag", 5),
    "conflicts": ("several flags at once", 3),
    "config": ("damaged configurations", 4),
    "tokenizer": ("damaged tokenizers", 2),
    "tensors": ("damaged tensors, shards, .bin", 4),
    "data": ("damaged texts and tasks", 3),
    "tables": ("damaged tables of sweeps", 2),
    "runs": ("damaged run directories", 4),
    "kills": ("SIGKILL, SIGTERM, SIGINT", 4),
    "two": ("two processes in one place", 2),
    "disk": ("disk full or read-only", 3),
    "memory": ("little memory", 2),
    "streams": ("output closed, unread, ASCII", 2),
}


@dataclass
class Row:
    """What came of a part. skipped: cases that cannot be tried on this machine. ends: how often a command ended with each
    exit code. failures: case, what was damaged, command and faults."""

    part: str
    tried: int = 0
    held: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)

    def add(self, case: str, about: str, command: str, faults: list[str]) -> None:
        """Count a case."""
        skipped = bool(faults) and faults[0].startswith("skipped")
        self.skipped += skipped
        self.tried += not skipped
        self.held += not faults
        self.failed += bool(faults) and not skipped
        self.ends.update(re.findall(r": (-?\d{1,3})$", about))
        if faults and not skipped:
            self.failures.append({"case": case, "about": about, "command": command, "faults": "; ".join(faults)})


def main() -> int:
    """Parse, make the stock, try, print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="of all parts (default: 480)")
    parser.add_argument("--cases", type=int, metavar="N", help="so many of all parts, whatever time they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}; repeatable"
    )
    parser.add_argument("--case", type=int, metavar="N", help="this case of --only alone")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make all files here, and keep those of failures")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="cases at a time (default: a core each)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the failures")
    args = parser.parse_args()
    with processes.directory(args.keep) as base:
        processes.prepare(base / "home")
        began = time.monotonic()
        campaign = Campaign(base, args.seed, args.jobs)
        say(f"stock made in {time.monotonic() - began:.0f} s; seed {args.seed}")
        rows = [campaign.run(*planned) for planned in plan(args)]
        rows += campaign.changes()
    report(rows)
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "parts": [vars(row) for row in rows]}, indent=1) + "\n")
    return int(any(row.failed for row in rows))


def plan(args: argparse.Namespace) -> Iterator[tuple[str, Iterator[int], float]]:
    """Of every part its name, the numbers of its cases and its seconds; what one leaves of its time is the next ones'."""
    shares = {name: PARTS[name][1] for name in args.only or PARTS}
    began, whole, left = time.monotonic(), sum(shares.values()), sum(shares.values())
    for name, share in shares.items():
        if args.case is not None:
            yield name, iter([args.case]), ENDLESS
        elif args.cases is not None:
            yield name, iter(range(max(1, round(args.cases * share / whole)))), ENDLESS
        else:
            yield name, count(), (args.budget - (time.monotonic() - began)) * share / left
        left -= share


class Campaign:
    """The stock, and cases in processes of their own."""

    def __init__(self, base: Path, seed: int, jobs: int) -> None:
        from tests.campaign import stock
        from tests.campaign.verdicts import contents

        self.base, self.seed, self.jobs = base, seed, max(1, jobs)
        for name in ("stock", "warm", "cases"):
            shutil.rmtree(base / name, ignore_errors=True)
        self.stock = stock.Stock(base / "stock")
        processes.load(lambda: (stock.make(self.stock), stock.try_all(self.stock, base / "warm")))
        stock.run_all(self.stock)
        self.contents = contents(base / "stock")

    def changes(self) -> list[Row]:
        """A failure where anything changed the stock, which every command only reads."""
        from tests.campaign.verdicts import contents, difference

        row = Row("stock")
        if faults := difference(self.contents, contents(self.base / "stock")):
            row.add("stock", "what every case only reads", "", faults)
        return [row] if row.failed else []

    def run(self, part: str, numbers: Iterator[int], seconds: float) -> Row:
        """The cases of a part, ``jobs`` at a time, until their numbers or the time end."""
        began, row, waiting = time.monotonic(), Row(part), {}
        try:
            while True:
                more = len(waiting) < self.jobs and time.monotonic() - began < seconds
                number = next(numbers, None) if more else None
                if number is not None:
                    waiting[self._start(part, number)] = number, time.monotonic()
                elif not waiting:
                    break
                for pid, (number, started) in list(waiting.items()):
                    if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() - started > ENDLESS:
                        row.add(f"{part} {number}", *self._answer(part, number, pid))
                        del waiting[pid]
                time.sleep(0.002)
        finally:
            for pid in waiting:
                os.killpg(pid, signal.SIGKILL)
        row.seconds = round(time.monotonic() - began, 1)
        say(f"{part:10} {row.tried:5} tried {row.held:5} held {row.failed:5} failed")
        return row

    def _start(self, part: str, number: int) -> int:
        """A process that makes a case, runs it, judges it, and leaves the answer beside."""
        folder = self._folder(part, number)
        (folder / "in").mkdir(parents=True)
        if pid := os.fork():
            return pid
        os.setpgid(0, 0)
        answer: object = None
        try:
            answer = case_of(part)(Random(f"{self.seed}:{part}:{number}"), self.stock, folder, number)
        except BaseException:  # noqa: BLE001 (it is reported as a failure)
            answer = "the campaign itself", "", [traceback.format_exc()]
        finally:
            (folder / "answer.json").write_text(json.dumps(answer))
            os._exit(0)

    def _answer(self, part: str, number: int, pid: int) -> tuple[str, str, list[str]]:
        """What came of a case: what was damaged, the command, faults. The files of one that held go."""
        folder = self._folder(part, number)
        answer = "", "", ["the case did not end"]
        if (folder / "answer.json").exists():
            answer = tuple(json.loads((folder / "answer.json").read_text()))
        else:
            os.killpg(pid, signal.SIGKILL)
        if os.path.ismount(folder / "out"):
            subprocess.run(["umount", str(folder / "out")], check=True)
        if not answer[2]:
            shutil.rmtree(folder)
        return answer

    def _folder(self, part: str, number: int) -> Path:
        return self.base / "cases" / f"{part}-{number}"


def case_of(part: str) -> Callable:
    """The function that makes and judges the cases of a part."""
    from tests.campaign import inputs, kills

    return getattr(inputs, part, None) or getattr(kills, part)


def report(rows: list[Row]) -> None:
    """Every failure, then the table."""
    for failure in (failure for row in rows for failure in row.failures):
        about, faults = ascii(failure["about"]), ascii(failure["faults"])
        say(f"\n{failure['case']}: {about}\n  {failure['command']}\n  {faults}")
    say(f"\n{'part':40} {'tried':>6} {'held':>6} {'failed':>6} {'seconds':>8}   ended with exit code")
    numbers = ("tried", "held", "failed", "skipped", "seconds")
    total = Row("all", *(sum(getattr(row, name) for row in rows) for name in numbers))
    for row in [*rows, total]:
        about = f"{row.part}: {PARTS[row.part][0]}" if row.part in PARTS else row.part
        ends = ", ".join(f"{code}: {times}" for code, times in row.ends.most_common())
        skipped = f" ({row.skipped} not possible here)" if row.skipped else ""
        say(f"{about:40} {row.tried:6} {row.held:6} {row.failed:6} {row.seconds:8.0f}   {ends}{skipped}")


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
