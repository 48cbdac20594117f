"""What a person sees of a sweep: the rows as they move, and the table of what came of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from quant.cli.console import Pace
from quant.core.text import markdown_cell, markdown_table
from quant.run.job import Progress
from scripts.sweep_cells import DONE, FAILED, QUANTIZED, WAITING, Cell, figures

SHOWN = 30  # rows of the live table
EVERY = 20.0  # seconds between lines that say how far a stage is, where there is no live table


def markdown(summary: Sequence[dict[str, Any]], name: str) -> str:
    """The summary as a table."""
    columns = list(dict.fromkeys(n for line in summary for n in line["figures"]))
    records = [
        {"row": line["row"] + (f" (failed: {line['message']})" if line["failed"] else ""), "seeds": str(line["seeds"])}
        | {column: mean_and_spread(line["figures"].get(column)) for column in columns}
        for line in summary
    ]
    return "\n".join([f"# {markdown_cell(name)}", "", *markdown_table(records), ""])


def mean_and_spread(figure: Sequence[float | None] | None) -> str:
    """A mean, with the standard deviation over seeds where there are several."""
    if figure is None:
        return "-"
    average, spread = figure
    return f"{average:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


class Board:
    """The rows so far: a live table on a terminal, else a line for every row that ends or is quantized."""

    def __init__(self, cells: Sequence[Cell], console: Any) -> None:
        from rich.live import Live

        self.cells, self.console = cells, console
        self.live = Live(console=console, refresh_per_second=2) if console.is_terminal else None
        self.pace, self.said, self.stage = Pace(), time.perf_counter(), ""

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.update(self._table())
            self.live.stop()

    def moved(self, cell: Cell) -> None:
        """A row is quantized, or has ended."""
        if self.live:
            self.live.update(self._table())
            return
        shown = cell.message or ("  ".join(f"{k} {v:.4g}" for k, v in figures(cell).items()) if cell.results else "")
        reached = (DONE, FAILED) if cell.status in (DONE, FAILED) else (QUANTIZED, DONE, FAILED)
        done, self.said = sum(c.status in reached for c in self.cells), time.perf_counter()
        self.console.print(f"{done} of {len(self.cells)} {cell.status}: {cell.label} seed={cell.flags.get('seed', '-')}  {shown}",
                           highlight=False, soft_wrap=True)  # fmt: skip

    def watch(self, what: str) -> Progress:
        """What a run that is at work reports to. what: says which it is."""

        def progress(stage: str, done: int, total: int, note: str) -> None:
            left = self.pace.left(f"{what} {stage}", done, total)
            self.stage = f"{what}: {stage} {done} of {total}{left}"
            if self.live:
                self.live.update(self._table())
            elif time.perf_counter() - self.said >= EVERY:
                self.said = time.perf_counter()
                self.console.print(self.stage, soft_wrap=True)

        return progress

    def _table(self) -> Any:
        from rich.table import Table

        count = {status: sum(c.status == status for c in self.cells) for status in (DONE, FAILED, QUANTIZED, WAITING)}
        counted = ", ".join(f"{n} {status}" for status, n in count.items()) + f" of {len(self.cells)} rows"
        table = Table(title=counted, caption=self.stage or None)
        for name in ("row", "seed", "status", "bits", "perplexity", "relative error"):
            table.add_column(name)
        moving = [c for c in self.cells if c.status != WAITING][-SHOWN:]
        waiting = [c for c in self.cells if c.status == WAITING][: max(3, SHOWN - len(moving))]
        for cell in moving + waiting:
            f = figures(cell) if cell.status == DONE else {}
            perplexity = " ".join(f"{v:.3f}" for k, v in f.items() if k.startswith("ppl "))
            error = f"{f['error']:.4f}" if "error" in f else cell.message
            table.add_row(
                cell.label, cell.flags.get("seed", "-"), cell.status, f"{f['bits']:.3f}" if f else "", perplexity, error
            )
        return table
