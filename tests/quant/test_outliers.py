"""Outlier-aware QuantEase (Algorithm 3): exact counts, codes on the grid, a monotone objective, lower errors."""

import math
import sys

import pytest
import torch

from quant.core.grid import fit_grid
from quant.core.linalg import largest_eigenvalue, relative_error
from quant.core.types import Outliers, QuantSpec
from quant.quantease import Descent, OutlierSet, quantease
from tests.references import inputs, make_stats, naive_outlier_descent, objective64, weights

BUDGETS = [0.005, 0.01, 0.02]


def problem(seed: int = 0, n_out: int = 48, n_in: int = 128):
    return weights(n_out, n_in, seed), make_stats(inputs(n_in, 500, seed))


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("share", BUDGETS)
@pytest.mark.parametrize("spec", [QuantSpec(3), QuantSpec(2, 32), QuantSpec(4, symmetric=True)], ids=str)
def test_budget_grid_and_error(spec, share, structured):
    weight, stats = problem()
    plain = quantease(weight, stats, spec)
    answer = quantease(weight, stats, spec, outlier=share, structure_outlier=structured).check()
    assert answer.outliers is not None and answer.outliers.whole_columns == structured
    whole = 128 if structured else weight.numel()
    count = max(1, round(share * whole))
    assert answer.outliers.value.numel() == count * (48 if structured else 1)
    if structured:
        assert (answer.outliers.index % 128).unique().numel() == count
    rest = torch.ones(weight.numel(), dtype=torch.bool)
    rest[answer.outliers.index] = False
    on_grid = answer.grid.dequantize(answer.codes).flatten()
    assert torch.equal(answer.dequantize().flatten()[rest], on_grid[rest]), "all others lie on the grid"
    assert int(answer.codes.max()) <= spec.qmax
    errors = [relative_error(weight, a.dequantize(), stats.gram) for a in (answer, plain)]
    assert errors[0] < errors[1]


def test_more_outliers_less_error():
    weight, stats = problem()
    errors = [
        relative_error(weight, quantease(weight, stats, QuantSpec(3), outlier=s).dequantize(), stats.gram)
        for s in (0.0, *BUDGETS)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("alpha", [1.0, 0.1])
@pytest.mark.parametrize("structured", [False, True])
def test_equals_the_published_loop(structured, alpha):
    weight, stats = problem(n_out=6, n_in=40)
    share = 0.05
    answer = quantease(
        weight, stats, QuantSpec(3), outlier=share, structure_outlier=structured, num_iter=2, relax=False, outlier_metric="weight",
        alpha=alpha,
    )  # fmt: skip
    count = round(share * (40 if structured else 240))
    codes, outliers = naive_outlier_descent(weight, stats.gram, answer.grid, count, structured, 2, alpha)
    assert float((answer.codes != codes).float().mean()) < 0.02
    expected = objective64(weight - answer.grid.dequantize(codes) - outliers, stats.gram)
    found = objective64(weight - answer.dequantize(), stats.gram)
    assert abs(found / expected - 1) < 2e-3  # outliers are stored in float16
    assert answer.outliers is not None
    kept = torch.zeros(240).index_add_(0, answer.outliers.index, answer.outliers.value.float())
    values = kept.view(6, 40) + answer.grid.dequantize(answer.codes) - answer.grid.dequantize(codes)
    assert float((values - outliers).abs().max()) < 2e-3, "the values follow the step"


@pytest.mark.parametrize("metric", ["weight", "gram"])
@pytest.mark.parametrize("structured", [False, True])
def test_objective_never_rises(structured, metric):
    for seed in range(3):
        weight, stats = problem(seed)
        outliers = OutlierSet(weight, stats.gram, 0.02, structured, 1.0, metric)
        descent = Descent(weight, stats.gram, fit_grid(weight - outliers.values, QuantSpec(3)), 32)
        descent.target = weight - outliers.values
        descent.sweep(rounding=True)
        trace = [objective64(descent.residual, stats.gram)]
        for _ in range(6):
            outliers.step_(descent)
            trace.append(objective64(descent.residual, stats.gram))
            descent.sweep(rounding=True)
            trace.append(objective64(descent.residual, stats.gram))
        descent.target, descent.free = weight, outliers.chosen
        for _ in range(4):
            descent.sweep(rounding=True)
            trace.append(objective64(descent.residual, stats.gram))
        assert all(b <= a * (1 + 1e-5) for a, b in zip(trace, trace[1:], strict=False)), trace
        assert trace[-1] < 0.9 * trace[0]
        drift = descent.correlation.double() - descent.residual.double() @ stats.gram.double()
        assert float(drift.abs().max() / (descent.residual.abs() @ stats.gram.abs()).max()) < 1e-5


def test_values_of_the_outliers_are_where_the_gradient_vanishes():
    """In the last third of the sweeps they descend exactly; the gradient steps before would leave some."""
    weight, stats = problem()
    answer = quantease(weight, stats, QuantSpec(3), outlier=0.01)
    assert answer.outliers is not None
    step = (((weight - answer.dequantize()) @ stats.gram) / stats.diagonal).flatten()[answer.outliers.index]
    assert float(step.abs().mean()) < 0.01 * float(answer.grid.scale.mean())


@pytest.mark.parametrize("structured", [False, True])
def test_outliers_with_act_order_are_in_their_own_places(structured):
    weight, stats = problem()
    options = {"outlier": 0.02, "structure_outlier": structured}
    plain, found = (quantease(weight, stats, QuantSpec(3, 32), act_order=o, **options).check() for o in (False, True))
    errors = [relative_error(weight, a.dequantize(), stats.gram) for a in (plain, found)]
    assert errors[1] < 1.1 * errors[0]
    assert errors[1] < relative_error(
        weight, quantease(weight, stats, QuantSpec(3, 32), act_order=True).dequantize(), stats.gram
    )


def test_grids_are_searched_without_the_outliers(monkeypatch):
    module, seen = sys.modules["quant.quantease"], []
    search = module.searched
    monkeypatch.setattr(module, "searched", lambda target, *rest: seen.append(target) or search(target, *rest))
    weight, stats = problem()
    quantease(weight, stats, QuantSpec(3), outlier=0.01, search_grid=True)
    chosen = OutlierSet(weight, stats.gram, 0.01, False, 1.0, "weight").chosen
    assert torch.equal(seen[0], weight.masked_fill(chosen, 0))


@pytest.mark.parametrize("structured", [False, True])
def test_inputs_that_are_zero_or_cancel(structured):
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    paired = torch.stack([x, -x], -1).reshape(200, 16)  # the largest eigenvector is orthogonal to the diagonal
    for stats in (make_stats(torch.zeros(50, 16)), make_stats(paired)):
        answer = quantease(weights(16, 16), stats, QuantSpec(3), outlier=0.1, structure_outlier=structured).check()
        assert answer.outliers is not None and bool(torch.isfinite(answer.outliers.value).all())
    exact = float(torch.linalg.eigvalsh(make_stats(paired).gram.double())[-1])
    assert largest_eigenvalue(make_stats(paired).gram) == pytest.approx(exact, rel=0.02)


def test_stored_bits_count_indices():
    weight, stats = problem()
    plain = quantease(weight, stats, QuantSpec(3), num_iter=1)
    some, columns = (
        quantease(weight, stats, QuantSpec(3), num_iter=1, outlier=0.01, structure_outlier=s) for s in (False, True)
    )
    count = round(0.01 * weight.numel())
    assert some.storage_bits() - plain.storage_bits() == count * 32 + 49 * 32
    assert columns.storage_bits() - plain.storage_bits() == 48 * 16 + 32
    assert Outliers(torch.arange(3), torch.ones(3).half()).storage_bits(2, 70000) == 3 * 48 + 3 * 32


def test_nothing_left_to_quantize_is_an_error():
    weight, stats = problem()
    for share, said in ((1.0, "below 1"), (0.6, "nothing to quantize")):
        with pytest.raises(ValueError, match=said):
            quantease(weight, stats, QuantSpec(3), outlier=share)
    with pytest.raises(ValueError, match="columns"):
        quantease(weights(4, 1), make_stats(inputs(1, 9)), QuantSpec(3), outlier=0.5, structure_outlier=True)


def test_an_outlier_too_large_for_float16_is_an_error():
    weight, stats = problem()
    with pytest.raises(ValueError, match="float16"):
        quantease(weight * 1e6, stats, QuantSpec(3), outlier=0.01).check()


def test_largest_eigenvalue():
    for seed in range(3):
        gram = make_stats(inputs(60, 200, seed)).gram
        exact = float(torch.linalg.eigvalsh(gram.double())[-1])
        assert exact * 0.98 < largest_eigenvalue(gram) <= exact * (1 + 1e-5)
    assert largest_eigenvalue(torch.zeros(4, 4)) == 0 and math.isfinite(largest_eigenvalue(torch.eye(1) * 1e30))
