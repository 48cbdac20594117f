"""Markdown tables of what is finished: the runs of a sweep, or layers compared by model_quantizer.py --compare-layers.

    python scripts/sweep.py scripts/sweeps/tables-demo.yaml
    python -m benchmarks.tables runs/sweeps/tables-demo --out benchmarks/results/demo.md
    benchmarks/layers.sh linears TEXT MODEL...                      # compares layers and comes back here

A method is shown with those of its flags that other rows of the same method and setting do not have.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.measuring import machine_line, show, table, version_line, write
from quant.core import env
from quant.core.errors import InputError
from quant.core.files import read_json
from quant.core.names import BLOCK_STAGES
from quant.core.text import markdown_cell
from quant.report.runs import Run, open_run

BASES = ("rtn", "gptq", "omniquant")  # what a method is counted against, where the table has them
NOT_IN_LABEL = ("model", "quantization-method", "method", "solver")


@dataclass
class Row:
    """A finished run, the flags of its row, its setting (W3A16g64), and its method with the flags that set it apart."""

    run: Run
    flags: Mapping[str, str]
    setting: str = ""
    label: str = ""

    def __post_init__(self) -> None:
        r = self.results = self.run.results
        self.setting = f"W{r['wbits']}A{r['abits']}" + (f"g{r['group_size']}" if r["group_size"] > 0 else "")
        self.start = {"model": self.run.model, "setting": self.setting}
        self.errors = {(e["block"], e["name"]): e["relative_error"] for e in self.run.records}


def rows_of(sweep: Mapping[str, Any]) -> list[Row]:
    """The finished rows of a sweep, with their labels, model by model and setting by setting."""
    rows = [Row(open_run(Path(r["run_dir"])), r["flags"]) for r in sweep["rows"] if r["status"] == "done"]
    for row in rows:
        method = row.results["method"]
        peers = [o.flags for o in rows if (o.setting, o.results["method"]) == (row.setting, method)]
        own = {k: v for k, v in row.flags.items() if k not in NOT_IN_LABEL and len({f.get(k) for f in peers}) > 1}
        row.label = " ".join([method, *(f"--{k} {v}".strip() for k, v in own.items())])
        row.start["method"] = row.label
    order = {name: n for n, name in enumerate(dict.fromkeys([r.run.model for r in rows] + [r.setting for r in rows]))}
    return sorted(rows, key=lambda row: (order[row.run.model], order[row.setting]))


def counts(own: Mapping[Any, float], others: Mapping[str, Mapping[Any, float]]) -> dict[str, str]:
    """For how many of the keys that both have the value is below that of each base."""
    shared = {base: own.keys() & values.keys() for base, values in others.items()}
    return {f"below {base}": f"{sum(own[key] < others[base][key] for key in keys)} of {len(keys)}" if keys else "-"
            for base, keys in shared.items()}  # fmt: skip


def mean_records(rows: Sequence[Row], bases: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Means over models and corpora, and on how many models a method's perplexity is below that of each base."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.setting, row.label), []).append(row)
    ratios = {key: {row.run.model: mean(s["quantized"] / s["fp"] for s in row.results["perplexity"].values()) for row in own}
              for key, own in groups.items()}  # fmt: skip
    for (setting, label), own in groups.items():
        kl = mean(f["kl_divergence"] for row in own for f in row.results["fidelity"].values())
        yield {
            "setting": setting,
            "method": label,
            "perplexity ratio": f"{mean(ratios[setting, label].values()):.4f}",
            "KL divergence": f"{kl:.5f}",
            "relative error": f"{mean(row.results['mean_relative_error'] for row in own):.5f}",
        } | counts(ratios[setting, label], {name: ratios.get((setting, base), {}) for name, base in bases.items()})


def quality_records(row: Row) -> Iterator[dict[str, str]]:
    """A run on every corpus."""
    r = row.results
    learned = [log["loss_end"] / log["loss_start"] for log in r["learning"]]
    for corpus, scores in r["perplexity"].items():
        yield row.start | {
            "bits per weight": f"{r['bits_per_weight']:.3f}",
            "data": corpus,
            "ppl before": f"{scores['fp']:.3f}",
            "ppl after": f"{scores['quantized']:.3f}",
            "ratio, 95% interval": "{:.4f}-{:.4f}".format(*scores["ratio_ci95"]),
            "KL divergence": f"{r['fidelity'][corpus]['kl_divergence']:.5f}",
            "mean relative error": f"{r['mean_relative_error']:.5f}",
            "loss, end / start": f"{mean(learned):.3f}" if learned else "-",
        }


def error_record(row: Row, rows: Sequence[Row], bases: Mapping[str, str]) -> dict[str, str]:
    """Mean relative error of a run's linears, and for how many of them it is below each base."""
    peers = {o.label: o.errors for o in rows if (o.run.model, o.setting) == (row.run.model, row.setting)}
    others = {name: peers.get(base, {}) for name, base in bases.items()}
    return row.start | {"mean relative error": f"{mean(row.errors.values()):.5f}"} | counts(row.errors, others)


def seconds_record(row: Row) -> dict[str, str]:
    """Seconds by stage with their shares of the quantization itself, and peak memory."""
    s, peak = row.results["seconds"], row.results["peak_bytes"]
    whole = sum(s.get(stage, 0.0) for stage in BLOCK_STAGES)
    stages = {f"{stage} s": f"{s.get(stage, 0.0):.2f} ({s.get(stage, 0.0) / whole:.0%})" for stage in BLOCK_STAGES}
    memory = {f"{place} GB": f"{peak[place] / 1e9:.2f}" for place in ("host", "device")}
    return row.start | {"load s": f"{s['load']:.1f}"} | stages | {"evaluate s": f"{s['evaluate']:.1f}"} | memory


def sweep_lines(directory: Path) -> list[str]:
    """The tables of a sweep."""
    sweep = read_json(directory / "sweep.json")
    rows = rows_of(sweep)
    if not rows or not all(row.results["fidelity"] for row in rows):
        raise InputError(f"{directory}: no row is finished, or one was not evaluated beside full precision")
    first = {row.results["method"]: row.label for row in reversed(rows)}
    bases = {name: first[name] for name in BASES if name in first}
    shared = set.intersection(*(set(row.flags.items()) for row in rows))
    flags = " ".join(f"--{k} {v}".strip() for k, v in rows[0].flags.items() if (k, v) in shared and k != "command")
    manifest, windows = rows[0].run.manifest, "{} windows of {} tokens".format
    corpora = ", ".join(f"{name} {windows(*data['shape'])}" for name, data in manifest["evaluation"].items())
    return [
        f"# {markdown_cell(directory.name)}: {len(rows)} runs", "",
        f"`python scripts/sweep.py {sweep['table']}`, every row: `{flags}`. Calibration {manifest['calibration']['name']}, "
        f"{windows(*manifest['calibration']['shape'])}, seed {manifest['seed']}; perplexity of {corpora}, without overlap; the "
        "interval is that of the ratio to full precision. Setting: bits of weights and activations, columns of a group. "
        f"{machine_line(manifest['hardware'], manifest['versions'])}.", "",
        "Means over models and corpora, and on how many models the perplexity is lower:", "",
        *table(mean_records(rows, bases)),
        *table(record for row in rows for record in quality_records(row)),
        "## Relative error of the linears", "",
        "For how many linears it is lower than with each base. Every method is measured on the activations of its own "
        "quantized prefix.", "",
        *table(error_record(row, rows, bases) for row in rows),
        "## Seconds and peak memory", "",
        "forward: calibration passes through the blocks; gram: accumulation of x xᵀ; learn: training; solve: the solvers, with "
        "the error measurements of the journal. Shares are of the sum of these. Rows that were evaluated together have "
        "equal shares of evaluate. Host memory is the process's peak so far.", "",
        *table(map(seconds_record, rows)),
    ]  # fmt: skip


def layer_lines(directory: Path, about: str) -> list[str]:
    """A table for every model and width of <model>/<width>/<variant>/layers.json: linears down, methods across."""
    tables: dict[tuple[str, int], dict[str, dict[tuple[int, str], float]]] = {}
    for path in sorted(directory.glob("*/*/*/layers.json")):
        for r in json.loads(path.read_text(encoding="utf-8")):
            columns = tables.setdefault((path.parts[-4], r["bits"]), {})
            columns.setdefault(f"{r['method']} {path.parts[-2]}", {})[r["block"], r["name"]] = r["relative_error"]
    if not tables:
        raise InputError(f"{directory} has neither a sweep.json nor <model>/<width>/<variant>/layers.json")
    lines = [f"# {markdown_cell(directory.name)}: every linear", "",
             f"`benchmarks/layers.sh {directory.name}`, {about}. Relative error ‖(W-Ŵ)X‖²/‖WX‖², every method from the same "
             f"full-precision statistics. {version_line(env.versions())}.", ""]  # fmt: skip
    for (model, bits), columns in tables.items():
        records = [{"block": str(block), "linear": name} | {label: f"{own[block, name]:.5f}" for label, own in columns.items()}
                   for block, name in next(iter(columns.values()))]  # fmt: skip
        records.append({"linear": "mean"} | {label: f"{mean(own.values()):.5f}" for label, own in columns.items()})
        below = {label: counts(own, columns) for label, own in columns.items()}
        for base in (f"below {label}" for label in columns):
            records.append({"linear": base} | {label: below[label][base] for label in columns})
        lines += [f"## {markdown_cell(model)}, {bits} bits", "", *table(records)]
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
    from quant.cli.errors import exit_code_of

    sys.exit(exit_code_of(main))
