"""Commands in forked processes: everything is imported already, and a process that is killed or hangs harms nobody."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMANDS = {  # by first word: the module whose main it is
    "model_quantizer.py": "model_quantizer",
    "main.py": "main",
    "generate_act_scale_shift.py": "generate_act_scale_shift",
    "sweep": "scripts.sweep",
    **{name: f"quant.cli.{name}" for name in ("evaluate", "generate", "report", "repeat", "convert")},
}
ROOT = Path(__file__).parents[2]
TIMEOUT = 60.0  # seconds of work, hundreds of times what a case takes
WAITING = 45.0  # seconds in which a process does nothing: it waits for ever
MEMORY = 6 << 30  # bytes of addresses above those of this process, so that no case takes the machine's memory
CRASHED = 70  # the exit code of a process that ended with an exception
CHANGES = {  # by audited event: where in its arguments the paths are that change, and the directories they are in
    "os.rename": ((1, 3), (0, 2)), "os.link": ((1, 3),), "os.symlink": ((1, 2),), "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),), "os.remove": ((0, 1),),
}  # fmt: skip
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Trouble:
    """What happens to a command on its way. A number of an event is that of a change of the file system in the case's
    own directory, from 0.

    kill: this signal, at event ``at`` or ``after`` seconds. refuse: from event ``at`` on the system answers every change
    with this errno; removing too where it is read-only. file_size, memory: bytes that a file, and the addresses of the
    process besides those that it begins with, may have.
    """

    kill: int = 0
    at: int = -1
    after: float = -1.0
    refuse: int = 0
    file_size: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a command ended. code: negative for a signal. strays: changes outside the places that are its own."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float
    timed_out: bool
    strays: tuple[str, ...]
    events: int


@dataclass
class Running:
    """A command that was started."""

    words: tuple[str, ...]
    pid: int
    folder: Path
    number: int
    started: float
    trouble: Trouble


def prepare(home: Path) -> None:
    """Settings of a process whose children run commands: a home of its own, one thread, no network. Before any import
    of the toolkit."""
    home.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}  # fmt: skip
    for name in ("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        os.environ.pop(name, None)


def load(work: Callable[[], object]) -> None:
    """Import what ``work`` does, which a child tries; kernels that start threads are left to each process."""
    import torch

    torch.set_num_threads(1)
    for module in COMMANDS.values():
        importlib.import_module(module)
    for name in in_child(lambda: (work(), list(sys.modules))[1]):
        compiled = name.startswith("quant.kernels") and name.endswith(
            (".cpu", ".cpu_fields", ".cpu_bytes", ".one_token", ".loops", ".threads")
        )
        if not compiled and name not in sys.modules:
            importlib.import_module(name)


def in_child(work: Callable[[], Any], timeout: float = 600.0) -> Any:
    """What ``work`` returns, as JSON, in a process of its own. Raises RuntimeError where it failed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        try:
            answer = json.dumps([True, work()])
        except BaseException:  # noqa: BLE001 (the parent raises it)
            answer = json.dumps([False, traceback.format_exc()])
        with os.fdopen(writing, "w") as stream:
            stream.write(answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    right, answer = json.loads(text) if text else (False, "the process was killed")
    if not right:
        raise RuntimeError(answer)
    return answer


def start(words: Sequence[object], folder: Path, trouble: Trouble | None = None, number: int = 0) -> Running:
    """Fork and run a command in ``folder``. Its own places are there: cwd, out, log and tmp."""
    given = tuple(map(str, words))
    for name in ("cwd", "out", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    running = Running(given, 0, folder, number, time.monotonic(), trouble or Trouble())
    for name in ("out", "err", "events"):
        _file(running, name).write_bytes(b"")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the command begins
    running.pid = os.fork()
    if not running.pid:
        _run(running)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return running


def finish(running: Running, timeout: float = TIMEOUT) -> Outcome:
    """Wait for a command; kill it where it works too long, or does nothing for long."""
    kill_at = running.started + running.trouble.after if running.trouble.after >= 0 else math.inf
    ended, status, timed_out = 0, 0, False
    worked, since = 0.0, running.started
    while not ended:
        before, now = worked, time.monotonic()
        worked = _work_of(running.pid)
        since = since if worked == before else now
        ended, status = os.waitpid(running.pid, os.WNOHANG)
        if not ended and now > kill_at:
            os.kill(running.pid, running.trouble.kill)
            kill_at = math.inf
        elif not ended and (worked > timeout or now - since > WAITING):
            timed_out = True
            os.kill(running.pid, signal.SIGKILL)
        time.sleep(0 if ended else 0.002)
    out, err, events = (_file(running, name).read_bytes().decode(errors="replace") for name in ("out", "err", "events"))
    lines = events.splitlines()
    return Outcome(
        running.words, os.waitstatus_to_exitcode(status), out, err, time.monotonic() - running.started, timed_out,
        tuple(dict.fromkeys(line[6:] for line in lines if line.startswith("stray "))), lines.count("event"),
    )  # fmt: skip


def _work_of(pid: int) -> float:
    """Seconds that a child of this process has worked."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def call(words: Sequence[object], folder: Path, trouble: Trouble | None = None, timeout: float = TIMEOUT) -> Outcome:
    """Run a command to its end."""
    return finish(start(words, folder, trouble), timeout)


def _file(running: Running, name: str) -> Path:
    return running.folder / f"{name}-{running.number}.txt"


def _run(running: Running) -> None:
    """The child: never returns."""
    code = CRASHED
    try:
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(_file(running, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(_file(running, "events"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.chdir(running.folder / "cwd")
        os.environ["TMPDIR"] = str(running.folder / "tmp")
        tempfile.tempdir = None
        command, *words = running.words
        sys.argv = [f"quant {command}" if "." not in command else command, *words]
        _limit(running.trouble)
        sys.addaudithook(_watch(running.folder, log, running.trouble))
        from quant.cli.errors import exit_code_of

        main = importlib.import_module(COMMANDS[command]).main

        def begin() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            main()

        code = exit_code_of(begin)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:  # noqa: BLE001 (a verdict is about it)
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _limit(trouble: Trouble) -> None:
    """Sizes that the system allows this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    addresses = pages * resource.getpagesize() + (trouble.memory or MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    if trouble.file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (trouble.file_size, trouble.file_size))


def _watch(folder: Path, log: int, trouble: Trouble) -> Callable[[str, tuple], None]:
    """A hook that sees every change of the file system that Python makes: it writes down and stops those outside the
    command's own places, counts the others, and makes the trouble of its event."""
    own = tuple(f"{folder / name}" for name in ("cwd", "out", "log", "tmp"))
    elsewhere = (os.environ["HOME"], "/dev/null", "/dev/zero", "/dev/shm", "/proc/")
    seen = 0

    def see(event: str, args: tuple) -> None:
        nonlocal seen
        for path in _changed(event, args):
            if path.startswith(elsewhere) or "__pycache__" in path:
                continue
            if not path.startswith(own):
                os.write(log, f"stray {event} {path}\n".encode(errors="replace"))
                raise PermissionError(13, "outside the places of this command", path)
            if path.startswith(own[-1]):
                continue
            os.write(log, b"event\n")
            if trouble.kill and seen == trouble.at:
                os.kill(os.getpid(), trouble.kill)
            if trouble.refuse and seen >= trouble.at >= 0 and _is_refused(event, trouble.refuse):
                seen += 1
                raise OSError(trouble.refuse, os.strerror(trouble.refuse), path)
            seen += 1
            break

    return see


def _is_refused(event: str, number: int) -> bool:
    """A full disk still lets files go and change names."""
    return number != errno.ENOSPC or event in ("open", "os.mkdir", "os.link", "os.symlink")


def _changed(event: str, args: tuple) -> Iterator[str]:
    """The paths that an audited event is about to change, its target first."""
    if event == "open":
        path, _, flags = args
        if not isinstance(path, int) and isinstance(flags, int) and flags & FLAGS:
            yield os.path.realpath(os.fsdecode(path))
    else:
        for path, directory in CHANGES.get(event, ()):
            yield _real(args[path], args[directory] if 0 <= directory < len(args) else -1)


def _real(path: Any, directory: int) -> str:
    """A path without links, but for its own name: that is what changes."""
    name = os.fsdecode(path)
    if directory >= 0:
        name = os.path.join(Path(f"/proc/self/fd/{directory}").readlink(), name)  # noqa: PTH118
    head, tail = os.path.split(os.path.abspath(name))  # noqa: PTH100
    return os.path.join(os.path.realpath(head), tail)  # noqa: PTH118


@contextmanager
def directory(keep: Path | None) -> Iterator[Path]:
    """A place for a campaign's files: ``keep``, or one that goes at the end."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="campaign-") as name:
            yield Path(name).resolve()
