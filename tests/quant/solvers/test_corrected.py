"""GPTAQ and Qronos beside slow references written from the papers' equations, in float64 with explicit inverses."""

import pytest
import torch

from quant.core.gram import GramStats
from quant.core.grid import fit_grid
from quant.core.target import Correction, corrected
from quant.core.types import QuantSpec
from quant.solvers.gptaq import gptaq
from quant.solvers.gptq import gptq
from quant.solvers.qronos import qronos
from quant.solvers.quantease import quantease
from tests.references import inputs, weights


def moved_stats(n_in=48, tokens=300, shift=0.3, dead=()):
    """Statistics of inputs that are not those of the original."""
    full = inputs(n_in, tokens)
    noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(9))
    x = full + shift * noise * full.std()
    x[:, list(dead)], full[:, list(dead)] = 0, 0
    stats = GramStats(n_in)
    stats.update(x, full)
    return stats, x.double(), full.double()


def rounded(value, grid, column):
    g = int(grid.g_idx[column])
    scale, zero = grid.scale[:, g].double(), grid.zero[:, g].double()
    code = torch.clamp(torch.round(value / scale) + zero, 0, grid.qmax)
    return code, (code - zero) * scale


def damped64(x, percdamp):
    gram = x.T @ x
    dead = gram.diagonal() == 0
    gram = gram + percdamp * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    gram[dead, dead] = 1.0
    return gram


def reference_gptaq(weight, x, full, grid, percdamp, alpha, order):
    """Column by column: GPTQ's error and c_j ΔX_j, each projected on the columns that are left."""
    h, w = damped64(x, percdamp), weight.double().clone()
    codes = torch.zeros_like(w)
    for place, j in enumerate(order):
        rest = order[place + 1 :]
        now = w[:, j].clone()
        codes[:, j], value = rounded(now, grid, j)
        left = order[place:]
        inverse = torch.linalg.inv(h[left][:, left])
        w[:, rest] -= torch.outer((now - value) / inverse[0, 0], inverse[0, 1:])
        if len(rest):
            lacking = (full[:, j] - x[:, j]) @ x[:, rest]
            w[:, rest] += alpha * torch.outer(now, lacking @ torch.linalg.inv(h[rest][:, rest]))
    return codes


def reference_qronos(weight, x, full, grid, percdamp, order):
    """The two minimizations of the paper, each solved by itself; λ on both sides as ‖√λ (w - ŵ)‖²."""
    n_in = x.shape[1]
    rows = (percdamp * (x.T @ x).diagonal().mean()).sqrt() * torch.eye(n_in, dtype=torch.float64)
    x, full = torch.cat([x, rows]), torch.cat([full, rows])
    wanted, w = full @ weight.double().T, weight.double().clone()
    codes = torch.zeros_like(w)
    for place, j in enumerate(order):
        others = [k for k in range(n_in) if k != j]
        left = wanted - x[:, others] @ w[:, others].T
        best = (x[:, j] @ left) / (x[:, j] @ x[:, j])
        codes[:, j], w[:, j] = rounded(best, grid, j)
        done, rest = order[: place + 1], order[place + 1 :]
        if len(rest):
            w[:, rest] = torch.linalg.lstsq(x[:, rest], wanted - x[:, done] @ w[:, done].T).solution.T
    return codes


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"block_size": 7}], ids=str)
def test_gptaq_is_the_papers(alpha, options):
    stats, x, full = moved_stats()
    weight, spec = weights(6, 48), QuantSpec(3)
    answer = gptaq(weight, stats, spec, gptaq_alpha=alpha, **options).check()
    order = (
        torch.argsort(stats.diagonal, descending=True, stable=True) if "act_order" in options else torch.arange(48)
    ).tolist()
    codes = reference_gptaq(weight, x, full, fit_grid(weight, spec), 0.01, alpha, order)
    assert torch.equal(answer.codes.double(), codes)
    assert not torch.equal(answer.codes, gptq(weight, stats, spec).codes)


@pytest.mark.parametrize("options", [{}, {"act_order": True}], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(3), QuantSpec(2, 16)], ids=str)
def test_qronos_is_the_papers(spec, options):
    stats, x, full = moved_stats()
    weight = weights(6, 48)
    order = (
        torch.argsort(stats.diagonal, descending=True, stable=True) if "act_order" in options else torch.arange(48)
    ).tolist()
    codes = reference_qronos(weight, x, full, fit_grid(weight, spec), 0.01, order)
    assert torch.equal(qronos(weight, stats, spec, **options).check().codes.double(), codes)


@pytest.mark.parametrize("solve", [gptaq, qronos])
def test_dead_columns_and_one_column(solve):
    stats, x, full = moved_stats(dead=(0, 5))
    weight, spec = weights(4, 48), QuantSpec(3)
    answer = solve(weight, stats, spec).check()
    nearest = fit_grid(weight, spec).quantize(weight)
    assert torch.equal(answer.codes[:, [0, 5]], nearest[:, [0, 5]])
    stats, x, full = moved_stats(n_in=1)
    solve(weights(4, 1), stats, spec).check()


def test_equal_inputs_leave_gptq():
    stats, _, _ = moved_stats(shift=0.0)
    weight = weights(6, 48)
    for spec in (QuantSpec(3), QuantSpec(3, 16)):
        assert torch.equal(gptaq(weight, stats, spec).codes, gptq(weight, stats, spec).codes)
        static = gptq(weight, stats, spec, static_groups=True)
        assert torch.equal(qronos(weight, stats, spec).codes, static.codes)


def test_groups_are_fitted_when_they_are_reached():
    stats, _, _ = moved_stats()
    weight, spec = weights(6, 48), QuantSpec(2, 16)
    dynamic, static = (gptaq(weight, stats, spec, static_groups=fixed) for fixed in (False, True))
    assert torch.equal(static.grid.scale, fit_grid(weight, spec).scale)
    assert torch.equal(dynamic.grid.scale[:, 0], static.grid.scale[:, 0])
    assert not torch.equal(dynamic.grid.scale[:, 1], static.grid.scale[:, 1])


@pytest.mark.parametrize("solve", [gptaq, qronos])
def test_a_cross_term_that_was_not_collected(solve):
    stats = GramStats(8)
    stats.update(torch.randn(20, 8))
    with pytest.raises(ValueError, match="no cross term"):
        solve(weights(2, 8), stats, QuantSpec(3))


def test_what_each_leaves_of_the_originals_outputs():
    full = inputs(48, 600)
    x = full @ (0.8 * torch.eye(48) + 0.02 * torch.randn(48, 48, generator=torch.Generator().manual_seed(2)))
    stats = GramStats(48)
    stats.update(x, full)
    x, full = x.double(), full.double()
    weight, spec = weights(32, 48), QuantSpec(3)

    def error(answer):
        return float((full @ weight.double().T - x @ answer.dequantize().double().T).square().sum())

    target, damped = corrected(weight, stats, Correction())
    plain, own, other = (error(solve(weight, stats, spec)) for solve in (gptq, gptaq, qronos))
    descent = error(quantease(target, damped, spec, grid=fit_grid(weight, spec)))
    assert other < own < 0.8 * plain, (plain, own, other, descent)
    assert descent < other
    # Coordinate descent on the target is u_j = Ŵ_j + (C_j - (ŴĤ)_j) / Ĥ_jj: no single code may lower its objective.
    answer = quantease(target, damped, spec, grid=fit_grid(weight, spec))
    gram, wanted = damped.gram.double(), target.double() @ damped.gram.double()
    values = answer.dequantize().double()
    gradient = (wanted - values @ gram) / gram.diagonal()
    better, _ = rounded_all(values + gradient, answer.grid)
    assert float((better != answer.codes.double()).double().mean()) < 0.01


def rounded_all(value, grid):
    columns = [rounded(value[:, j], grid, j) for j in range(value.shape[1])]
    return torch.stack([code for code, _ in columns], 1), torch.stack([v for _, v in columns], 1)
