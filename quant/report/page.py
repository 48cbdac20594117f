"""A page a person can look at, for one run or for many.

    python -m quant report RUN              RUN/report.html, report.csv and *.png beside it (a run writes them itself)
    python -m quant report RUN RUN --out DIR    one page for all of them: quality against bits
    python -m quant report compare RUN RUN      configuration, numbers and layers that differ

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quant.core.files import write_owned
from quant.core.text import csv_cell, printable
from quant.report import plots
from quant.report.experts import experts_plot
from quant.report.published import published_figures
from quant.report.runs import Run, by_line, open_run, score_of, told_apart
from quant.run.finished import JournalLine
from quant.run.linear import LOOK_ABOVE

TEMPLATE = Path(__file__).with_name("page.html.j2")


def reason(record: JournalLine) -> str:
    """Why a linear has its verdict, in words: by its errors on held-out windows, where there were any."""
    error, nearest = record["relative_error"], record["relative_error_rtn"]
    if (heldout := record["relative_error_heldout"]) is not None:
        error, nearest = heldout, record["relative_error_rtn_heldout"]
    if record["verdict"] in ("ok", None):
        return ""
    if not math.isfinite(error) or error >= 1:
        return "nothing of the output is left"
    if record["verdict"] == "bad":
        return (
            f"{error / nearest - 1:.0%} worse than rounding to nearest" if nearest else "worse than rounding to nearest"
        )
    if error <= LOOK_ABOVE and record["n_tokens"] == 0:
        return "no calibration token was routed to this expert: it is solved on those of others"
    if error <= LOOK_ABOVE and record["rank"] is not None:
        return f"too little calibration: its inputs vary in {record['rank']} directions only"
    return f"relative error above {LOOK_ABOVE:g}"


def heat(records: Sequence[JournalLine]) -> dict[str, Any] | None:
    """Relative errors as a table blocks x linears with a colour strength in 0..1 on a logarithmic scale. Experts share a
    column, with their mean."""
    if not records:
        return None
    lines = {place: _together(own) for place, own in by_line(records).items()}
    names = list(dict.fromkeys(name for _, name in lines))
    blocks = sorted({r["block"] for r in records})
    errors = [error for error, _ in lines.values() if error > 0 and math.isfinite(error)]
    low, high = (math.log(min(errors)), math.log(max(errors))) if errors else (0.0, 1.0)
    rows = []
    for block in blocks:
        cells = []
        for name in names:
            known = lines.get((block, name))
            error = known[0] if known else 0.0
            strength = (math.log(error) - low) / max(high - low, 1e-9) if error > 0 and math.isfinite(error) else 0.0
            cells.append(
                {
                    "error": error if known else None,
                    "strength": round(strength, 3),
                    "verdict": known and known[1],
                }
            )
        rows.append({"block": block, "cells": cells})
    return {"names": names, "rows": rows}


def _together(records: Sequence[JournalLine]) -> tuple[float, str | None]:
    """Mean relative error and worst verdict of linears that share a line."""
    verdicts = {record["verdict"] for record in records}
    worst = next((verdict for verdict in ("bad", "look", "ok") if verdict in verdicts), None)
    return sum(record["relative_error"] for record in records) / len(records), worst


def _link(run: Run, out: Path) -> str:
    """Where a run lies, seen from the page's directory: its own page if it has one, else the directory. Quoted: a name is
    no scheme of a URL, and no query."""
    own = run.path / "report.html"
    return quote(os.fsencode(Path(os.path.relpath(own if own.exists() else run.path, out)).as_posix()))


def _show(value: Any) -> Any:
    """A value where the template writes it: control characters of names are visible; Jinja escapes it then."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _script_source(script: str) -> str:
    """What a Content-Security-Policy calls an inline script of this text, which then is the only one that runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def page(runs: Sequence[Run], title: str, out: Path) -> tuple[str, dict[str, bytes]]:
    """The HTML of one run or of several, as it will lie in ``out``, and its plots as PNG by name."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    drawings: dict[str, tuple[str, bytes]] = {}
    for corpus in dict.fromkeys(name for run in runs for name in run.results["perplexity"]):
        if drawn := plots.perplexity_plot(runs, corpus):
            drawings[f"perplexity-{corpus}"] = drawn
    if drawn := plots.scores_plot(runs):
        drawings["scores"] = drawn
    if drawn := plots.accuracy_plot(runs):
        drawings["zero-shot"] = drawn
    if len(runs) == 1:
        of_one = {
            "bits": plots.bits_plot,
            "losses": plots.losses_plot,
            "ranges": plots.ranges_plot,
            "experts": experts_plot,
        }
        for name, plot in (of_one | {"memory": plots.memory_plot}).items():
            if drawn := plot(runs[0]):
                drawings[name] = drawn
    drawings["seconds"] = plots.stages_plot(runs)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, finalize=_show
    )
    environment.filters["script_source"] = _script_source
    html = environment.get_template(TEMPLATE.name).render(
        title=title,
        runs=runs,
        links=[_link(run, out) for run in runs],
        tasks=list(dict.fromkeys(task for run in runs for task in run.results["zero_shot"])),
        bars=plots.BARS,
        score_of=score_of,
        published=[(run, entry) for run in runs for entry in published_figures(run.model, run.results)],
        plots={name: svg for name, (svg, _) in drawings.items()},
        heats=[heat(run.records) for run in runs],
        linears=[r | {"reason": reason(r)} for r in runs[0].records] if len(runs) == 1 else [],
        manifest=json.dumps(runs[0].manifest, indent=2).splitlines() if len(runs) == 1 else [],
    )
    return html, {name: png for name, (_, png) in drawings.items()}


def write_report(runs: Sequence[Run], out: Path) -> Path:
    """report.html, report.csv and a PNG for every plot in ``out``. Returns the page's path. Raises InputError where others
    have files of these names there."""
    runs, models = told_apart(runs), list(dict.fromkeys(run.model for run in runs))
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
    return write_report(runs, together or runs[0].path.parent / _file_name(f"report-{runs[0].model}-{digest}"))


def _csv(runs: Sequence[Run]) -> str:
    """The journal of one run, or one line a run and corpus with the scores of its tasks."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if len(runs) == 1:
        fields = ["block", "name", "method", "bits", "relative_error", "relative_error_rtn", "bits_per_weight", "seconds", "peak_bytes", "verdict"]  # fmt: skip
        writer.writerow(fields)
        writer.writerows([csv_cell(dict(record).get(field)) for field in fields] for record in runs[0].records)
        return text.getvalue()
    tasks = list(dict.fromkeys(task for run in runs for task in run.results["zero_shot"]))
    head = ["model", "method", "wbits", "abits", "group_size", "seed", "bits_per_weight", "model_bits_per_weight", "data", "fp", "quantized",
            "kl_divergence", "mean_relative_error", *tasks, "seconds", "peak_bytes_host", "peak_bytes_device", "run"]  # fmt: skip
    writer.writerow(map(csv_cell, head))
    for run in runs:
        r, answered = run.results, run.results["zero_shot"]
        for name in r["perplexity"] or ["-"]:
            scores, fidelity = r["perplexity"].get(name), r["fidelity"].get(name)
            row = [run.model, run.method, r["wbits"], r["abits"] or 16, r["group_size"], run.manifest["seed"],
                   r["bits_per_weight"], r["model_bits_per_weight"], name, scores and scores["fp"], scores and scores["quantized"],
                   fidelity and fidelity["kl_divergence"], r["mean_relative_error"],
                   *(score_of(answered[task]) if task in answered else None for task in tasks),
                   r["seconds"].get("total"), r["peak_bytes"]["host"], r["peak_bytes"]["device"], run.path.name]  # fmt: skip
            writer.writerow(map(csv_cell, row))
    return text.getvalue()
