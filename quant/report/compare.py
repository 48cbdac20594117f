"""What differs between runs of one model: configuration, numbers and linears."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quant.core.errors import InputError
from quant.report.runs import Run


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
        rows_by_part[part] = [row for row in rows if any(value != row[1] for value in row[2:])]
    errors = [{(r["block"], r["name"]): r["relative_error"] for r in run.records} for run in runs]
    shared = [key for key in errors[0] if all(key in one for one in errors[1:])]
    linears = [[f"{block} {name}", *(one[block, name] for one in errors)] for block, name in shared]
    linears.sort(key=lambda row: -max(row[1:]) / max(min(row[1:]), 1e-30))
    rows_by_part["linears"] = [row for row in linears if any(value != row[1] for value in row[2:])]
    return rows_by_part
