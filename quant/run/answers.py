"""Answers of solvers as tensors and JSON: in a block's file, and on the way from one process to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from quant.core.types import BilevelScales, Grid, Outliers, QuantizedWeight, QuantSpec


def tensors_of(answers: Mapping[str, QuantizedWeight]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of some linears, on the CPU, as ``<linear>.<part>``, and the rest of each as JSON; `answer_in` takes them
    back."""
    tensors: dict[str, Tensor] = {}
    linears: dict[str, Any] = {}
    for name, weight in answers.items():
        grid = weight.grid
        parts = {"codes": weight.codes, "scale": grid.scale, "g_idx": grid.g_idx}
        parts |= {"zero": grid.zero} if grid.minimum is None else {"minimum": grid.minimum}
        linears[name] = {"spec": weight.spec.to_json(), "qmax": grid.qmax, "info": dict(weight.info)}
        if weight.outliers is not None:
            parts |= {"outlier_index": weight.outliers.index, "outlier_value": weight.outliers.value}
            linears[name]["whole_columns"] = weight.outliers.whole_columns
        if grid.bilevel is not None:
            level = grid.bilevel
            parts |= {"scale_codes": level.codes, "scale_base": level.base, "scale_step": level.step}
            linears[name]["bilevel"] = {"bits": level.bits, "rows": level.rows}
        tensors |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
    return tensors, linears


def answer_in(tensor: Callable[[str], Tensor], name: str, entry: Mapping[str, Any]) -> QuantizedWeight:
    """One linear. tensor: a tensor by its name; entry: the JSON of the linear."""

    def part(which: str) -> Tensor:
        return tensor(f"{name}.{which}")

    bilevel = outliers = None
    if "bilevel" in entry:
        bilevel = BilevelScales(part("scale_codes"), part("scale_base"), part("scale_step"), **entry["bilevel"])
    if "whole_columns" in entry:
        outliers = Outliers(part("outlier_index"), part("outlier_value"), entry["whole_columns"])
    spec, scale, g_idx, qmax = QuantSpec(**entry["spec"]), part("scale"), part("g_idx"), entry["qmax"]
    if spec.has_minimum:
        grid = Grid.real(scale, part("minimum"), g_idx, qmax)
    else:
        grid = Grid(scale, part("zero"), g_idx, qmax, bilevel, table=spec.numbers.table)
    return QuantizedWeight(part("codes"), grid, spec, entry["info"], outliers)
