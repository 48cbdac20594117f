"""A linear in parts: contiguous rows, each solved by itself, and the answers put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from quant.core.types import Grid, Outliers, QuantizedWeight

OF_ALL_ROWS = ("g_idx", "qmax", "bilevel", "table")  # what of a grid has no rows


def row_parts(n_out: int, parts: int) -> list[slice]:
    """Rows of a linear as contiguous parts of nearly equal size; as many as rows where those are fewer."""
    parts = min(parts, n_out)
    ends = [n_out * (i + 1) // parts for i in range(parts)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def rows_of(grid: Grid, rows: slice) -> Grid:
    """The grid of some rows."""
    own: dict[str, Any] = {name: tensor[rows] for name, tensor in _by_row(grid).items()}
    return replace(grid, **own)


def stacked_grids(grids: Sequence[Grid]) -> Grid:
    """The grid of all rows of these, one below the other. Raises ValueError where they have columns in other groups, or
    scales that rows share."""
    first = grids[0]
    if any(grid.bilevel is not None for grid in grids):
        raise ValueError("rows share the numbers that their scales are stored by: they cannot be solved in parts")
    if not all(torch.equal(grid.g_idx, first.g_idx) for grid in grids):
        raise ValueError(
            "--saliency with --act-order: the parts of a linear would have their columns in other groups: give "
            "--static-groups, whole rows, or no order of the columns"
        )
    columns = [_by_row(grid) for grid in grids]
    whole: dict[str, Any] = {name: torch.cat([own[name] for own in columns]) for name in columns[0]}
    return replace(first, **whole)


def stacked(answers: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The answer for all rows of these, one below the other. Of what the solver tells, counts of rows' own things are
    averaged by rows; damping is the largest. Raises ValueError where they do not fit together."""
    first, rows = answers[0], [answer.codes.shape[0] for answer in answers]
    info = {}
    for name in dict.fromkeys(name for answer in answers for name in answer.info):
        given = [(answer.info[name], n) for answer, n in zip(answers, rows, strict=True) if name in answer.info]
        mean = sum(value * n for value, n in given) / sum(n for _, n in given)
        info[name] = max(value for value, _ in given) if "damp" in name else mean
    return QuantizedWeight(
        torch.cat([answer.codes for answer in answers]),
        stacked_grids([answer.grid for answer in answers]),
        first.spec,
        info,
        _outliers([answer.outliers for answer in answers], rows, first.codes.shape[1]),
    )


def _outliers(given: Sequence[Outliers | None], rows: Sequence[int], n_in: int) -> Outliers | None:
    """Outliers at their places among all rows; in float32 where those of one part are."""
    own = [(outliers, sum(rows[:i])) for i, outliers in enumerate(given) if outliers is not None]
    if not own:
        return None
    if any(outliers.whole_columns for outliers, _ in own):
        raise ValueError("the parts of a linear would have other columns as outliers: drop --structure-outlier")
    exact = any(outliers.value.dtype == torch.float32 for outliers, _ in own)
    values = [outliers.value.float() if exact else outliers.value for outliers, _ in own]
    return Outliers(torch.cat([outliers.index + start * n_in for outliers, start in own]), torch.cat(values))


def _by_row(grid: Grid) -> dict[str, Tensor]:
    own: dict[str, Any] = {field.name: getattr(grid, field.name) for field in fields(grid)}
    return {name: value for name, value in own.items() if name not in OF_ALL_ROWS and value is not None}
