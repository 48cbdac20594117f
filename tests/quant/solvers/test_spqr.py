"""SpQR: leave-one-out and sweep against slow references, stored sizes, thresholds."""

import pytest
import torch

from quant.core.grid import fit_grid
from quant.core.linalg import relative_error
from quant.core.types import QuantSpec
from quant.solvers.gptq import gptq
from quant.solvers.spqr import range_outliers, spqr
from tests.references import damped, inputs, make_stats, naive_leave_one_out, naive_spqr_sweep, objective64, weights


def problem(seed: int = 0, n_out: int = 40, n_in: int = 128):
    weight = weights(n_out, n_in, seed)
    weight[3, 7], weight[10, 60] = 9.0, -8.0
    return weight, make_stats(inputs(n_in, 500, seed))


@pytest.mark.parametrize("spec", [QuantSpec(3), QuantSpec(2), QuantSpec(3, symmetric=True)], ids=str)
@pytest.mark.parametrize("threshold", [0.01, 0.1, 1.0])
def test_leave_one_out(spec, threshold):
    for seed in range(4):
        part = weights(30, 16, seed)
        part[0], part[1, :] = 0.0, 1.0
        part[2, 5] = 40.0
        importance = torch.rand(16, generator=torch.Generator().manual_seed(seed)) + 0.1
        outliers = range_outliers(part, spec, importance, torch.tensor(threshold))
        assert torch.equal(outliers, naive_leave_one_out(part, spec, importance, threshold))
        assert bool(outliers[2, 5])


def test_sweep_on_a_given_grid_equals_the_column_loop():
    weight, stats = problem(n_out=12, n_in=64)
    spec = QuantSpec(3, 16)
    grid = fit_grid(weight, spec)
    answer = spqr(weight, stats, spec, grid=grid, outlier=0.3).check()
    damped_gram = damped(stats.gram, 0.01)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped_gram), upper=True)  # the published factor, of the inverse
    codes, outliers = naive_spqr_sweep(weight, upper, grid, 0.3)
    assert answer.outliers is not None
    mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, answer.outliers.index, True).view_as(weight)
    assert 0 < int(mask.sum()) < 0.2 * weight.numel()
    assert float((mask != (outliers != 0)).float().mean()) < 0.01  # measured: the same mask
    same = answer.codes[~mask] == codes[~mask]
    assert float(same.float().mean()) > 0.98


def test_sweep_with_its_own_grids_equals_the_column_loop():
    weight, stats = problem(n_out=20, n_in=64)
    weight, spec = weight * 0.02, QuantSpec(3, 16)
    weight[5], weight[3, :16] = 0, 0
    answer = spqr(weight, stats, spec, outlier=0.3).check()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(stats.gram, 0.01)), upper=True)
    grid = fit_grid(weight, spec)
    codes, outliers = naive_spqr_sweep(weight, upper, grid, 0.3, fitted=spec)
    assert answer.outliers is not None
    mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, answer.outliers.index, True).view_as(weight)
    assert int(mask.sum()) > 0 and float((mask != (outliers != 0)).float().mean()) < 0.01
    same = torch.isclose(answer.grid.scale, grid.scale, rtol=1e-3).float()  # a code that falls the other way in float32
    assert float(same[:, 0].mean()) == 1 and float(same.mean()) > 0.85  # moves what the later groups are fitted to
    assert float((answer.codes[~mask] == codes[~mask]).float().mean()) > 0.9
    expected = objective64(weight - grid.dequantize(codes.to(torch.uint8)) - outliers, stats.gram)
    assert abs(objective64(weight - answer.dequantize(), stats.gram) / expected - 1) < 0.02  # measured: 7.9e-6
    simple = spqr(weight, stats, spec, outlier=0.3, simplified_outliers=True)
    assert float(simple.grid.scale.mean()) > 1.05 * float(answer.grid.scale.mean()), "outliers stay in the range"


@pytest.mark.parametrize("spec", [QuantSpec(3, 16), QuantSpec(3, 16, symmetric=True)], ids=str)
def test_rows_and_groups_of_zeros_do_not_spoil_their_neighbours(spec):
    weight, stats = weights(16, 128) * 0.02, make_stats(inputs(128, 500))
    for rows, columns in ((5, slice(None)), (3, slice(16)), (slice(None), slice(16, 32))):
        some = weight.clone()
        some[rows, columns] = 0
        value = spqr(some, stats, spec).check().dequantize()
        assert columns == slice(16, 32) or not value[rows, columns].any()  # later columns compensate for the earlier
        without = relative_error(weight, spqr(weight, stats, spec).dequantize(), stats.gram)
        assert relative_error(some, value, stats.gram) < 1.2 * without  # measured: 0.82 to 1.07


def test_one_row_has_no_outliers_and_dead_columns_none():
    alone = spqr(weights(1, 128), make_stats(inputs(128, 500)), QuantSpec(3, 16), outlier=0.2).check()
    assert alone.outliers is not None and alone.outliers.value.numel() == 0
    x, dead = inputs(128, 500), list(range(0, 128, 10))
    x[:, dead] = 0
    kept = []
    for factor in (1.0, 1e-2, 1e-4):
        answer = spqr(weights(40, 128), make_stats(x * factor), QuantSpec(3, 16), outlier=0.3).check()
        assert answer.outliers is not None and answer.outliers.value.numel() > 20
        assert not set((answer.outliers.index % 128).tolist()) & set(dead)
        kept.append(answer.outliers.index)
    assert all(set(k.tolist()) ^ set(kept[0].tolist()) == set() for k in kept)


def test_smaller_thresholds_keep_more_and_lose_less():
    weight, stats = problem()
    answers = [spqr(weight, stats, QuantSpec(3, 16), outlier=t).check() for t in (1.0, 0.4, 0.1)]
    shares = [a.info["outlier_fraction"] for a in answers]
    errors = [relative_error(weight, a.dequantize(), stats.gram) for a in answers]
    assert shares == sorted(shares) and shares[0] < shares[-1]
    assert errors == sorted(errors, reverse=True)
    assert all(
        a.outliers is not None and a.outliers.value.numel() == round(s * weight.numel())
        for a, s in zip(answers, shares, strict=True)
    )


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"simplified_outliers": True}, {"outlier": 0.0}], ids=str)
def test_better_than_gptq_at_its_own_size(options):
    weight, stats = problem()
    answer = spqr(weight, stats, QuantSpec(3, 16), **{"outlier": 0.5} | options).check()
    plain = gptq(weight, stats, QuantSpec(3, 16))
    assert answer.grid.bilevel is not None
    assert 3 <= answer.grid.bilevel.codes.unique().numel() <= 8
    assert answer.has_plain_groups() == ("act_order" not in options)
    if options.get("outlier") == 0.0:
        assert answer.outliers is None and answer.bits_per_weight() < plain.bits_per_weight()
        assert relative_error(weight, answer.dequantize(), stats.gram) < 1.3 * relative_error(
            weight, plain.dequantize(), stats.gram
        )
    else:
        assert relative_error(weight, answer.dequantize(), stats.gram) < relative_error(
            weight, plain.dequantize(), stats.gram
        )


def test_stored_bits():
    weight, stats = problem(n_out=40)
    answer = spqr(weight, stats, QuantSpec(3, 16), outlier=0.2)
    assert answer.outliers is not None
    groups, blocks = 128 // 16, 3  # 40 rows in blocks of 16
    expected = weight.numel() * 3 + 40 * groups * 3 + blocks * groups * 32 + 40 * groups * 3
    expected += answer.outliers.value.numel() * 32 + 41 * 32
    assert answer.storage_bits() == expected


def test_bad_options_are_errors():
    weight, stats = problem()
    with pytest.raises(ValueError, match="scale_bits"):
        spqr(weight, stats, QuantSpec(3), scale_bits=0)
