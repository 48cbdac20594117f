"""Standard output: strings shown letter by letter, and the progress of the stages."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.protocol import is_renderable
from rich.text import Text

from quant.core.text import printable


class Console(rich.console.Console):
    """Shows strings letter by letter: in what is printed, cells and titles there is no markup, and `printable` makes
    every character visible that a terminal obeys. A string is one line; our own lines and styles are `rich.text.Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it is shown (rich calls this for every string it meets)."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; what is neither a string nor made for rich, such as a path, is shown as a string."""
        super().print(*(o if is_renderable(o) else str(o) for o in objects), **options)

    def on_broken_pipe(self) -> None:
        """Fail as any write does (rich would end the program without a word)."""
        raise


def console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=120)


class Pace:
    """How fast stages go, by what was seen of them."""

    def __init__(self) -> None:
        self.started: dict[str, tuple[float, int]] = {}  # when a stage was first seen, and how far it was

    def left(self, name: str, done: int, total: int) -> str:
        """How long a stage that is so far now will still take; nothing at its first step and its end."""
        if name not in self.started or done <= self.started[name][1]:
            self.started[name] = (time.perf_counter(), done)
        began, first = self.started[name]
        if done in (first, total):
            return ""
        seconds = (time.perf_counter() - began) / (done - first) * (total - done)
        for unit, size, limit in (("s", 1, 100), ("min", 60, 100 * 60)):
            if seconds < limit:
                return f", about {seconds / size:.0f} {unit} left"
        return f", about {seconds / 3600:.1f} h left"


class ProgressBars:
    """A bar for each stage on a terminal; elsewhere a line, with the time left, when a stage has moved on by a tenth."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description:>24}", markup=False),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.pace = Pace()

    def __enter__(self) -> ProgressBars:
        self.bars.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bars.stop()

    def for_method(self, method: str) -> Callable[[str, int, int, str], None]:
        """The callback that a run reports to."""
        return lambda stage, done, total, note: self._update(f"{method} {stage}", done, total, note)

    def _update(self, name: str, done: int, total: int, note: str) -> None:
        name, note = printable(name), printable(note)  # columns make a Text of them by themselves
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, note=note)
        left = self.pace.left(name, done, total)
        self.bars.update(self.tasks[name], completed=done, note=note)
        step = max(1, total // 10)
        if not self.console.is_terminal and (done % step == 0 or done == total):
            self.console.print(f"{name}: {done} of {total} {note}".rstrip() + left)
