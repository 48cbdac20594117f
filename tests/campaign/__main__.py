"""Try, judge, and say how many held; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random

from tests.campaign import processes

ENDLESS = 400.0  # seconds: no case takes so long


@dataclass(frozen=True)
class Part:
    """A part of the campaign. share: of the time."""

    about: str
    share: float


PARTS = {
    "flags": Part("one bad flag", 5),
    "conflicts": Part("several flags at once", 3),
    "config": Part("damaged configurations", 4),
    "tokenizer": Part("damaged tokenizers", 2),
    "tensors": Part("damaged tensors, shards and .bin files", 4),
    "data": Part("damaged texts and tasks", 3),
    "tables": Part("damaged tables of sweeps", 2),
    "runs": Part("damaged run directories", 4),
    "kills": Part("SIGKILL, SIGTERM, SIGINT", 4),
    "two": Part("two processes on one run", 2),
    "disk": Part("disk full or read-only", 3),
    "memory": Part("little memory", 2),
    "streams": Part("closed, unread or ASCII output", 2),
}


def main() -> int:
    """Parse, make the stock, try, print. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument(
        "--budget", type=float, default=480, metavar="SECONDS", help="of all parts together (default: 480)"
    )
    parser.add_argument("--cases", type=int, metavar="N", help="so many of all parts together, whatever time they take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="NAME", help=f"of {', '.join(PARTS)}; may be repeated"
    )
    parser.add_argument("--case", type=int, metavar="N", help="this case of --only alone")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep all files here")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="cases at a time (default: one a core)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers and the failures")
    args = parser.parse_args()
    chosen = {name: PARTS[name] for name in args.only or PARTS}
    with processes.directory(args.keep) as base:
        processes.prepare(base / "home")
        began = time.monotonic()
        campaign = Campaign(base, args.seed, args.jobs)
        say(f"stock made in {time.monotonic() - began:.0f} s; seed {args.seed}")
        rows = [campaign.run(name, numbers, seconds) for name, numbers, seconds in plan(chosen, args)]
        if other := campaign.changed():
            rows.append(
                {"part": "stock", "tried": 1, "held": 0, "failed": 1, "skipped": 0, "seconds": 0.0, "failures": [other]}
            )
    report(rows)
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "parts": rows}, indent=1) + "\n")
    return int(any(row["failed"] for row in rows))


def plan(chosen: dict[str, Part], args: argparse.Namespace) -> Iterator[tuple[str, Iterator[int], float]]:
    """Of every part its name, the numbers of its cases and the seconds it may take; time that one leaves is the next ones'."""
    began, all_shares = time.monotonic(), sum(part.share for part in chosen.values())
    shares = all_shares
    for name, part in chosen.items():
        if args.case is not None:
            yield name, iter([args.case]), ENDLESS
        elif args.cases is not None:
            yield name, iter(range(max(1, round(args.cases * part.share / all_shares)))), ENDLESS
        else:
            yield name, count(), (args.budget - (time.monotonic() - began)) * part.share / shares
        shares -= part.share


class Campaign:
    """The stock, and cases in processes of their own."""

    def __init__(self, base: Path, seed: int, jobs: int) -> None:
        from tests.campaign import stock
        from tests.campaign.verdicts import contents

        self.base, self.seed, self.jobs = base, seed, max(1, jobs)
        for name in ("stock", "warm"):
            shutil.rmtree(base / name, ignore_errors=True)
        self.stock = stock.Stock(base / "stock")
        processes.load(lambda: (stock.make(self.stock), stock.try_all(self.stock, base / "warm")))
        stock.run_all(self.stock)
        self.contents = contents(base / "stock")

    def changed(self) -> dict[str, str] | None:
        """A failure where anything changed the stock, which every command only reads."""
        from tests.campaign.verdicts import contents, difference

        lines = difference(self.contents, contents(self.base / "stock"))
        return {"case": "", "about": "the stock", "command": "", "faults": "; ".join(lines)} if lines else None

    def run(self, part: str, numbers: Iterator[int], seconds: float) -> dict:
        """The cases of a part, ``jobs`` at a time, until their numbers or the time end."""
        began, waiting, row = time.monotonic(), {}, {"part": part, "tried": 0, "held": 0, "failed": 0, "skipped": 0}
        failures = []
        try:
            while True:
                while len(waiting) < self.jobs and time.monotonic() - began < seconds:
                    number = next(numbers, None)
                    if number is None:
                        seconds = 0.0
                        break
                    waiting[self._start(part, number)] = number, time.monotonic()
                if not waiting:
                    break
                for pid, (number, started) in list(waiting.items()):
                    if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() - started > ENDLESS:
                        del waiting[pid]
                        failure = self._judge(part, number, pid)
                        kind = (
                            "held"
                            if failure is None
                            else "skipped"
                            if failure["faults"].startswith("skipped")
                            else "failed"
                        )
                        row["tried"] += kind != "skipped"
                        row[kind] += 1
                        failures += [failure] if kind == "failed" else []
                time.sleep(0.003)
        finally:
            for pid in waiting:
                os.killpg(pid, signal.SIGKILL)
        row |= {"seconds": round(time.monotonic() - began, 1), "failures": failures}
        say(f"{part:10} {row['tried']:5} tried {row['held']:5} held {row['failed']:5} failed")
        return row

    def _start(self, part: str, number: int) -> int:
        folder = self._folder(part, number)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "in").mkdir(parents=True)
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, 0)
        answer: object = None
        try:
            answer = case_of(part)(Random(f"{self.seed}:{part}:{number}"), self.stock, folder, number)
        except BaseException:  # noqa: BLE001 (it is reported as a failure)
            answer = "the campaign's own", "", [traceback.format_exc()]
        finally:
            (folder / "answer.json").write_text(json.dumps(answer))
            os._exit(0)

    def _judge(self, part: str, number: int, pid: int) -> dict[str, str] | None:
        """A failure, or None where the case held; its files go."""
        folder = self._folder(part, number)
        if not (folder / "answer.json").exists():
            os.killpg(pid, signal.SIGKILL)
            answer = ["", "", ["the case did not end"]]
        else:
            answer = json.loads((folder / "answer.json").read_text())
        if os.path.ismount(folder / "out"):
            subprocess.run(["umount", str(folder / "out")], check=True)
        about, command, faults = answer
        if not faults:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return {"case": f"{part} {number}", "about": ascii(about), "command": command, "faults": "; ".join(faults)}

    def _folder(self, part: str, number: int) -> Path:
        return self.base / "cases" / f"{part}-{number}"


def case_of(part: str) -> Callable:
    """The function that makes and judges the cases of a part."""
    from tests.campaign import inputs, kills

    return getattr(inputs, part, None) or getattr(kills, part)


def report(rows: list[dict]) -> None:
    """Every failure, then the table."""
    for row in rows:
        for failure in row["failures"]:
            say(f"\n{failure['case']}: {failure['about']}\n  {failure['command']}\n  {ascii(failure['faults'])}")
    say(f"\n{'part':40} {'tried':>6} {'held':>6} {'failed':>6} {'seconds':>8}")
    total = {key: sum(row[key] for row in rows) for key in ("tried", "held", "failed", "skipped", "seconds")}
    for row in [*rows, {"part": "all", **total}]:
        about = PARTS[row["part"]].about if row["part"] in PARTS else ""
        say(f"{row['part'] + ': ' + about if about else row['part']:40} {row['tried']:6} {row['held']:6} {row['failed']:6} {row['seconds']:8.0f}"
            + (f"   ({row['skipped']} could not be tried here)" if row["skipped"] else ""))  # fmt: skip


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
