"""Draw the figures of the README and the docs from the tables in benchmarks/results; nothing is measured.

    python -m scripts.figures            writes docs/bits-against-perplexity.svg, superblocks.svg and smollm2-gguf.svg

In the first a line joins the geometric means over the models of a table, a dot is one model. Rows with one scale a row of the
weight matrix are taken, and the first data set of a table. The others have one model each on the grids of GGUF's blocks.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLOURS = {"rtn": "#7d838c", "gptq": "#c8690f", "quantease": "#1d6fb8"}
WIDTH, HEIGHT, TOP, BOTTOM = 820, 360, 76, 296  # of the picture, and of the panels in it; pixels
INK, PALE = "#24292f", "#d8dde3"


@dataclass(frozen=True)
class Panel:
    """One table as a panel: its title, where it stands, and the ends and ticks of its axis of ratios."""

    table: str
    data: str
    title: str
    left: int
    right: int
    highest: float
    ticks: tuple[float, ...]


PANELS = (
    Panel("demo.md", "demo", "five demo models, planted outlier channels", 60, 400, 12.0, (1, 1.5, 2, 3, 5, 10)),
    Panel("wikitext2-ptb.md", "wikitext2-test", "two 7M models, WikiText-2", 470, 810, 1.125, (1, 1.02, 1.05, 1.1)),
)
Points = dict[str, dict[str, list[tuple[float, float]]]]  # method -> width -> (stored bits, ratio) of every model


def read(panel: Panel) -> Points:
    """The rows of a panel's table, with the ratio of perplexities after and before. A setting is W3A16, in older tables
    columns bits and group."""
    points: Points = {method: defaultdict(list) for method in COLOURS}
    names: list[str] = []
    for line in (ROOT / "benchmarks" / "results" / panel.table).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        names = cells if cells[0] == "model" else names
        row = dict(zip(names, cells, strict=False))
        width = row.get("setting", f"W{row.get('bits')}A16")
        whole_rows = row.get("group", "row") == "row" and re.fullmatch(r"W\dA16", width)
        if whole_rows and row.get("method") in points and row.get("data") == panel.data:
            ratio = float(row["ppl after"]) / float(row["ppl before"])
            points[row["method"]][width].append((float(row["bits per weight"]), ratio))
    return points


def means(rows: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean of the stored bits, geometric mean of the ratios."""
    return sum(b for b, _ in rows) / len(rows), math.exp(sum(math.log(r) for _, r in rows) / len(rows))


def text(x: float, y: float, words: str, anchor: str = "middle", colour: str = INK, size: int = 13) -> str:
    """A line of text at a place."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    halo = 'stroke="white" stroke-width="4" paint-order="stroke"'  # lines of the grid stay clear of the letters
    return f'<text {place} fill="{colour}" font-size="{size}" {halo}>{words}</text>'


def apart(heights: dict[str, float], least: float = 16) -> dict[str, float]:
    """The heights of labels, moved up where one would cover the one below it."""
    placed: dict[str, float] = {}
    for name, y in sorted(heights.items(), key=lambda item: -item[1]):
        placed[name] = min(y, min(placed.values(), default=math.inf) - least)
    return placed


def drawn(panel: Panel) -> list[str]:
    """The elements of one panel."""

    def x(bits: float) -> float:
        return panel.left + (bits - 0.95) / 3.3 * (panel.right - panel.left)

    def y(ratio: float) -> float:
        return BOTTOM - math.log(ratio) / math.log(panel.highest) * (BOTTOM - TOP)

    lines = [text((panel.left + panel.right) / 2, TOP - 12, panel.title)]
    for tick in panel.ticks:
        lines.append(f'<path d="M{panel.left} {y(tick):.1f}H{panel.right}" stroke="{PALE}"/>')
        lines.append(text(panel.left - 6, y(tick) + 4, f"{tick:g}", "end", size=12))
    for bits in (2, 3, 4):
        lines.append(f'<path d="M{x(bits):.1f} {BOTTOM}v5" stroke="{INK}"/>')
        lines.append(text(x(bits), BOTTOM + 19, str(bits), size=12))
    lines.append(f'<path d="M{panel.left} {BOTTOM}H{panel.right}" stroke="{INK}"/>')
    lines.append(text((panel.left + panel.right) / 2, BOTTOM + 38, "stored bits per weight", size=12))
    digits = 2 if panel.highest > 2 else 3
    labels: dict[str, tuple[float, float]] = {}
    for method, widths in read(panel).items():
        colour = COLOURS[method]
        line = sorted(means(rows) for rows in widths.values())
        for bits, ratio in (point for rows in widths.values() for point in rows):
            lines.append(f'<circle cx="{x(bits):.1f}" cy="{y(ratio):.1f}" r="2.5" fill="{colour}" opacity="0.45"/>')
        path = "L".join(f"{x(bits):.1f} {y(ratio):.1f}" for bits, ratio in line)
        lines.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>')
        labels[method] = line[0]
    heights = apart({method: y(ratio) + 4 for method, (_, ratio) in labels.items()})
    for method, (bits, ratio) in labels.items():
        lines.append(text(x(bits) - 9, heights[method], f"{method} {ratio:.{digits}f}", "end", COLOURS[method]))
    return lines


def picture() -> str:
    """The whole figure as SVG."""
    about = "Perplexity after quantization over perplexity before, against stored bits per weight"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="Helvetica, Arial, sans-serif">',
        f"<title>{about}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(16, 28, f"{about} (log scales differ)", "start", size=15),
        *(line for panel in PANELS for line in drawn(panel)),
        text(16, HEIGHT - 8, "line: geometric mean; dot: one model; number: the mean at 2 bits", "start", size=12),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


SUPER_ROWS = {
    "llama.cpp": "#7d838c",
    "llama.cpp, importance matrix": "#c8690f",
    "quantease, searched": "#9b59b6",
    "preset fast": "#6aa3d5",
    "preset balanced": "#1d6fb8",
}


@dataclass(frozen=True)
class SuperPanel:
    """One column of a table of GGUF's grids as a panel: its title, where it stands, the ends of both axes, lines across, and the
    methods that are drawn. before: whether the column says a value of full precision in front, which is a line across too."""

    table: str
    column: str
    title: str
    left: int
    right: int
    bits: tuple[float, float]
    heights: tuple[float, float]
    ticks: tuple[float, ...]
    methods: tuple[str, ...]
    before: bool = False


DIVERGENCES = (2e-4, 4e-2), (0.001, 0.01), tuple(name for name in SUPER_ROWS if name != "quantease, searched")
SUPER_PANELS = (
    SuperPanel("superblocks.md", "wikitext2-test: KL", "WikiText-2", 70, 400, (2.3, 4.8), *DIVERGENCES),
    SuperPanel("superblocks.md", "ptb-test: KL", "Penn Treebank", 480, 810, (2.3, 4.8), *DIVERGENCES),
)
SMOLLM2_PANELS = (
    SuperPanel("superblocks-smollm2.md", "wikitext2-test: ppl", "perplexity, WikiText-2", 70, 400, (3.9, 4.7),
               (22.0, 240.0), (30, 40, 60, 100, 200), tuple(name for name in SUPER_ROWS if name != "preset fast"), before=True),
    SuperPanel("superblocks-smollm2.md", "wikitext2-test: KL", "KL divergence, WikiText-2", 480, 810, (3.9, 4.7),
               (0.04, 2.4), (0.05, 0.1, 0.2, 0.5, 1, 2), tuple(name for name in SUPER_ROWS if name != "preset fast")),
)  # fmt: skip


def super_rows(name: str) -> list[dict[str, str]]:
    """The rows of a table by the names of its columns."""
    table = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def super_panel(panel: SuperPanel) -> list[str]:
    """A column against stored bits."""
    (fewest, most), (least, highest) = panel.bits, panel.heights

    def x(bits: float) -> float:
        return panel.left + (bits - fewest) / (most - fewest) * (panel.right - panel.left)

    def y(value: float) -> float:
        return BOTTOM - math.log(value / least) / math.log(highest / least) * (BOTTOM - TOP)

    lines = [text((panel.left + panel.right) / 2, TOP - 12, panel.title)]
    for tick in panel.ticks:
        lines.append(f'<path d="M{panel.left} {y(tick):.1f}H{panel.right}" stroke="{PALE}"/>')
        lines.append(text(panel.left - 6, y(tick) + 4, f"{tick:g}", "end", size=12))
    lines.append(f'<path d="M{panel.left} {BOTTOM}H{panel.right}" stroke="{INK}"/>')
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in panel.methods}
    for row in super_rows(panel.table):
        bits, value = float(row["stored"]), row[panel.column].rpartition("→ ")[2]
        if row["method"] in points:
            points[row["method"]].append((bits, float(value)))
        if row["method"] == panel.methods[0]:
            lines.append(f'<path d="M{x(bits):.1f} {BOTTOM}v5" stroke="{INK}"/>')
            lines.append(text(x(bits), BOTTOM + 19, f"{row['grid'].upper()} {bits:.4g}", size=12))
    if panel.before:
        height = y(float(super_rows(panel.table)[0][panel.column].split(" →")[0]))
        lines.append(f'<path d="M{panel.left} {height:.1f}H{panel.right}" stroke="{INK}" stroke-dasharray="4 4"/>')
        lines.append(text(panel.right, height + 14, "full precision", "end", size=12))
    for name, own in points.items():
        path = "L".join(f"{x(bits):.1f} {y(value):.1f}" for bits, value in sorted(own))
        lines.append(f'<path d="M{path}" fill="none" stroke="{SUPER_ROWS[name]}" stroke-width="2.5"/>')
        lines += [f'<circle cx="{x(b):.1f}" cy="{y(v):.1f}" r="3" fill="{SUPER_ROWS[name]}"/>' for b, v in own]
    return lines


def super_picture(panels: Sequence[SuperPanel], about: str) -> str:
    """A figure of grids of GGUF's blocks as SVG."""
    legend, place = [], 16
    for name in panels[0].methods:
        legend.append(f'<circle cx="{place + 5}" cy="{HEIGHT - 12}" r="5" fill="{SUPER_ROWS[name]}"/>')
        legend.append(text(place + 15, HEIGHT - 8, name, "start", SUPER_ROWS[name]))
        place += 45 + 7 * len(name)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="Helvetica, Arial, sans-serif">',
        f"<title>{about}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(16, 28, about, "start", size=15),
        *(line for panel in panels for line in super_panel(panel)),
        *legend,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def pictures() -> dict[str, str]:
    """Every figure by the name of its file in docs."""
    return {
        "bits-against-perplexity.svg": picture(),
        "superblocks.svg": super_picture(
            SUPER_PANELS,
            "KL divergence to full precision on the grids of llama.cpp's K types, against stored bits per weight",
        ),
        "smollm2-gguf.svg": super_picture(
            SMOLLM2_PANELS, "SmolLM2-135M as GGUF: llama.cpp's own rounding and solvers on the same types of blocks"
        ),
    }


if __name__ == "__main__":
    for file, drawing in pictures().items():
        (ROOT / "docs" / file).write_text(drawing)
