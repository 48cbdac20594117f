"""How a command ends: one line for every mistake, an exit code, and messages of libraries as single lines."""

from __future__ import annotations

import _thread
import contextlib
import errno
import io
import logging
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from quant.core import ranks
from quant.core.errors import InputError, RunError, first_line, is_memory
from quant.core.text import brief, one_line, printable

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

log = logging.getLogger(__name__)


def fail(*lines: str) -> None:
    """One line on standard error for each mistake, whatever the names in it hold; of several processes by one of them."""
    if not ranks.may_speak():
        return
    with contextlib.suppress(BrokenPipeError):  # nobody reads
        for line in dict.fromkeys(map(str, lines)):  # one file may be wrong under two flags
            sys.stderr.write(f"error: {one_line(line)}\n")


def exit_code_of(main: Callable[[], None], shared: bool = False) -> int:
    """Run a command; turn every failure into one line and an exit code, whatever library it came from.

    ``--log-level debug`` shows its traceback before. shared: it is one that several processes may do together.
    """
    _open_streams()
    try:
        with _seen_interrupts() as interrupts, ranks.joined():
            _check_directory()
            _share(shared)
            try:
                main()
            finally:
                sys.stdout.flush()  # what waits for a pipe that nobody reads fails here, not at the interpreter's end
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if interrupts:
            return _interrupted()
        if isinstance(error, BrokenPipeError):
            _drop_output()
        log.debug("this failed:", exc_info=True)
        code, lines = explain(error) or (FAILED, [_unexpected_line(error)])
        fail(*lines)
        return code
    return DONE


def _share(shared: bool) -> None:
    """Let the first of several processes speak for all. Raises InputError where the command is one process's."""
    if ranks.size() > 1 and not shared:
        raise InputError(
            f"this command is of one process, and {ranks.size()} were started: start it without torchrun (model_quantizer.py and "
            "main.py can be shared)"
        )
    if not ranks.is_first():
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (open to the end)


def _interrupted() -> int:
    fail("interrupted; the same command continues after the last finished block")
    return INTERRUPTED


@contextlib.contextmanager
def _seen_interrupts() -> Iterator[list[int]]:
    """The interrupts that come: a library may make an error of its own of a KeyboardInterrupt inside it, and one that falls
    where nothing can be raised (a destructor, a callback of C) is printed and forgotten by Python: it comes again here."""
    seen: list[int] = []
    timers: list[threading.Timer] = []
    usual_hook = sys.unraisablehook

    def again(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:
            timers.append(threading.Timer(0.05, _thread.interrupt_main))
            timers[-1].start()
        else:
            usual_hook(lost)

    def see(number: int, _: object) -> NoReturn:
        seen.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    usual = usual and threading.current_thread() is threading.main_thread()  # another thread sets no handler
    try:
        if usual:
            signal.signal(signal.SIGINT, see)
            sys.unraisablehook = again
        yield seen
    finally:
        for timer in timers:
            timer.cancel()  # the command has ended by itself
        if usual:
            sys.unraisablehook = usual_hook
            signal.signal(signal.SIGINT, signal.default_int_handler)


def explain(error: Exception) -> tuple[int, Sequence[str]] | None:
    """Exit code and lines for a failure that a person can act on; None for any other."""
    if isinstance(error, InputError):
        return BAD_INPUT, error.args
    if isinstance(error, RunError):
        *lines, last = error.args
        return FAILED, [*lines, f"{last}. Finished blocks are kept: the same command continues."]
    if is_memory(error):
        return FAILED, [_memory_line(error)]
    if type(error) is Exception:  # the tokenizers library raises no other
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            return FAILED, [f"a library failed: {error}. Finished blocks are kept."]
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return BAD_INPUT, [f"{_system_line(error)}: give another place"]
    if isinstance(error, BrokenPipeError):
        return FAILED, ["whatever read the output has ended, so this ends too; what was finished is kept"]
    if isinstance(error, OSError):
        return FAILED, [f"{_system_line(error)}. Finished blocks are kept."]
    return None


def _memory_line(error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    why = f" ({brief(first[0], 200)})" if first else ""
    return (
        f"not enough memory{why}: lower --calib-batch, --nsamples or --seqlen, or keep hidden states elsewhere with "
        "--activation-store. Finished blocks are kept."
    )


def _unexpected_line(error: Exception) -> str:
    """What nobody foresaw, and the last place of this project on its way."""
    root = Path(__file__).parents[2]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(root) and "site-packages" not in frame.filename
    ]
    where = f" at {Path(frames[-1].filename).relative_to(root)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {first_line(error)}; --log-level debug shows how it came to that"


def _system_line(error: OSError) -> str:
    """What the system refused, of which file; of a full disk also how much is free on it."""
    line = error.strerror or str(error) or type(error).__name__
    if not error.filename:
        return line
    line += f": {os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return line
    place = next((folder for folder in Path(str(error.filename)).absolute().parents if folder.is_dir()), Path("/"))
    return f"{line} ({shutil.disk_usage(place).free / 1e6:.1f} MB are free there)"


def _open_streams() -> None:
    """Output that is closed goes nowhere, and a terminal that cannot show a letter shows its escape."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Let standard output, whose reader is gone, go nowhere: Python flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_directory() -> None:
    """Raise InputError where the working directory was deleted: libraries end the process without a word of it."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise InputError("the working directory is not there any more: change to another one") from error


class _Record(logging.LogRecord):
    """A message that is one line, whatever names are in it; for the handlers of libraries too."""

    def getMessage(self) -> str:  # noqa: N802
        return printable(super().getMessage())


def set_logging(level: str) -> None:
    """Log to standard error, of several processes the first one alone but for debugging; libraries stay quiet unless
    something is wrong."""
    level = level if ranks.is_first() or level == "debug" else "critical"
    logging.setLogRecordFactory(_Record)
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for library in ("transformers", "datasets", "huggingface_hub", "urllib3", "filelock", "fsspec"):
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
