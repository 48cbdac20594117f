"""Draw the figures of the README and the docs from the tables in benchmarks/results; nothing is measured.

    python -m scripts.figures            writes docs/bits-against-perplexity.svg and docs/superblocks.svg

In the first a line joins the geometric means over the models of a table, a dot is one model. Rows with one scale a row of the
weight matrix are taken, and the first data set of a table. The second has one model on the grids of GGUF's blocks.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "bits-against-perplexity.svg"
SUPER_FIGURE = ROOT / "docs" / "superblocks.svg"
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
    "preset fast": "#6aa3d5",
    "preset balanced": "#1d6fb8",
}
SUPER_PANELS = (("wikitext2-test", "WikiText-2", 70, 400), ("ptb-test", "Penn Treebank", 480, 810))
LEAST, MOST, DECADES = 2e-4, 4e-2, (0.001, 0.01)  # of divergences, and lines across


def super_rows() -> list[dict[str, str]]:
    """The rows of superblocks.md by the names of its columns."""
    table = (ROOT / "benchmarks" / "results" / "superblocks.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def super_panel(data: str, title: str, left: int, right: int) -> list[str]:
    """Divergence against stored bits on one text."""

    def x(bits: float) -> float:
        return left + (bits - 2.3) / 2.5 * (right - left)

    def y(divergence: float) -> float:
        return BOTTOM - math.log(divergence / LEAST) / math.log(MOST / LEAST) * (BOTTOM - TOP)

    lines = [text((left + right) / 2, TOP - 12, title)]
    for tick in DECADES:
        lines.append(f'<path d="M{left} {y(tick):.1f}H{right}" stroke="{PALE}"/>')
        lines.append(text(left - 6, y(tick) + 4, f"{tick:g}", "end", size=12))
    lines.append(f'<path d="M{left} {BOTTOM}H{right}" stroke="{INK}"/>')
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in SUPER_ROWS}
    for row in super_rows():
        bits = float(row["stored"])
        if row["method"] in points:
            points[row["method"]].append((bits, float(row[f"{data}: KL"])))
        if row["method"] == next(iter(points)):
            lines.append(f'<path d="M{x(bits):.1f} {BOTTOM}v5" stroke="{INK}"/>')
            lines.append(text(x(bits), BOTTOM + 19, f"{row['grid'].upper()} {bits:g}", size=12))
    for name, own in points.items():
        path = "L".join(f"{x(bits):.1f} {y(divergence):.1f}" for bits, divergence in own)
        lines.append(f'<path d="M{path}" fill="none" stroke="{SUPER_ROWS[name]}" stroke-width="2.5"/>')
        lines += [f'<circle cx="{x(b):.1f}" cy="{y(d):.1f}" r="3" fill="{SUPER_ROWS[name]}"/>' for b, d in own]
    return lines


def super_picture() -> str:
    """The figure of super-blocks as SVG."""
    about = "KL divergence to full precision on the grids of llama.cpp's K types, against stored bits per weight"
    legend, place = [], 16
    for name, colour in SUPER_ROWS.items():
        legend.append(f'<circle cx="{place + 5}" cy="{HEIGHT - 12}" r="5" fill="{colour}"/>')
        legend.append(text(place + 15, HEIGHT - 8, name, "start", colour))
        place += 45 + 7 * len(name)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="Helvetica, Arial, sans-serif">',
        f"<title>{about}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(16, 28, about, "start", size=15),
        *(line for panel in SUPER_PANELS for line in super_panel(*panel)),
        *legend,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FIGURE.write_text(picture())
    SUPER_FIGURE.write_text(super_picture())
