"""Published perplexities of the model and setting of a run, to stand beside its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.core.names import FULL_BITS
from quant.solvers import declaration_of, solvers, with_defaults

TABLE = Path(__file__).with_name("published.tsv")
SEQLEN = 2048  # of the table's protocols
FULL = "FP16"


def rows() -> list[tuple[str, str, str, str, str, dict[str, float]]]:
    """(family, data, setting, method, source, perplexity by size) of every line."""
    figures = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            family, data, setting, method, source, values = line.split("\t")
            sizes = {size: float(value) for size, _, value in (pair.partition("=") for pair in values.split())}
            figures.append((family, data, setting, method, source, sizes))
    return figures


def setting_of(results: Mapping[str, Any]) -> str:
    """W3, W3g128, W4A4, ... or FP16; a star marks codes of one level more than 2^bits (W2*: five)."""
    abits = results.get("abits") or 16
    if results["wbits"] == abits == 16:
        return FULL
    if results.get("avg_bits"):
        return f"W{results['avg_bits']:g} mixed"
    acts = f"A{abits}" if abits < 16 else ""
    entropy = results.get("entropy_bits")
    star = "*" if entropy is not None and entropy > results["wbits"] else ""
    return f"W{results['wbits']}{star}{acts}" + (f"g{results['group_size']}" if results["group_size"] > 0 else "")


def method_of(results: Mapping[str, Any]) -> str:
    """The method with what its name does not say, by the declaration of its solver; one that is not there any more says
    nothing."""
    solver = results.get("solver") or results["method"]
    if results["wbits"] >= FULL_BITS or solver not in solvers():
        return str(results["method"])
    given = {name: value for name, value in results.get("options", {}).items() if value is not None}
    return f"{results['method']}{declaration_of(solver).label(with_defaults(solver, given))}"


def published_figures(model: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures for a model's name and the setting of results.json, full precision first; none where none is known.

    Each has data, setting, method, source, perplexity, ours (where the row is full precision or the run's own method), and
    same_protocol: whether the run was measured as the figure was.
    """
    name = re.sub(r"-(hf|base)$", "", model.lower().replace("_", "-").split("/")[-1])
    setting, entries = setting_of(results), []
    for family, data, its, method, source, sizes in rows():
        own = results["perplexity"].get(data)
        size = next((s for s in sizes if name == f"{family}-{s}"), None)
        if own is None or size is None or its not in (FULL, setting):
            continue
        ours = own["fp"] if its == FULL else own["quantized"] if method == method_of(results) else None
        whole = own["seqlen"] == SEQLEN and results.get("evaluation", {}).get("limit") is None
        entry = {
            "data": data,
            "setting": its,
            "method": method,
            "source": source,
            "perplexity": sizes[size],
            "ours": ours,
        }
        entries.append(entry | {"same_protocol": whole})
    return entries
