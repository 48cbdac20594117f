"""Parts in which a command is stopped, refused space or run twice at once, and must reach the same end all the same."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from random import Random

from tests.campaign import lines
from tests.campaign.inputs import Answer
from tests.campaign.processes import Outcome, Trouble, call, finish, start
from tests.campaign.stock import WRITERS, Stock
from tests.campaign.verdicts import contents, end_of, faults_of, other_end

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
REFUSALS = (errno.ENOSPC, errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO)


def expected(stock: Stock, name: str) -> dict[str, str]:
    """What one of WRITERS leaves where nothing happens."""
    return end_of(stock / f"made/{name}/out")


def ended(stock: Stock, name: str, folder: Path, outcome: Outcome) -> list[str]:
    """Faults of the last call of a run: it ended well, with the same bits, and nothing is left over."""
    faults = faults_of(outcome, (0,)) + other_end(expected(stock, name), end_of(folder / "out"))
    return [f"the same command afterwards: {fault}" for fault in faults]


def kills(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Signals at random moments, half of them (and all of the first round's) at chosen changes of the file system; then the
    same command to its end."""
    name = WRITERS[number % len(WRITERS)]
    events, seconds = json.loads((stock / "events.json").read_text())[name]
    words, faults, about = stock.words_of(name, folder), [], []
    for _ in range(rng.randrange(1, 4)):
        sent, at, after = rng.choice(SIGNALS), rng.randrange(events), rng.random() * seconds
        by_event = number < len(WRITERS) or rng.random() < 0.5
        outcome = call(words, folder, Trouble(kill=sent, at=at) if by_event else Trouble(kill=sent, after=after))
        codes = (0, 130) if sent == signal.SIGINT else (0, -sent)
        faults += [f"{sent.name}: {fault}" for fault in faults_of(outcome, codes)]
        about.append(f"{sent.name} {f'at change {at}' if by_event else f'after {after:.3f} s'}: {outcome.code}")
    outcome = call(words, folder)
    return f"{name}: {', '.join(about)}", lines.shown(outcome.words), faults + ended(stock, name, folder, outcome)


def two(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Two processes on one run directory: both end well, or one is told that the other is at work."""
    name = WRITERS[number % len(WRITERS)]
    seconds = json.loads((stock / "events.json").read_text())[name][1]
    words, delay = stock.words_of(name, folder), rng.random() * seconds * rng.choice([0, 0.3, 1])
    first = start(words, folder, number=0)
    time.sleep(delay)
    outcomes = (
        [finish(first), finish(start(words, folder, number=1))] if delay > seconds else _both(first, words, folder)
    )
    faults = [fault for outcome in outcomes for fault in faults_of(outcome, (0, 2))]
    if all(outcome.code for outcome in outcomes):
        faults.append("neither was done: " + "; ".join(outcome.err[:200] for outcome in outcomes))
    faults += [f"one was told: {o.err[:200]}" for o in outcomes if o.code and "in use by" not in o.err]
    outcome = call(words, folder)
    about = f"{name}: the second after {delay:.3f} s: {[outcome.code for outcome in outcomes]}"
    return about, lines.shown(outcome.words), faults + ended(stock, name, folder, outcome)


def _both(first, words, folder: Path) -> list[Outcome]:
    second = start(words, folder, number=1)
    return [finish(first), finish(second)]


def disk(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Disk full or read-only: at a chosen change of the file system, by the size of a file, or on a small file system."""
    name = WRITERS[number % len(WRITERS)]
    kind = ("event", "event", "size", "small disk")[number // len(WRITERS) % 4]
    words, out = stock.words_of(name, folder), folder / "out"
    out.mkdir()
    events, _ = json.loads((stock / "events.json").read_text())[name]
    size, refuse, at = int(2 ** rng.uniform(7, 18)), rng.choice(REFUSALS), rng.randrange(events)
    trouble = {"event": Trouble(refuse=refuse, at=at), "size": Trouble(file_size=size)}.get(kind, Trouble())
    about = {"event": f"{errno.errorcode[refuse]} from change {at} on", "size": f"files of {size} bytes at most"}.get(
        kind, f"a disk of {size} bytes"
    )
    if kind == "small disk" and not _mount(out, size):
        return f"{name}: {about}", "", ["skipped: mounting a small disk is not allowed here"]
    try:
        outcome = call(words, folder, trouble)
        faults = faults_of(outcome)
        if outcome.code and kind != "event":  # an event may have refused the removal too
            faults += [
                f"left over: {left}"
                for left in sorted(contents(out).keys() - contents(stock / f"made/{name}/out").keys())[:1]
            ]
        if kind == "small disk":
            subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)
        again = call(words, folder)
        faults += ended(stock, name, folder, again)
    finally:
        if kind == "small disk":
            subprocess.run(["umount", str(out)], check=True)
    return f"{name}: {about}: {outcome.code}", lines.shown(outcome.words), faults


def _mount(path: Path, size: int) -> bool:
    words = ["mount", "-t", "tmpfs", "-o", f"size={max(size, resource.getpagesize())}", "tmpfs", str(path)]
    return subprocess.run(words, capture_output=True).returncode == 0


def memory(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """Little memory: so many bytes of addresses above those that the process begins with."""
    name = WRITERS[number % len(WRITERS)]
    words, size = stock.words_of(name, folder), int(2 ** rng.uniform(20, 29))
    outcome = call(words, folder, Trouble(memory=size))
    aborted = outcome.code == -signal.SIGABRT and "memory" in outcome.err  # LLVM and Rust end the process themselves
    faults = [] if aborted else faults_of(outcome)
    again = call(words, folder)
    about = f"{name}: {size >> 20} MB of memory: {outcome.code}"
    return about, lines.shown(outcome.words), faults + ended(stock, name, folder, again)


def streams(rng: Random, stock: Stock, folder: Path, number: int) -> Answer:
    """A process of its own, as a person starts it: with output that is closed, that nobody reads, or that is ASCII."""
    from tests.campaign.processes import ROOT

    text = "\u00e9\u4e2d\U0001f600"
    prompt = stock.right("generate", folder)
    prompt[prompt.index("abc")] = text
    commands = [["model_quantizer.py", "--list"], stock.right("report", folder), stock.right("compare", folder), prompt,
                [*stock.right("model_quantizer.py", folder), "--dry-run"], [*stock.right("main.py", folder), "--wbits", "x"],
                [*stock.right("sweep", folder), "--dry-run"], ["model_quantizer.py", "--help"]]  # fmt: skip
    kinds = {
        "closed output": ">&-",
        "closed output and errors": ">&- 2>&-",
        "nobody reads": "| true",
        "ASCII": "",
        "a full device": ">/dev/full",
    }
    words = commands[number % len(commands)]
    kind = list(kinds)[number // len(commands) % len(kinds)]
    line = lines.shown(tuple(map(str, words)))
    environment = os.environ | (
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"} if kind == "ASCII" else {}
    )
    import shlex
    import sys

    first = {"sweep": ["-m", "scripts.sweep"]}.get(
        str(words[0]), [words[0]] if "." in str(words[0]) else ["-m", "quant", words[0]]
    )
    shell = shlex.join([sys.executable, *map(str, [*first, *words[1:]])])
    for name in ("out", "tmp"):
        (folder / name).mkdir()
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", f"{shell} {kinds[kind]}; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    outcome = Outcome((), done.returncode, out, err, time.monotonic() - began, False, (), 0)
    codes = (2,) if "x" in words else (0, 1) if kind in ("nobody reads", "a full device") else (0,)
    if kind == "closed output and errors":
        faults = [] if outcome.code in codes else [f"exit code {outcome.code}"]
    else:
        faults = faults_of(outcome, codes)
    return f"{kind}", f"{line} {kinds[kind]}", faults
