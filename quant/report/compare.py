"""What differs between runs of one model: configuration, numbers and linears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quant.core.errors import InputError
from quant.report.runs import Run

NUMBERS = (
    "bits_per_weight", "model_bits_per_weight", "quantized_bytes", "mean_relative_error", "perplexity", "fidelity", "zero_shot", "seconds", "peak_bytes"
)  # fmt: skip


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
    rows_by_part: dict[str, list[list[Any]]] = {}
    asked = [_flat(run.manifest["configuration"]) | _flat(run.manifest["versions"], "versions") for run in runs]
    numbers = [_flat({key: value for key, value in run.results.items() if key in NUMBERS}) for run in runs]
    for part, flat in (("configuration", asked), ("numbers", numbers)):
        names = dict.fromkeys(name for one in flat for name in one)
        rows = [[name, *(one.get(name) for one in flat)] for name in names]
        rows_by_part[part] = [row for row in rows if any(value != row[1] for value in row[2:])]
    errors = [{(r["block"], r["name"]): r["relative_error"] for r in run.records} for run in runs]
    shared = [key for key in errors[0] if all(key in one for one in errors[1:])]
    linears = [(f"{block} {name}", [one[block, name] for one in errors]) for block, name in shared]
    linears.sort(key=lambda row: -max(row[1]) / max(min(row[1]), 1e-30))
    rows_by_part["linears"] = [[name, *row] for name, row in linears if any(value != row[0] for value in row[1:])]
    return rows_by_part
