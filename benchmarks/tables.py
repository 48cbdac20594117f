"""Markdown tables of what is finished: the runs of a sweep, or layers compared by model_quantizer.py --compare-layers.

    python scripts/sweep.py scripts/sweeps/tables-demo.yaml
    python -m benchmarks.tables runs/sweeps/tables-demo --out benchmarks/results/demo.md
    benchmarks/layers.sh linears TEXT MODEL...                      # compares layers and comes back here

A method is shown with those of its flags that other rows of the same method and setting do not have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measuring import machine_line, show, table, version_line, write
from quant.core import env
from quant.core.errors import InputError
from quant.core.files import read_json
from quant.core.text import markdown_cell
from quant.report.page import Run, open_run

BASES = ("rtn", "gptq", "omniquant")  # what a method is counted against, where the table has them
IN_SETTING = ("model", "seed", "quantization-method", "method", "solver")  # flags that a row's label does not repeat


@dataclass
class Row:
    """A finished run, the flags of its row, its setting (W3A16g64), and its method with the flags that set it apart."""

    run: Run
    flags: Mapping[str, str]
    setting: str = ""
    label: str = ""

    @property
    def start(self) -> str:
        """The first cells of a table's row."""
        return f"| {markdown_cell(self.run.model)} | {self.setting} | {markdown_cell(self.label)} |"

    @property
    def ratios(self) -> list[float]:
        """Perplexity over that of full precision, of every corpus."""
        return [scores["quantized"] / scores["fp"] for scores in self.run.results["perplexity"].values()]

    @property
    def errors(self) -> list[float]:
        """Relative error of every linear."""
        return [record["relative_error"] for record in self.run.records]


def rows_of(sweep: Mapping[str, Any]) -> list[Row]:
    """The finished rows of a sweep, with their labels."""
    rows = [Row(open_run(Path(r["run_dir"])), r["flags"]) for r in sweep["rows"] if r["status"] == "done"]
    for row in rows:
        r = row.run.results
        row.setting = f"W{r['wbits']}A{r['abits']}" + (f"g{r['group_size']}" if r["group_size"] > 0 else "")
    models, settings = (
        list(dict.fromkeys(names)) for names in ((r.run.model for r in rows), (r.setting for r in rows))
    )
    rows.sort(key=lambda row: (models.index(row.run.model), settings.index(row.setting)))
    for row in rows:
        method = row.run.results["method"]
        peers = [o.flags for o in rows if (o.setting, o.run.results["method"]) == (row.setting, method)]
        own = {k: v for k, v in row.flags.items() if k not in IN_SETTING and len({f.get(k) for f in peers}) > 1}
        row.label = " ".join([method, *(f"--{k} {v}".strip() for k, v in own.items())])
    return rows


def bases_of(rows: Iterable[Row]) -> dict[str, str]:
    """Labels to count against, by method: the first row of each."""
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.run.results["method"], row.label)
    return {name: first[name] for name in BASES if name in first}


def mean_rows(rows: Sequence[Row], bases: Mapping[str, str]) -> list[str]:
    """Means over models, and for how many models a method's perplexity is below that of each base."""
    lines = []
    for setting, label in dict.fromkeys((row.setting, row.label) for row in rows):
        by_label = {name: {r.run.model: mean(r.ratios) for r in rows if (r.setting, r.label) == (setting, name)}
                    for name in (label, *bases.values())}  # fmt: skip
        own = [row for row in rows if (row.setting, row.label) == (setting, label)]
        kl = mean(f["kl_divergence"] for row in own for f in row.run.results["fidelity"].values())
        counts = " | ".join(below(by_label[label], by_label[base]) for base in bases.values())
        error = mean(row.run.results["mean_relative_error"] for row in own)
        lines.append(
            f"| {setting} | {label} | {mean(by_label[label].values()):.4f} | {kl:.5f} | {error:.5f} | {counts} |"
        )
    return lines


def below(own: Mapping[Any, float], base: Mapping[Any, float]) -> str:
    """For how many of the keys that both have the value is lower."""
    shared = own.keys() & base.keys()
    return f"{sum(own[key] < base[key] for key in shared)} of {len(shared)}" if shared else "-"


def quality_row(row: Row, corpus: str) -> str:
    """A run on a corpus."""
    r = row.run.results
    scores, learned = r["perplexity"][corpus], [log["loss_end"] / log["loss_start"] for log in r["learning"]]
    low, high = scores["ratio_ci95"]
    return (
        f"{row.start} {r['bits_per_weight']:.3f} | {markdown_cell(corpus)} | {scores['fp']:.3f} | {scores['quantized']:.3f} "
        f"| {low:.4f}-{high:.4f} | {r['fidelity'][corpus]['kl_divergence']:.5f} | {r['mean_relative_error']:.5f} "
        f"| {f'{mean(learned):.3f}' if learned else '-'} |"
    )


def error_row(row: Row, rows: Sequence[Row], bases: Mapping[str, str]) -> str:
    """Mean relative error of a run's linears, and for how many of them it is below each base."""
    peers = {o.label: o.errors for o in rows if (o.run.model, o.setting) == (row.run.model, row.setting)}
    own = dict(enumerate(row.errors))
    counts = (below(own, dict(enumerate(peers.get(base, ())))) for base in bases.values())
    return f"{row.start} {mean(row.errors):.5f} | {' | '.join(counts)} |"


def seconds_row(row: Row) -> str:
    """Seconds by stage with their shares of the quantization itself, and peak memory."""
    s, peak = row.run.results["seconds"], row.run.results["peak_bytes"]
    stages = ("forward", "gram", "learn", "solve")
    whole = sum(s[stage] for stage in stages)
    shares = " | ".join(f"{s[stage]:.2f} ({s[stage] / whole:.0%})" for stage in stages)
    memory = f"{peak['host'] / 1e9:.2f} | {peak['device'] / 1e9:.2f}"
    return f"{row.start} {s['load']:.1f} | {shares} | {s['evaluate']:.1f} | {memory} |"


def sweep_lines(directory: Path) -> list[str]:
    """The tables of a sweep."""
    sweep = read_json(directory / "sweep.json")
    rows = rows_of(sweep)
    if not rows:
        raise InputError(f"{directory}: no row is finished")
    shared = set.intersection(*(set(row.flags.items()) for row in rows))
    flags = " ".join(f"--{k} {v}".strip() for k, v in rows[0].flags.items() if (k, v) in shared and k != "command")
    manifest = rows[0].run.manifest
    shape = "{} windows of {} tokens".format
    corpora = ", ".join(f"{name} {shape(*data['shape'])}" for name, data in manifest["evaluation"].items())
    bases = bases_of(rows)
    counts = " | ".join(f"below {name}" for name in bases)
    seconds = "load s | forward s | gram s | learn s | solve s | evaluate s | host GB | device GB"
    runs = "| model | setting | method |"
    return [
        f"# {markdown_cell(directory.name)}: {len(rows)} runs", "",
        f"`python scripts/sweep.py {sweep['table']}`, every row: `{flags}`. Calibration {manifest['calibration']['name']}, "
        f"{shape(*manifest['calibration']['shape'])}, seed {manifest['seed']}; perplexity of {corpora}, without overlap; the "
        "interval is that of the ratio to full precision. Setting: bits of weights and activations, columns of a group. "
        f"{machine_line(manifest['hardware'], manifest['versions'])}.", "",
        "Means over models and corpora, and on how many models the perplexity is lower:", "",
        *table(f"| setting | method | perplexity ratio | KL divergence | relative error | {counts} |", mean_rows(rows, bases)),
        *table(f"{runs} bits per weight | data | ppl before | ppl after | ratio, 95% interval | KL divergence "
               "| mean relative error | loss, end / start |",
               (quality_row(row, corpus) for row in rows for corpus in row.run.results["perplexity"])),
        "## Relative error of the linears", "",
        "For how many linears it is lower than with each base. Every method is measured on the activations of its own "
        "quantized prefix.", "",
        *table(f"{runs} mean relative error | {counts} |", (error_row(row, rows, bases) for row in rows)),
        "## Seconds and peak memory", "",
        "forward: calibration passes through the blocks; gram: accumulation of x xᵀ; learn: training; solve: the solvers, with "
        "the error measurements of the journal. Shares are of the sum of these. Rows that were evaluated together have "
        "equal shares of evaluate. Host memory is the process's peak so far.", "",
        *table(f"{runs} {seconds} |", map(seconds_row, rows)),
    ]  # fmt: skip


def layer_lines(directory: Path, about: str) -> list[str]:
    """A table for every model and width of <model>/<width>/<variant>/layers.json: linears down, methods across."""
    tables: dict[tuple[str, int], dict[str, dict[tuple[int, str], float]]] = {}
    for path in sorted(directory.glob("*/*/*/layers.json")):
        for r in json.loads(path.read_text()):
            columns = tables.setdefault((path.parts[-4], r["bits"]), {})
            column = columns.setdefault(f"{r['method']} {path.parts[-2]}", {})
            column[r["block"], r["name"]] = r["relative_error"]
    if not tables:
        raise InputError(f"{directory} has neither a sweep.json nor <model>/<width>/<variant>/layers.json")
    lines = [f"# {markdown_cell(directory.name)}: every linear", "",
             f"`benchmarks/layers.sh {directory.name}`, {about}. Relative error ‖(W-Ŵ)X‖²/‖WX‖², every method from the same "
             f"full-precision statistics. {version_line(env.versions())}.", ""]  # fmt: skip
    for (model, bits), columns in tables.items():
        cells = [(f"{block} | {name}", [f"{column[block, name]:.5f}" for column in columns.values()])
                 for block, name in next(iter(columns.values()))]  # fmt: skip
        cells.append((" | mean", [f"{mean(column.values()):.5f}" for column in columns.values()]))
        for base in columns:
            cells.append((f" | below {base}", [below(column, columns[base]) for column in columns.values()]))
        rows = (f"| {start} | {' | '.join(own)} |" for start, own in cells)
        lines += [
            f"## {markdown_cell(model)}, {bits} bits",
            "",
            *table(f"| block | linear | {' | '.join(columns)} |", rows),
        ]
    return lines


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of a sweep, or of compared layers")
    parser.add_argument("--out", type=Path, help="write the tables here as well")
    parser.add_argument("--about", default="", help="compared layers: what they were calibrated on")
    args = parser.parse_args()
    is_sweep = (args.directory / "sweep.json").exists()
    lines = sweep_lines(args.directory) if is_sweep else layer_lines(args.directory, args.about)
    show(*lines)
    write(lines, args.out)


if __name__ == "__main__":
    main()
