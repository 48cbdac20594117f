"""What a finished run shows: results, tasks, published figures, linears, differences, and what loads a checkpoint."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from quant.cli.console import Console
from quant.core.errors import InputError
from quant.core.names import STAGES
from quant.core.text import printable
from quant.report.published import published_figures


def results_table(all_results: Sequence[dict[str, Any]], title: str) -> Table:
    """Method, bits per weight of the blocks' linears and of the whole model, perplexity before and after with their ratio, KL divergence, relative error, seconds."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    for column in (
        "bits per\nweight",
        "whole\nmodel",
        "data",
        "perplexity\nbefore",
        "\nafter",
        "ratio, 95%\ninterval",
        "KL diver-\ngence",
    ):
        table.add_column(Text(column), justify="right")
    for column in ("relative\nerror", "seconds"):
        table.add_column(Text(column), justify="right")
    for results in all_results:
        corpora = results["perplexity"] or {"-": {}}
        for row, (name, perplexity) in enumerate(corpora.items()):
            first, bounds = row == 0, perplexity.get("ratio_ci95")
            table.add_row(
                results["method"] if first else "",
                f"{results['bits_per_weight']:.3f}" if first else "",
                _number(results.get("model_bits_per_weight"), 3) if first else "",
                name,
                _number(perplexity.get("fp"), 3),
                _number(perplexity.get("quantized"), 3),
                f"{bounds[0]:.3f}-{bounds[1]:.3f}" if bounds else "-",
                _number(results["fidelity"].get(name, {}).get("kl_divergence"), 4),
                _number(results.get("mean_relative_error"), 4) if first else "",
                _number(results["seconds"].get("total"), 1) if first else "",
            )
    return table


def show_results(title: str, finished: Sequence[dict[str, Any]], console: Console, linears: bool) -> None:
    """One table, one row a method; with ``linears`` a second one; seconds and memory; where everything is."""
    console.print()
    console.print(results_table(finished, title))
    if any(results["zero_shot"] for results in finished):
        console.print(tasks_table(finished))
    show_published(title.split(":")[0], finished, console)
    for results in finished:
        path = Path(results["run_dir"])
        if linears and (path / "journal.jsonl").exists():
            console.print(
                linears_table([json.loads(line) for line in (path / "journal.jsonl").read_bytes().splitlines()])
            )
        verdicts, seconds, peak = results["verdicts"], results["seconds"], results["peak_bytes"]
        stages = ", ".join(
            f"{k} {_number(seconds.get(k), 1)}" for k in STAGES if seconds.get(k, 0) > 0 or k not in ("learn", "tasks")
        )
        memory = f"{_number(peak['host'], 2, 1e-9)} GB host"
        if peak["device"]:
            memory += f", {_number(peak['device'], 2, 1e-9)} GB device"
        method = Text(printable(results["method"]), style="bold")
        console.print(method, f": seconds: {stages}; peak memory {memory}", sep="")
        if any(verdicts[v] for v in ("look", "bad")):
            console.print(f"  linears: {verdicts['ok']} ok, {verdicts['look']} to look at, {verdicts['bad']} bad")
        for line in _remarks(results):
            console.print(f"  {line}")
        console.print(f"  {path / 'results.json'}", soft_wrap=True)


def show_finished(
    args: argparse.Namespace,
    title: str,
    finished: Sequence[dict[str, Any]],
    together: Path | None,
    save: Path | None,
    console: Console,
) -> None:
    """What a command ends with: the results, the report unless --no-report, and where the checkpoint is."""
    show_results(title, finished, console, args.compute_quantization_recon_error)
    if not args.no_report:
        show_report(finished, together, console)
    if save:
        console.print(f"checkpoint: {save}", soft_wrap=True)


def show_report(finished: Sequence[dict[str, Any]], together: Path | None, console: Console) -> None:
    """Write a page for every run and one for all of several, in ``together``; say where it is."""
    from quant.report.page import write_pages

    try:
        page = write_pages([Path(results["run_dir"]) for results in finished], together)
    except InputError as error:  # somebody's files are where it goes; the numbers are there without it
        console.print(f"no report: {error}", soft_wrap=True)
        return
    console.print(f"report: {page}", soft_wrap=True)


def show_published(model: str, finished: Sequence[dict[str, Any]], console: Console) -> None:
    """Published figures of the same model and setting beside ours; nothing where there are none."""
    entries = [entry for results in finished for entry in published_figures(model, results)]
    if not entries:
        return
    table = Table(title="published", title_justify="left", header_style="bold", box=SIMPLE_HEAD)
    for column in ("data", "setting", "method", "published", "ours", "source"):
        table.add_column(column, justify="right" if column in ("published", "ours") else "left")
    seen = set()
    for entry in entries:
        row = (
            entry["data"],
            entry["setting"],
            entry["method"],
            f"{entry['perplexity']:.2f}",
            _number(entry["ours"], 2),
            entry["source"],
        )
        if row not in seen:
            table.add_row(*row)
        seen.add(row)
    console.print(table)
    if not all(entry["same_protocol"] for entry in entries):
        console.print("  ours was measured on other windows than the published figures")


def _remarks(results: dict[str, Any]) -> list[str]:
    """What the numbers of a table do not show: levels that are no power of two, matrices kept beside the weights."""
    lines, entropy = [], results["entropy_bits"]
    if entropy is not None and entropy != int(entropy) and results.get("avg_bits") is None:
        lines.append(f"codes of {2**entropy:.0f} levels: {entropy:.2f} bits of entropy, stored in {math.ceil(entropy)}")
    if share := results.get("outlier_share"):
        lines.append(f"{share:.2%} of the weights are kept as outliers (counted in bits per weight)")
    if packed := results.get("packed_bytes"):
        counted = results["quantized_bytes"]
        lines.append(
            f"evaluated with packed weights: {packed / 1e6:.2f} MB in memory, {_number(counted, 2, 1e-6)} MB counted"
        )
    logs = [*results["learning"], results.get("rotation") or {}]
    online = sum(log.get("online_parameters") or 0 for log in logs)
    flops = sum(log.get("online_flops") or 2 * (log.get("online_parameters") or 0) for log in logs)
    if online:
        lines.append(
            f"online matrices: {online} numbers in 16 bits (counted in bits per weight), {flops} flops a token"
        )
    return lines


def tasks_table(all_results: Sequence[dict[str, Any]]) -> Table:
    """Accuracy before and after on every task, with the interval of the paired difference; chance is marked."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    for column in (
        "task",
        "metric",
        "items",
        "before",
        "after",
        "standard\nerror",
        "difference,\n95% interval",
        "chance",
    ):
        table.add_column(Text(column), justify="left" if column in ("task", "metric") else "right")
    for results in all_results:
        for row, (name, task) in enumerate(results["zero_shot"].items()):
            bounds = task["difference_ci95"]
            table.add_row(
                results["method"] if row == 0 else "",
                name,
                task["metric"],
                str(task["items"]),
                _number(task["fp"], 3),
                _number(task["quantized"], 3),
                _number(task["stderr"], 3),
                f"{bounds[0]:+.3f} to {bounds[1]:+.3f}" if bounds else "-",
                _number(task["chance"], 2) + (" (at chance)" if task["at_chance"] else ""),
            )
    return table


def comparison_table(records: Sequence[dict[str, Any]], title: str) -> Table:
    """Errors of several methods on the same linears: mean, worst, against round-to-nearest; bits; seconds."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    for column in (
        "bits per\nweight",
        "relative error\nmean",
        "\nworst",
        "of rtn's,\nmean",
        "best for\nlinears",
        "seconds",
    ):
        table.add_column(Text(column), justify="right")
    methods = list(dict.fromkeys(r["method"] for r in records))
    lowest: dict[Any, float] = {}
    for r in records:
        where = (r["block"], r["name"])
        lowest[where] = min(lowest.get(where, r["relative_error"]), r["relative_error"])
    for method in methods:
        own = [r for r in records if r["method"] == method]
        errors, bits = [r["relative_error"] for r in own], sum(r["storage_bits"] for r in own)
        ratios = [r["relative_error"] / r["relative_error_rtn"] for r in own if r["relative_error_rtn"] > 0]
        table.add_row(
            method,
            f"{bits / sum(r['shape'][0] * r['shape'][1] for r in own):.3f}",
            f"{sum(errors) / len(errors):.5f}",
            f"{max(errors):.5f}",
            f"{sum(ratios) / max(1, len(ratios)):.3f}",
            str(sum(r["relative_error"] == lowest[r["block"], r["name"]] for r in own)),
            f"{sum(r['seconds'] for r in own):.1f}",
        )
    return table


def difference_table(title: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """What differs between runs: a row an entry, a column a run."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, *values in rows:
        table.add_row(name, *("-" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in values))
    return table


def linears_table(records: Sequence[dict[str, Any]]) -> Table:
    """Relative error of every linear, for ``--compute-quantization-recon-error``."""
    table = Table(title="relative error of every linear", title_justify="left", header_style="bold")
    for column in ("block", "linear", "method", "error", "rtn", "bits/weight", "verdict"):
        table.add_column(column, justify="left" if column in ("linear", "method", "verdict") else "right")
    for r in records:
        error, nearest = f"{r['relative_error']:.5f}", f"{r['relative_error_rtn']:.5f}"
        table.add_row(
            str(r["block"]), r["name"], r["method"], error, nearest, f"{r['bits_per_weight']:.3f}", r["verdict"]
        )
    return table


def loadability_table(kind: str, rows: Sequence[tuple[str, bool, str, str]]) -> Table:
    """Which software takes the checkpoint, and whether that was tried."""
    table = Table(
        title=f"will a {kind} checkpoint of this load?", title_justify="left", header_style="bold", box=SIMPLE_HEAD
    )
    table.add_column("in")
    table.add_column("")
    table.add_column("known from")
    table.add_column("why not, or what it needs", overflow="fold")
    for runtime, loads, why, known in rows:
        table.add_row(runtime, "yes" if loads else "no", known, why)
    return table


def _number(value: float | None, digits: int, times: float = 1) -> str:
    return "-" if value is None else f"{value * times:.{digits}f}"
