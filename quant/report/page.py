"""A page a person can look at, for one run or for many; and what differs between runs.

    python -m quant.report RUN              RUN/report.html, report.csv and *.png beside it (a run writes them itself)
    python -m quant.report RUN RUN --out DIR    one page for all of them: quality against bits
    python -m quant.report compare RUN RUN      configuration, numbers and layers that differ

The page is one file without scripts or pictures from elsewhere. Every number in it is one of results.json or of the
journal, rounded.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from quant.core.errors import InputError
from quant.core.files import check_plain_file, write_owned
from quant.core.text import brief, csv_cell, printable
from quant.report.published import method_of, published
from quant.run.directory import Record, RunDirectory, check_manifest

TEMPLATE = Path(__file__).with_name("page.html.j2")
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK = "#010203"  # stands for the page's text colour in plots, which follows light and dark
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8860b")  # Okabe and Ito
MARKERS = "osD^vPX*"
STAGES = ("load", "forward", "gram", "learn", "solve", "evaluate", "tasks", "export")
LOOK_ABOVE = 0.1
BARS, SCORED = 24, 12  # runs that one plot of seconds, and one of scores, can show
LONGEST, IN_LEGEND = 40, 18  # letters of a name in a plot, and in its legend


@dataclass(frozen=True)
class Run:
    """A finished run as it lies on disk."""

    path: Path
    manifest: Record
    results: Record
    records: list[Record]

    @property
    def model(self) -> str:
        """Last part of the model's name."""
        return Path(self.manifest["model"]["id"]).name

    @property
    def label(self) -> str:
        """Method with its width."""
        r = self.results
        acts = f"A{r['abits']}" if r.get("abits", 16) < 16 else ""
        group = f" g{r['group_size']}" if r["group_size"] > 0 else ""
        return f"{method_of(r)} W{r['wbits']}{acts}{group}"

    @property
    def score(self) -> float | None:
        """Mean score over its tasks, of the quantized model where there is one; None without tasks."""
        found = [score_of(entry) for entry in self.results["zero_shot"].values()]
        return sum(found) / len(found) if found else None


def open_run(path: Path) -> Run:
    """A run directory. Raises InputError where it is none, is not finished, or is damaged."""
    directory = RunDirectory(path)
    manifest = directory.read("manifest.json") if path.is_dir() else None
    if manifest is None:
        raise InputError(f"{path} is not a run directory (it has no manifest.json)")
    check_manifest(manifest, path / "manifest.json")
    results = directory.read("results.json")
    if results is None:
        done = len(list((path / "blocks").glob("*.safetensors")))
        asked = manifest["configuration"].get("blocks", "?")
        raise InputError(
            f"{path} is not finished: {done} of {asked} blocks are there and no results; run its command again"
        )
    journal = path / "journal.jsonl"
    check_plain_file(journal)
    try:
        records = [json.loads(line) for line in journal.open()] if journal.exists() else []
    except json.JSONDecodeError as error:
        raise InputError(f"{journal}, line {error.lineno}: damaged; run the command again to rebuild it") from error
    return Run(path, manifest, results, records)


def score_of(entry: Record) -> float:
    """A task's score: of the quantized model, or of full precision where that alone was measured."""
    value: float = entry["quantized"] if entry["quantized"] is not None else entry["fp"]
    return value


def reason(record: Record) -> str:
    """Why a linear has its verdict, in words."""
    error, nearest = record["relative_error"], record["relative_error_rtn"]
    if record["verdict"] == "ok":
        return ""
    if not math.isfinite(error) or error >= 1:
        return "nothing of the output is left"
    if record["verdict"] == "bad":
        return (
            f"{error / nearest - 1:.0%} worse than rounding to nearest" if nearest else "worse than rounding to nearest"
        )
    return f"relative error above {LOOK_ABOVE:g}"


# Plots


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure whose text is the page's, closed at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    plain: Any = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11, "axes.spines.top": False,
             "axes.spines.right": False, "font.family": "sans-serif", "axes.titlesize": 11, "axes.titlelocation": "left"}  # fmt: skip
    with mpl.rc_context(ink | plain):
        yield Figure(figsize=(width, height), layout="constrained")


def _drawn(figure: Any, about: str) -> tuple[str, bytes]:
    """(inline SVG that follows the page's colours and width, PNG on white)."""
    svg, png = io.StringIO(), io.BytesIO()
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # else every file lays the figure out again
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(png, format="png", dpi=120, facecolor="white")
    return _inline(svg.getvalue(), about), png.getvalue()


def _inline(drawn: str, about: str) -> str:
    """An SVG as part of a page: it follows the page's text colour and width, says what it is about, and its ids are its
    own among the page's pictures. It is built as elements, so that no name in it can become one."""
    root = ElementTree.fromstring(drawn)
    for extra in root.findall(f"{{{SVG}}}metadata"):
        root.remove(extra)
    for size in ("width", "height"):  # the view box decides the shape, the page the width
        del root.attrib[size]
    own = hashlib.sha256(about.encode()).hexdigest()[:8]
    for element in root.iter():
        for name, value in element.attrib.items():
            value = re.sub(r"url\(#", f"url(#{own}-", value.replace(INK, "currentColor"))
            if name == "id":
                value = f"{own}-{value}"
            elif name == f"{{{XLINK}}}href":
                value = value.replace("#", f"#{own}-", 1)
            element.set(name, value)
    root.attrib |= {"role": "img", "aria-label": about}
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _name(text: str, most: int = LONGEST) -> str:
    """A name from outside as a plot can show it: dollars are no formula."""
    return brief(printable(text), most).replace("$", r"\$")


def perplexity_plot(runs: Sequence[Run], corpus: str) -> tuple[str, bytes] | None:
    """Perplexity over full precision's against stored bits; None without such numbers."""

    def ratio(run: Run) -> float | None:
        scores = run.results["perplexity"].get(corpus, {})
        return scores["quantized"] / scores["fp"] if scores.get("fp") and scores.get("quantized") else None

    about = f"Perplexity on {printable(corpus)} relative to full precision against stored bits per weight"
    return _against_bits(runs, ratio, 1.0, "perplexity / full precision", about)


def scores_plot(runs: Sequence[Run]) -> tuple[str, bytes] | None:
    """Mean score over the tasks less full precision's, against stored bits; None without such numbers."""

    def difference(run: Run) -> float | None:
        found = [entry["difference"] for entry in run.results["zero_shot"].values()]
        return sum(found) / len(found) if found and None not in found else None

    about = "Mean score of the tasks less that of full precision against stored bits per weight"
    return _against_bits(runs, difference, 0.0, "mean score - full precision", about)


def _looks(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Marker and colour of every method, the same in all pictures of a page."""
    methods = dict.fromkeys(method_of(run.results) for run in runs)
    return {method: (MARKERS[i % 8], COLOURS[i % 8]) for i, method in enumerate(methods)}


def _against_bits(
    runs: Sequence[Run], value: Callable[[Run], float | None], full: float, name: str, about: str
) -> tuple[str, bytes] | None:
    """A number against stored bits: a panel a model, a line a method, mean over seeds; ``full``: full precision's.

    None for fewer than two points.
    """
    points: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for run in runs:
        found = value(run)
        if found is not None:
            of_method = points.setdefault(run.model, {}).setdefault(method_of(run.results), {})
            of_method.setdefault(run.label, []).append((run.results["bits_per_weight"], found))
    looks = _looks(runs)
    if sum(len(labels) for own in points.values() for labels in own.values()) < 2:
        return None
    columns = min(3, len(points))
    rows = -(-len(points) // columns)
    with _figure(7.2 if columns < 3 else 9.6, 3.6 * rows + 0.4) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (model, own) in zip(panels, points.items(), strict=False):
            for method, (marker, colour) in looks.items():
                means = sorted(
                    tuple(sum(v) / len(v) for v in zip(*seeds, strict=True)) for seeds in own.get(method, {}).values()
                )
                if means:
                    x, y = zip(*means, strict=True)
                    axes.plot(
                        x, y, marker=marker, color=colour, label=_name(method, IN_LEGEND), linewidth=1.2, markersize=5
                    )
            axes.axhline(full, color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(_name(model) if len(points) > 1 else "")
            axes.set_xlabel("stored bits per weight")
            if full and max(v for labels in own.values() for seeds in labels.values() for _, v in seeds) > 2:
                axes.set_yscale("log", base=2)
                axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25)
        for axes in panels[len(points) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel(name)
        handles = {
            label: h
            for axes in panels[: len(points)]
            for h, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(),
            handles.keys(),
            frameon=False,
            fontsize=9,
            ncols=min(5, len(handles)),
            loc="outside upper left",
        )
        return _drawn(figure, about)


def accuracy_plot(runs: Sequence[Run]) -> tuple[str, bytes] | None:
    """Accuracy of every task before and after, with standard errors; None without tasks, or for more than SCORED runs
    (which their table shows)."""
    shown = [run for run in runs if run.results["zero_shot"]]
    if not 0 < len(shown) <= SCORED:
        return None
    tasks, looks = list(shown[0].results["zero_shot"]), _looks(runs)
    with _figure(7.2, 0.5 + 0.32 * len(tasks) * (len(shown) + 1)) as figure:
        axes = figure.subplots()
        rows, names = 0, []
        for task in tasks:
            entries = [(run, run.results["zero_shot"][task]) for run in shown if task in run.results["zero_shot"]]
            full = entries[0][1]["fp"]
            for run, entry in entries:
                marker, colour = looks[method_of(run.results)]
                axes.errorbar(
                    score_of(entry),
                    rows,
                    xerr=1.96 * entry["stderr"],
                    fmt=marker,
                    color=colour,
                    capsize=3,
                )
                names.append(_name(f"{task}: {run.label}"))
                rows += 1
            if full is not None:
                axes.plot([full, full], [rows - len(entries) - 0.4, rows - 0.6], color=INK, linewidth=1.5)
            if entries[0][1]["chance"]:
                chance = entries[0][1]["chance"]
                axes.plot([chance] * 2, [rows - len(entries) - 0.4, rows - 0.6], color=INK, linewidth=1, linestyle=":")
        axes.set_yticks(range(rows), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("score")
        axes.grid(axis="x", alpha=0.25)
        return _drawn(figure, "Zero-shot scores before and after")


def stages_plot(runs: Sequence[Run]) -> tuple[str, bytes]:
    """Seconds by stage of the BARS longest runs."""
    shown = sorted(runs, key=lambda run: -run.results["seconds"]["total"])[:BARS]
    with _figure(7.2, 0.9 + 0.36 * len(shown)) as figure:
        axes = figure.subplots()
        left = [0.0] * len(shown)
        for i, stage in enumerate(STAGES):
            seconds = [run.results["seconds"].get(stage, 0.0) for run in shown]
            if any(seconds):
                axes.barh(range(len(shown)), seconds, left=left, color=COLOURS[i % 8], label=stage, height=0.7)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        axes.set_yticks(range(len(shown)), [_name(run.label if len({r.model for r in shown}) == 1 else f"{run.model} {run.label}") for run in shown])  # fmt: skip
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.legend(frameon=False, fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        return _drawn(figure, "Seconds by stage")


def memory_plot(run: Run) -> tuple[str, bytes] | None:
    """Peak memory by stage, of the host and of the device if there is one; None for runs that did not measure it."""
    stages = dict(run.results.get("peak_bytes_by_stage", {}))
    if not run.results["zero_shot"]:
        stages.pop("tasks", None)
    if not stages:
        return None
    places = [where for where in ("host", "device") if any(peak[where] for peak in stages.values())]
    with _figure(7.2, 0.9 + 0.36 * len(stages)) as figure:
        axes = figure.subplots()
        for i, where in enumerate(places):
            height = 0.7 / len(places)
            centres = [n + (i - (len(places) - 1) / 2) * height for n in range(len(stages))]
            amounts = [peak[where] / 1e9 for peak in stages.values()]
            axes.barh(centres, amounts, height=height, color=COLOURS[i], label=where)
        axes.set_yticks(range(len(stages)), [_name(stage) for stage in stages])
        axes.invert_yaxis()
        axes.set_xlabel("peak memory, GB")
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        return _drawn(figure, "Peak memory by stage")


def losses_plot(run: Run) -> tuple[str, bytes] | None:
    """Loss of every block over its epochs, relative to its start; None where nothing was learned."""
    logs = run.results.get("learning") or []
    if not any(log["losses"] for log in logs):
        return None
    with _figure(7.2, 3.4) as figure:
        axes = figure.subplots()
        shades = [i / max(1, len(logs) - 1) for i in range(len(logs))]
        import matplotlib as mpl

        for block, log in enumerate(logs):
            values = [1.0, *(v / log["loss_start"] if v is not None else math.nan for v in log["losses"])]
            axes.plot(range(len(values)), values, color=mpl.colormaps["cividis"](0.1 + 0.8 * shades[block]), linewidth=1.4,
                      label=f"block {block}" if len(logs) <= 8 or block in (0, len(logs) - 1) else None)  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss / loss at the start")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, ncols=2)
        return _drawn(figure, "Loss of every block over its epochs")


def ranges_plot(run: Run) -> tuple[str, bytes] | None:
    """Input channels (median and largest root mean square) and weights (largest over root mean square, outliers kept)
    of every linear in order; None for journals without them."""
    records = [r for r in run.records if "input_rms" in r]
    if not records:
        return None
    names = list(dict.fromkeys(r["name"] for r in records))
    with _figure(7.2, 5.4) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for i, name in enumerate(names):
            own = [(n, r) for n, r in enumerate(records) if r["name"] == name]
            x, colour = [n for n, _ in own], COLOURS[i % 8]
            low, high = ([r["input_rms"][k] for _, r in own] for k in (0, 1))
            above.vlines(x, low, high, color=colour, linewidth=2, label=_name(name.split(".")[-1], IN_LEGEND))
            above.plot(x, high, MARKERS[i % 8], color=colour, markersize=4)
            below.plot(x, [r["weight_peak"] for _, r in own], MARKERS[i % 8], color=colour, markersize=5)
        for n, r in enumerate(records):
            if r["outlier_share"] > 0:
                below.annotate(f"{r['outlier_share']:.1%}", (n, r["weight_peak"]), fontsize=7, rotation=90,
                               xytext=(0, 5), textcoords="offset points", ha="center")  # fmt: skip
        above.set_yscale("log")
        above.set_ylabel("input channels: median\nto largest RMS")
        below.set_ylabel("largest weight / RMS\n(share kept as outliers)")
        below.set_xlabel("linear, in order of execution")
        below.margins(y=0.2)
        for axes in (above, below):
            axes.grid(axis="y", alpha=0.25)
        above.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        return _drawn(figure, "Ranges of inputs and weights of every linear")


# The page


def heat(records: Sequence[Record]) -> dict[str, Any] | None:
    """Relative errors as a table blocks x linears with a colour strength in 0..1 on a logarithmic scale."""
    if not records:
        return None
    names = list(dict.fromkeys(r["name"] for r in records))
    blocks = sorted({r["block"] for r in records})
    found = {(r["block"], r["name"]): r for r in records}
    errors = [r["relative_error"] for r in records if r["relative_error"] > 0 and math.isfinite(r["relative_error"])]
    low, high = (math.log(min(errors)), math.log(max(errors))) if errors else (0.0, 1.0)
    rows = []
    for block in blocks:
        cells = []
        for name in names:
            record = found.get((block, name))
            error = record["relative_error"] if record else 0.0
            strength = (math.log(error) - low) / max(high - low, 1e-9) if error > 0 and math.isfinite(error) else 0.0
            cells.append(
                {
                    "error": error if record else None,
                    "strength": round(strength, 3),
                    "verdict": record and record["verdict"],
                }
            )
        rows.append({"block": block, "cells": cells})
    return {"names": names, "rows": rows}


def _link(run: Run, out: Path) -> str:
    """Where a run lies, seen from the page's directory: its own page if it has one, else the directory. Quoted: a name is
    no scheme of a URL, and no query."""
    own = run.path / "report.html"
    return quote(os.fsencode(Path(os.path.relpath(own if own.exists() else run.path, out)).as_posix()))


def _shown(value: Any) -> Any:
    """A value where the template writes it: control characters of names are visible; Jinja escapes it then."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _script_source(script: str) -> str:
    """What a Content-Security-Policy calls an inline script of this text, which then is the only one that runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def page(runs: Sequence[Run], title: str, out: Path) -> tuple[str, dict[str, bytes]]:
    """The HTML of one run or of several, as it will lie in ``out``, and its plots as PNG by name."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    plots: dict[str, tuple[str, bytes]] = {}
    for corpus in dict.fromkeys(name for run in runs for name in run.results["perplexity"]):
        if drawn := perplexity_plot(runs, corpus):
            plots[f"perplexity-{corpus}"] = drawn
    if drawn := scores_plot(runs):
        plots["scores"] = drawn
    if drawn := accuracy_plot(runs):
        plots["zero-shot"] = drawn
    if len(runs) == 1:
        for name, plot in (("losses", losses_plot), ("ranges", ranges_plot), ("memory", memory_plot)):
            if drawn := plot(runs[0]):
                plots[name] = drawn
    plots["seconds"] = stages_plot(runs)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, finalize=_shown
    )
    environment.filters["script_source"] = _script_source
    html = environment.get_template(TEMPLATE.name).render(
        title=title,
        runs=runs,
        links=[_link(run, out) for run in runs],
        tasks=list(dict.fromkeys(task for run in runs for task in run.results["zero_shot"])),
        bars=BARS,
        score_of=score_of,
        published=[(run, entry) for run in runs for entry in published(run.model, run.results)],
        plots={name: svg for name, (svg, _) in plots.items()},
        heats=[heat(run.records) for run in runs],
        linears=[r | {"reason": reason(r)} for r in runs[0].records] if len(runs) == 1 else [],
        manifest=json.dumps(runs[0].manifest, indent=2).splitlines() if len(runs) == 1 else [],
    )
    return html, {name: png for name, (_, png) in plots.items()}


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """report.html, report.csv and a PNG for every plot in ``out``. Returns the page's path. Raises InputError where others
    have files of these names there."""
    models = list(dict.fromkeys(run.model for run in runs))
    title = f"{runs[0].model}: {runs[0].label}" if len(runs) == 1 else f"{len(runs)} runs of {', '.join(models[:6])}"
    html, pictures = page(runs, title, out)
    contents = {f"{_file_name(name)}.png": png for name, png in pictures.items()}
    write_owned(out, contents | {"report.csv": _csv(runs).encode(), "report.html": html.encode()})
    return out / "report.html"


def _file_name(name: str) -> str:
    """The name of a plot, which may hold a data set's, as one of a file in any directory."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100]
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return plain if plain == name else f"{plain}-{digest}"


def write_pages(paths: Sequence[Path], together: Path | None) -> Path:
    """A page in every run directory, and one for all of several in ``together`` (default: beside them). Returns the page
    to look at first."""
    runs = [open_run(path) for path in paths]
    pages = [write_report([run], run.path) for run in runs]
    if len(runs) == 1:
        return pages[0]
    digest = hashlib.sha256(" ".join(run.path.name for run in runs).encode(errors="surrogatepass")).hexdigest()[:8]
    return write_report(runs, together or runs[0].path.parent / f"report-{runs[0].model}-{digest}")


def _csv(runs: Sequence[Run]) -> str:
    """The journal of one run, or one line a run and corpus with the scores of its tasks."""
    text = io.StringIO()
    if len(runs) == 1:
        fields = ["block", "name", "method", "bits", "relative_error", "relative_error_rtn", "bits_per_weight", "seconds", "peak_bytes", "verdict"]  # fmt: skip
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(fields)
        writer.writerows([csv_cell(record.get(field)) for field in fields] for record in runs[0].records)
        return text.getvalue()
    writer = csv.writer(text, lineterminator="\n")
    tasks = list(dict.fromkeys(task for run in runs for task in run.results["zero_shot"]))
    head = ["model", "method", "wbits", "abits", "group_size", "seed", "bits_per_weight", "data", "fp", "quantized",
            "kl_divergence", "mean_relative_error", *tasks, "seconds", "peak_bytes_host", "peak_bytes_device", "run"]  # fmt: skip
    writer.writerow(map(csv_cell, head))
    for run in runs:
        r, answered = run.results, run.results["zero_shot"]
        for name, scores in (r["perplexity"] or {"-": {"fp": None, "quantized": None}}).items():
            kl = r["fidelity"].get(name, {}).get("kl_divergence")
            row = [run.model, r["method"], r["wbits"], r.get("abits", 16), r["group_size"], run.manifest["seed"],
                   r["bits_per_weight"], name, scores["fp"], scores["quantized"], kl, r["mean_relative_error"],
                   *(score_of(answered[task]) if task in answered else None for task in tasks),
                   r["seconds"]["total"], r["peak_bytes"]["host"], r["peak_bytes"]["device"], run.path.name]  # fmt: skip
            writer.writerow(map(csv_cell, row))
    return text.getvalue()


# Comparing


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested entries by dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()
    }


def differences(runs: Sequence[Run]) -> dict[str, list[list[Any]]]:
    """Rows [name, value of every run] of configuration, numbers and linears that differ.

    Linears are ordered by the largest ratio between runs. Raises InputError for runs of different models.
    """
    first = runs[0].manifest["model"]
    for run in runs[1:]:
        if run.manifest["model"]["sha256"] != first["sha256"]:
            raise InputError(
                f"{runs[0].path} and {run.path} are runs of different models ({first['id']}, {run.manifest['model']['id']})"
            )
    found: dict[str, list[list[Any]]] = {}
    numbers = (
        "bits_per_weight",
        "quantized_bytes",
        "mean_relative_error",
        "perplexity",
        "fidelity",
        "zero_shot",
        "seconds",
        "peak_bytes",
    )
    for part, flat in (
        (
            "configuration",
            [_flat(run.manifest["configuration"]) | _flat(run.manifest["versions"], "versions") for run in runs],
        ),
        ("numbers", [_flat({k: run.results[k] for k in numbers}) for run in runs]),
    ):
        names = dict.fromkeys(name for one in flat for name in one)
        rows = [[name, *(one.get(name) for one in flat)] for name in names]
        found[part] = [row for row in rows if any(value != row[1] for value in row[2:])]
    errors = [{(r["block"], r["name"]): r["relative_error"] for r in run.records} for run in runs]
    shared = [key for key in errors[0] if all(key in one for one in errors[1:])]
    linears = [[f"{block} {name}", *(one[block, name] for one in errors)] for block, name in shared]
    linears.sort(key=lambda row: -max(row[1:]) / max(min(row[1:]), 1e-30))
    found["linears"] = [row for row in linears if any(value != row[1] for value in row[2:])]
    return found
