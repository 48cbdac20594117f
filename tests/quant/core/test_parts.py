"""Rows that are solved in parts and put together are the same rows."""

from dataclasses import replace

import pytest
import torch

from quant.core.gram import GramStats
from quant.core.parts import row_parts, rows_of, stacked, stacked_grids
from quant.core.types import Outliers, QuantSpec
from quant.solvers import get_solver
from tests.helpers import random_weight, same_codes
from tests.references import inputs, make_stats, weights


@pytest.mark.parametrize("method", ["rtn", "gptq", "quantease", "gptq_quantease"])
@pytest.mark.parametrize("spec", [QuantSpec(3), QuantSpec(3, 16), QuantSpec(4, 16, kind="nvfp4"), QuantSpec(4, 32, kind="real")],
                         ids=["rows", "groups", "nvfp4", "real"])  # fmt: skip
@pytest.mark.parametrize("n_out", [1, 5, 24])
def test_equal_statistics_in_parts_give_the_answer_of_the_whole(method, spec, n_out):
    weight, stats = weights(n_out, 64), make_stats(inputs(64, 200))
    whole = get_solver(method)(weight, stats, spec)
    parts = [get_solver(method)(weight[rows], stats, spec) for rows in row_parts(n_out, 4)]
    assert len(parts) == min(n_out, 4)
    answer = stacked(parts).check()
    assert same_codes(answer, whole) and dict(answer.info) == pytest.approx(dict(whole.info))
    assert torch.equal(answer.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_outliers_keep_their_places():
    """Of a part without any, of a part with the first and the last place, and in the wider of two dtypes."""
    spec = QuantSpec(3)
    parts = [random_weight(n, 8, spec, seed=n) for n in (2, 3, 4)]
    parts[0] = replace(parts[0], outliers=Outliers(torch.tensor([3, 15]), torch.tensor([1.0, 2.0]).half()))
    parts[2] = replace(parts[2], outliers=Outliers(torch.tensor([0, 31]), torch.tensor([1e-9, 4.0])))
    answer = stacked(parts).check()
    assert answer.outliers.value.dtype == torch.float32 and answer.outliers.index.tolist() == [3, 15, 40, 71]
    assert torch.equal(answer.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert stacked(parts[1:2]).outliers is None
    columns = replace(parts[0].outliers, whole_columns=True)
    with pytest.raises(ValueError, match="drop --structure-outlier"):
        stacked([replace(parts[0], outliers=columns), *parts[1:]])


def test_grids_are_cut_and_put_together():
    grid = random_weight(10, 32, QuantSpec(4, 8)).grid
    cut = [rows_of(grid, rows) for rows in row_parts(10, 3)]
    assert [len(own.scale) for own in cut] == [3, 3, 4] and all(len(own.g_idx) == 32 for own in cut)
    again = stacked_grids(cut)
    assert torch.equal(again.scale, grid.scale) and torch.equal(again.zero, grid.zero) and again.qmax == grid.qmax
    with pytest.raises(ValueError, match="columns in other groups: give --static-groups"):
        stacked_grids([cut[0], replace(cut[1], g_idx=grid.g_idx.flip(0))])
    shared = get_solver("spqr")(weights(4, 32), GramStats.from_gram(torch.eye(32)), QuantSpec(3, 8)).grid
    assert shared.bilevel is not None
    with pytest.raises(ValueError, match="cannot be solved in parts"):
        stacked_grids([shared, shared])


def test_what_solvers_tell_is_averaged_by_rows_and_damping_the_largest():
    one, three = (random_weight(n, 8, QuantSpec(3)) for n in (1, 3))
    answers = [replace(one, info={"num_iter": 2, "percdamp": 0.1}), replace(three, info={"num_iter": 6, "share": 0.5})]
    assert stacked(answers).info == {"num_iter": 5.0, "percdamp": 0.1, "share": 0.5}


def test_parts_cover_all_rows():
    for n_out in range(1, 40):
        for parts in range(1, 9):
            rows = row_parts(n_out, parts)
            assert [i for part in rows for i in range(part.start, part.stop)] == list(range(n_out))
            assert len(rows) == min(n_out, parts)
            sizes = {part.stop - part.start for part in rows}
            assert max(sizes) - min(sizes) <= 1
