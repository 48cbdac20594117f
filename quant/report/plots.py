"""The plots of a page: inline SVG that follows the page's colours, and PNG on white."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

from quant.core.names import STAGES
from quant.core.text import brief, printable
from quant.report.runs import Run, by_line, mean_of, score_of
from quant.run.finished import JournalLine

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK = "#010203"  # stands for the page's text colour in plots, which follows light and dark
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8860b")  # Okabe and Ito
MARKERS = "osD^vPX*"
OF_STAGES = dict(zip(STAGES, (*COLOURS, "#332288"), strict=True))  # what the bars of each are filled with
BARS, SCORED = 24, 12  # runs that one plot of seconds, and one of scores, can show
LONGEST, IN_LEGEND = 40, 18  # letters of a name in a plot, and in its legend
LEGEND_LINE = 88  # letters of names side by side


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure whose text is the page's, closed at the end."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    plain: Any = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 11, "axes.spines.top": False,
             "axes.spines.right": False, "font.family": "sans-serif", "axes.titlesize": 11, "axes.titlelocation": "left"}  # fmt: skip
    with mpl.rc_context(ink | plain):
        yield Figure(figsize=(width, height), layout="constrained")


def draw(figure: Any, about: str) -> tuple[str, bytes]:
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
        scores = run.results["perplexity"].get(corpus)
        return scores["quantized"] / scores["fp"] if scores and scores["fp"] and scores["quantized"] else None

    about = f"Perplexity on {printable(corpus)} relative to full precision against stored bits per weight"
    return _against_bits(runs, ratio, 1.0, "perplexity / full precision", about)


def scores_plot(runs: Sequence[Run]) -> tuple[str, bytes] | None:
    """Mean score over the tasks less full precision's, against stored bits; None without such numbers."""

    def difference(run: Run) -> float | None:
        return mean_of([entry["difference"] for entry in run.results["zero_shot"].values()])

    about = "Mean score of the tasks less that of full precision against stored bits per weight"
    return _against_bits(runs, difference, 0.0, "mean score - full precision", about)


def _looks(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Marker and colour of every method, the same in all pictures of a page."""
    methods = dict.fromkeys(run.method for run in runs)
    return {method: (MARKERS[i % 8], COLOURS[i % 8]) for i, method in enumerate(methods)}


def _against_bits(
    runs: Sequence[Run], value: Callable[[Run], float | None], full: float, name: str, about: str
) -> tuple[str, bytes] | None:
    """A number against stored bits: a panel a model, a line a method, mean over seeds; ``full``: full precision's.

    None for fewer than two points.
    """
    points: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
    for run in runs:
        number = value(run)
        if number is not None and math.isfinite(number):
            of_method = points.setdefault(run.model, {}).setdefault(run.method, {})
            of_method.setdefault(run.label, []).append((run.results["bits_per_weight"], number))
    looks = _looks(runs)
    if sum(len(labels) for own in points.values() for labels in own.values()) < 2:
        return None
    columns = min(3, len(points))
    rows = -(-len(points) // columns)
    lines: dict[str, Any] = {}  # by method: names that are cut may be the same
    letters = max(IN_LEGEND, LEGEND_LINE // min(5, len(looks)))
    with new_figure(7.2 if columns < 3 else 9.6, 3.6 * rows + 0.4) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (model, own) in zip(panels, points.items(), strict=False):
            for method, (marker, colour) in looks.items():
                means = sorted(
                    tuple(sum(v) / len(v) for v in zip(*seeds, strict=True)) for seeds in own.get(method, {}).values()
                )
                if means:
                    x, y = zip(*means, strict=True)
                    (line,) = axes.plot(x, y, marker=marker, color=colour, linewidth=1.2, markersize=5)
                    lines.setdefault(method, line)
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
        names = [_name(method, letters) for method in lines]
        figure.legend(
            lines.values(), names, frameon=False, fontsize=9, ncols=min(5, len(lines)), loc="outside upper left"
        )
        return draw(figure, about)


def accuracy_plot(runs: Sequence[Run]) -> tuple[str, bytes] | None:
    """Accuracy of every task before and after, with standard errors; None without tasks, or for more than SCORED runs
    (which their table shows)."""
    shown = [run for run in runs if run.results["zero_shot"]]
    if not 0 < len(shown) <= SCORED:
        return None
    tasks, looks = list(shown[0].results["zero_shot"]), _looks(runs)
    with new_figure(7.2, 0.5 + 0.32 * len(tasks) * (len(shown) + 1)) as figure:
        axes = figure.subplots()
        rows, names = 0, []
        for task in tasks:
            entries = [(run, run.results["zero_shot"][task]) for run in shown if task in run.results["zero_shot"]]
            full = entries[0][1]["fp"]
            for run, entry in entries:
                marker, colour = looks[run.method]
                if (score := score_of(entry)) is not None:
                    error = 1.96 * abs(entry["stderr"] or 0.0)
                    axes.errorbar(score, rows, xerr=error, fmt=marker, color=colour, capsize=3)
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
        return draw(figure, "Zero-shot scores before and after")


def stages_plot(runs: Sequence[Run]) -> tuple[str, bytes]:
    """Seconds by stage of the BARS longest runs."""
    shown = sorted(runs, key=lambda run: -run.results["seconds"].get("total", 0.0))[:BARS]
    with new_figure(7.2, 0.9 + 0.36 * len(shown)) as figure:
        axes = figure.subplots()
        left = [0.0] * len(shown)
        for stage in STAGES:
            seconds = [run.results["seconds"].get(stage, 0.0) for run in shown]
            if any(seconds):
                axes.barh(range(len(shown)), seconds, left=left, color=OF_STAGES[stage], label=stage, height=0.7)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        axes.set_yticks(range(len(shown)), [_name(run.label if len({r.model for r in shown}) == 1 else f"{run.model} {run.label}") for run in shown])  # fmt: skip
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        figure.legend(frameon=False, fontsize=9, ncols=7, loc="outside upper left")
        return draw(figure, "Seconds by stage")


def memory_plot(run: Run) -> tuple[str, bytes] | None:
    """Peak memory by stage, of the host and of the device if there is one; None for runs that did not measure it."""
    stages = dict(run.results["peak_bytes_by_stage"])
    if not run.results["zero_shot"]:
        stages.pop("tasks", None)
    amounts = {where: [(peak[where] or 0) / 1e9 for peak in stages.values()] for where in ("host", "device")}
    amounts = {where: of_stages for where, of_stages in amounts.items() if any(of_stages)}
    if not amounts:
        return None
    with new_figure(7.2, 0.9 + 0.36 * len(stages)) as figure:
        axes = figure.subplots()
        for i, (where, of_stages) in enumerate(amounts.items()):
            height = 0.7 / len(amounts)
            centres = [n + (i - (len(amounts) - 1) / 2) * height for n in range(len(stages))]
            axes.barh(centres, of_stages, height=height, color=COLOURS[i], label=where)
        axes.set_yticks(range(len(stages)), [_name(stage) for stage in stages])
        axes.invert_yaxis()
        axes.set_xlabel("peak memory, GB")
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        return draw(figure, "Peak memory by stage")


def _ratio(loss: float | None, start: float) -> float:
    """A loss relative to its start; no number, which leaves a gap in the line, where one of them is none."""
    ratio = loss / start if loss is not None and start else math.nan
    return ratio if math.isfinite(ratio) else math.nan


def losses_plot(run: Run) -> tuple[str, bytes] | None:
    """Loss of every block over its epochs, relative to its start; None where nothing was learned."""
    logs = run.results["learning"]
    if not any(log["losses"] for log in logs):
        return None
    with new_figure(7.2, 3.4) as figure:
        axes = figure.subplots()
        shades = [i / max(1, len(logs) - 1) for i in range(len(logs))]
        import matplotlib as mpl

        for block, log in enumerate(logs):
            values = [1.0, *(_ratio(loss, log["loss_start"]) for loss in log["losses"])]
            axes.plot(range(len(values)), values, color=mpl.colormaps["cividis"](0.1 + 0.8 * shades[block]), linewidth=1.4,
                      label=f"block {block}" if len(logs) <= 8 or block in (0, len(logs) - 1) else None)  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss / loss at the start")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=9, ncols=2)
        return draw(figure, "Loss of every block over its epochs")


def bits_plot(run: Run) -> tuple[str, bytes] | None:
    """Bits of every linear: a column a block, a row a linear; None where all have the same, or for journals without them."""
    bits = {(r["block"], r["name"]): r["bits"] for r in run.records if r["bits"]}
    widths = sorted(set(bits.values()))
    if len(widths) < 2:
        return None
    names, n_blocks = list(dict.fromkeys(name for _, name in bits)), 1 + max(block for block, _ in bits)
    with new_figure(7.2, 1.2 + 0.3 * len(names)) as figure:
        axes = figure.subplots()
        import matplotlib as mpl

        shades = mpl.colormaps["cividis"].reversed()
        for i, width in enumerate(widths):
            own = [place for place, its in bits.items() if its == width]
            shade = shades(0.05 + 0.9 * i / (len(widths) - 1))
            axes.barh([names.index(name) for _, name in own], 1, left=[block - 0.5 for block, _ in own], height=1,
                      color=shade, edgecolor="white", linewidth=0.5, label=f"{width} bits")  # fmt: skip
        axes.set_yticks(range(len(names)), [_name(name.split(".")[-1], IN_LEGEND) for name in names])
        axes.set_xlim(-0.5, n_blocks - 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.invert_yaxis()
        axes.set_xlabel("block")
        axes.legend(frameon=False, fontsize=9, ncols=len(widths), loc="lower left", bbox_to_anchor=(0, 1))
        return draw(figure, "Bits of every linear, by block")


def _extremes(records: Sequence[JournalLine]) -> tuple[tuple[float, float], float | None, float]:
    """Least and largest root mean square of input channels, largest weight over root mean square, and share of outliers of
    linears that share a line."""
    rms = [pair for record in records if (pair := record["input_rms"])]
    peaks = [peak for record in records if (peak := record["weight_peak"]) is not None]
    share = sum(record["outlier_share"] or 0.0 for record in records) / len(records)
    return (min(low for low, _ in rms), max(high for _, high in rms)), max(peaks, default=None), share


def ranges_plot(run: Run) -> tuple[str, bytes] | None:
    """Input channels (median and largest root mean square) and weights (largest over root mean square, outliers kept)
    of every linear in order, of experts the extremes over all in a block; None for journals without them."""
    lines = [(name, [r for r in own if r["input_rms"]]) for (_, name), own in by_line(run.records).items()]
    shown = [(name, *_extremes(own)) for name, own in lines if own]
    if not shown:
        return None
    names = list(dict.fromkeys(name for name, *_ in shown))
    with new_figure(7.2, 5.4) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        for i, name in enumerate(names):
            own = [(n, rms, peak) for n, (its, rms, peak, _) in enumerate(shown) if its == name]
            x, colour = [n for n, *_ in own], COLOURS[i % 8]
            low, high = ([rms[k] for _, rms, _ in own] for k in (0, 1))
            above.vlines(x, low, high, color=colour, linewidth=2, label=_name(name.split(".")[-1], IN_LEGEND))
            above.plot(x, high, MARKERS[i % 8], color=colour, markersize=4)
            peaks = [math.nan if peak is None else peak for *_, peak in own]
            below.plot(x, peaks, MARKERS[i % 8], color=colour, markersize=5)
        for n, (_, _, peak, share) in enumerate(shown):
            if share and peak is not None:
                below.annotate(f"{share:.1%}", (n, peak), fontsize=7, rotation=90,
                               xytext=(0, 5), textcoords="offset points", ha="center")  # fmt: skip
        above.set_yscale("log")
        above.set_ylabel("input channels: median\nto largest RMS")
        below.set_ylabel("largest weight / RMS\n(share kept as outliers)")
        below.set_xlabel("linear, in order of execution")
        below.margins(y=0.2)
        for axes in (above, below):
            axes.grid(axis="y", alpha=0.25)
        above.legend(frameon=False, fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
        return draw(figure, "Ranges of inputs and weights of every linear")
