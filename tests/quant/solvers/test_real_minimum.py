"""Every solver on grids with a real minimum: legal answers on the grid, monotone objectives, slow float64 references."""

from dataclasses import replace

import pytest
import torch

from quant.core.grid import fit_grid
from quant.core.linalg import objective
from quant.core.types import QuantizedWeight, QuantSpec
from quant.kernels.columns import TorchKernels
from quant.solvers import get_solver, solvers
from quant.solvers.gptq import gptq
from quant.solvers.gptq_quantease import gptq_quantease
from quant.solvers.quantease import Descent, quantease, search_scales
from quant.solvers.rtn import rtn
from tests.references import damped, inputs, make_stats, problem, weights

SOLVERS = {name: solve for name, solve in solvers().items() if name != "spqr"}
EVERYTHING = {"quantease": {"search_grid": True, "refit_grid": True}, "gptq_quantease": {"refit_grid": True}}
every_solver = pytest.mark.parametrize("name", SOLVERS)


def awkward(n_in: int) -> torch.Tensor:
    """Rows that are zero, constant, negative, positive, far from 0, and Gaussian ones."""
    rows = weights(10, n_in) * 0.2
    rows[0], rows[1] = 0.0, 0.7
    rows[2], rows[3] = -rows[2].abs() - 0.05, rows[3].abs() + 0.05
    rows[4] = rows[4] * 1e-2 + 3
    return rows


def error_of(answer: QuantizedWeight, weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The objective of every row, float64 [out]."""
    e = weight.double() - answer.dequantize().double()
    return ((e @ gram.double()) * e).sum(1)


@every_solver
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("n_in", "group"), [(32, -1), (32, 8), (1, -1)])
@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_awkward_rows_at_every_width(name, bits, n_in, group, range_):
    weight, stats = awkward(n_in), make_stats(inputs(n_in, 128))
    spec = QuantSpec(bits, group, range=range_, kind="real")
    answer = SOLVERS[name](weight, stats, spec, **EVERYTHING.get(name, {})).check()
    assert answer.spec == spec and answer.grid.minimum is not None
    value = answer.dequantize()
    assert torch.equal(value, answer.codes.float() * answer.grid.scale[:, answer.grid.g_idx] + answer.grid.minimum[:, answer.grid.g_idx])  # fmt: skip
    assert float(value[0].abs().max()) == 0
    torch.testing.assert_close(value[1], weight[1], rtol=2e-3, atol=0)
    nearest = rtn(weight, stats, spec)
    own, plain = (error_of(a, weight, stats.gram).sum() for a in (answer, nearest))
    beyond = bits == 1 and range_ == "minmax" and name in ("gptq", "gptaq")  # what they push on lies beyond the range
    assert own <= plain * (1 + 1e-5) or beyond


@every_solver
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("n_in", "group"), [(32, -1), (32, 8), (1, -1)])
@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_awkward_rows_on_fractional_zero_points(name, bits, n_in, group, range_):
    weight, stats = awkward(n_in), make_stats(inputs(n_in, 128))
    spec = QuantSpec(bits, group, range=range_, kind="fractional")
    answer = SOLVERS[name](weight, stats, spec, **EVERYTHING.get(name, {})).check()
    assert answer.spec == spec and float(answer.dequantize()[0].abs().max()) == 0
    nearest = rtn(weight, stats, spec)
    own, plain = (error_of(a, weight, stats.gram).sum() for a in (answer, nearest))
    greedy = name in ("gptq", "gptaq")  # what they push on may lie beyond the range
    assert own <= plain * (1 + 1e-5) or greedy


@pytest.mark.parametrize("spec", [(2, -1), (2, 16), (3, -1)], ids=str)
def test_fractional_zero_points_do_better_at_the_same_bits(spec):
    weight, stats = problem()
    integer, fractional = (
        quantease(weight, stats, QuantSpec(*spec, range="mse", kind=kind), **EVERYTHING["quantease"])
        for kind in ("integer", "fractional")
    )
    assert integer.storage_bits() == fractional.storage_bits()
    assert error_of(fractional, weight, stats.gram).sum() < error_of(integer, weight, stats.gram).sum()


@every_solver
@pytest.mark.parametrize("spec", [(1, -1), (2, -1), (2, 16), (3, 16)], ids=str)
def test_real_minima_do_better_than_integer_zeros(name, spec):
    weight, stats = problem()
    spec = QuantSpec(*spec, range="mse")
    options = EVERYTHING.get(name, {})
    integer, real = (
        error_of(SOLVERS[name](weight, stats, s, **options), weight, stats.gram).sum()
        for s in (spec, replace(spec, kind="real"))
    )
    assert real < integer  # measured: 0.21 to 0.95 of it


@every_solver
@pytest.mark.parametrize("kind", ["real", "fractional"])
def test_rows_do_not_know_of_each_other_and_answers_repeat(name, kind):
    weight, stats = problem()
    spec, options = QuantSpec(2, 16, range="mse", kind=kind), EVERYTHING.get(name, {})
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    answer, moved, again = (SOLVERS[name](w, stats, spec, **options) for w in (weight, weight[shuffled], weight))
    assert torch.equal(answer.codes[shuffled], moved.codes)
    assert torch.equal(answer.grid.minimum, again.grid.minimum) and torch.equal(answer.codes, again.codes)


@every_solver
@pytest.mark.parametrize("kind", ["real", "fractional"])
@pytest.mark.parametrize("factor", [2.0**-120, 2.0**-60, 2.0**-20, 2.0**60, 2.0**122])
def test_weights_of_any_magnitude(name, kind, factor):
    weight, stats = problem()
    spec = QuantSpec(3, 16, range="mse", kind=kind)
    answer, scaled = (SOLVERS[name](w, stats, spec).check() for w in (weight, weight * factor))
    own, other = (float(error_of(a, w, stats.gram).sum()) for a, w in ((answer, weight), (scaled, weight * factor)))
    assert abs(other / factor**2 / own - 1) < 0.05


def test_spqr_says_that_it_has_no_real_minima():
    weight, stats = problem()
    with pytest.raises(ValueError, match="drop --grid real, or use another method"):
        get_solver("spqr")(weight, stats, QuantSpec(3, 16, kind="real"))


def naive_descent(weight, gram, grid, rounding):
    """Coordinate descent in float64 with w = scale * q + minimum, a column at a time."""
    w, sigma = weight.double(), gram.double()
    scale, minimum = (t.double()[:, grid.g_idx] for t in (grid.scale, grid.minimum))
    codes, values = torch.zeros_like(w), w.clone()
    for is_rounding in rounding:
        for j in range(w.shape[1]):
            u = values[:, j] + (w - values) @ sigma[:, j] / sigma[j, j]
            if is_rounding:
                codes[:, j] = ((u - minimum[:, j]) / scale[:, j]).round().clamp(0, grid.qmax)
                u = scale[:, j] * codes[:, j] + minimum[:, j]
            values[:, j] = u
    return codes


@pytest.mark.parametrize("spec", [QuantSpec(2, kind="real"), QuantSpec(4, 16, kind="real")], ids=str)
def test_descent_against_float64(spec):
    weight, stats = problem()
    grid = fit_grid(weight, spec)
    answer = quantease(weight, stats, spec, grid=grid, num_iter=3, relax=False)
    assert torch.equal(answer.codes, naive_descent(weight, stats.gram, grid, [True] * 3).to(torch.uint8))


@pytest.mark.parametrize("order", [{}, {"act_order": True}, {"group_aware": True}, {"static_groups": True}], ids=str)
def test_gptq_against_float64(order):
    """Algorithm 1 by explicit inverses, with the grid of a group fitted to its compensated weights (min-max)."""
    weight, stats = problem()
    spec = QuantSpec(3, 16, kind="real")
    answer = gptq(weight, stats, spec, **order)
    visits = torch.arange(64)
    if "act_order" in order:
        visits = torch.argsort(stats.diagonal, descending=True, stable=True)
    if "group_aware" in order:
        groups = stats.diagonal.view(4, 16)
        inside = torch.argsort(groups, dim=1, descending=True, stable=True) + torch.arange(0, 64, 16)[:, None]
        visits = inside[torch.argsort(groups.sum(1), descending=True, stable=True)].flatten()
    w, h = weight.double()[:, visits].clone(), damped(stats.gram, 0.01)[visits][:, visits]
    codes = torch.zeros_like(w)
    for j in range(64):
        if j % 16 == 0:
            part = weight[:, visits[j : j + 16]] if "static_groups" in order else w[:, j : j + 16].float()
            fitted = fit_grid(part, QuantSpec(3, kind="real"))
            scale, minimum = fitted.scale.double(), fitted.minimum.double()
        codes[:, j] = ((w[:, j : j + 1] - minimum) / scale).round().clamp(0, 7).squeeze(1)
        off = w[:, j] - (scale * codes[:, j : j + 1] + minimum).squeeze(1)
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= torch.outer(off / inverse[0, 0], inverse[0])
    expected = codes[:, torch.argsort(visits)].to(torch.uint8)
    assert float((answer.codes != expected).float().mean()) < 0.01  # measured: none
    torch.testing.assert_close(answer.grid.minimum[:, answer.grid.g_idx[visits[-1]]], fitted.minimum[:, 0])


@pytest.mark.parametrize("group", [-1, 16])
@pytest.mark.parametrize("free", [False, True])
def test_refit_and_sweeps_only_lower_the_objective(group, free):
    weight, stats = problem()
    spec = QuantSpec(2, group, kind="real")
    descent = Descent(weight, stats.gram, fit_grid(weight, spec), 32)
    if free:
        descent.free = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.05
    last, fell = torch.full((24,), torch.inf), []
    descent.sweep(rounding=True)
    for _ in range(4):
        for step in (lambda: descent.refit(spec), lambda: descent.sweep(rounding=True)):
            step()
            torch.testing.assert_close(descent.correlation, descent.residual @ stats.gram, rtol=1e-3, atol=1e-2)
            now = (descent.residual.double() @ stats.gram.double() * descent.residual.double()).sum(1)
            assert bool((now <= last * (1 + 1e-5)).all())
            fell.append(float(now.sum()))
            last = now
    assert fell[-1] < 0.9 * fell[0]
    exact = torch.where(
        descent.free if free else torch.tensor(False),
        weight - descent.residual,
        descent.grid(descent.group).dequantize(descent.codes),
    )
    torch.testing.assert_close(weight - descent.residual, exact, rtol=1e-5, atol=1e-6)


def test_searched_grids_are_those_of_the_lowest_descents():
    weight, stats = problem()
    spec = QuantSpec(2, 16, kind="real")
    grid = fit_grid(weight, spec)
    own = search_scales(weight, stats.gram, grid, spec, 32)
    assert not torch.equal(own.scale, grid.scale) and not torch.equal(own.minimum, grid.minimum)
    plain, searched = (
        error_of(quantease(weight, stats, spec, search_grid=s), weight, stats.gram).sum() for s in (False, True)
    )
    assert searched < plain


def test_outliers_stand_beside_the_grid():
    weight, stats = problem()
    weight[:, 5] *= 8
    spec = QuantSpec(2, 16, kind="real")
    for options in (
        {"outlier": 0.02},
        {"outlier": 0.05, "structure_outlier": True},
        {"outlier": 0.02, "refit_grid": True},
    ):
        answer = quantease(weight, stats, spec, **options).check()
        plain = quantease(weight, stats, spec)
        assert answer.outliers is not None
        assert error_of(answer, weight, stats.gram).sum() < 0.8 * error_of(plain, weight, stats.gram).sum()


def test_gptq_quantease_starts_from_gptqs_groups():
    weight, stats = problem()
    spec = QuantSpec(2, 16, range="mse", kind="real")
    start, answer = gptq(weight, stats, spec), gptq_quantease(weight, stats, spec)
    assert torch.equal(start.grid.minimum, answer.grid.minimum)
    before, after = (objective(weight - a.dequantize(), stats.gram) for a in (start, answer))
    assert after < before


def test_the_loops_of_the_cpu_agree_with_torch(monkeypatch):
    weight, stats = problem()
    spec = QuantSpec(3, 16, kind="real")
    fast = [solve(weight, stats, spec) for solve in (gptq, quantease)]
    for module in ("gptq", "quantease"):
        monkeypatch.setattr(f"quant.solvers.{module}.kernels", lambda device: TorchKernels())
    for own, solve in zip(fast, (gptq, quantease), strict=True):
        assert torch.equal(own.codes, solve(weight, stats, spec).codes)
