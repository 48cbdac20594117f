"""The blocked paths in float64 through the plain kernels: the codes of the naive references, all of them."""

from dataclasses import replace

import pytest
import torch

from quant.core.grid import fit_grid, fit_scale_zero
from quant.core.linalg import upper_factor
from quant.core.types import Grid, QuantSpec
from quant.kernels import columns as blocks
from quant.kernels.columns import TorchKernels
from quant.solvers.gptq import feedback_rounding, visiting_order
from quant.solvers.quantease import Descent, is_rounding_sweep
from tests.references import inputs, make_stats, naive_coordinate_descent, naive_gptq, objective64, weights

N_IN = 64
ORDERS = {"plain": {}, "act-order": {"act_order": True}, "static": {"static": True},
          "static, act-order": {"act_order": True, "static": True}, "group-aware": {"group_aware": True}}  # fmt: skip
SPECS = [QuantSpec(3), QuantSpec(3, 16), QuantSpec(2, 16, range="mse"), QuantSpec(4, symmetric=True)]


def equal(weight, gram, own, expected):
    assert torch.equal(own[0], expected[0])
    ours, reference = (objective64(weight - values, gram) for values in (own[1], expected[1]))
    assert abs(ours / reference - 1) < 1e-6


class FarKernels(TorchKernels):
    """Those of the reference, as ones with a reach; widths of what hears of each change."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.heard = reach, []

    def propagate_(self, correlation, change, gram):
        self.heard.append((change.shape[1], correlation.shape[1]))
        super().propagate_(correlation, change, gram)


@pytest.mark.parametrize("reach", [0, 40, 1000])
@pytest.mark.parametrize("order", ["plain", "act-order", "static, act-order"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_descent(spec, order, reach):
    """Also where columns far away hear of several blocks at once; 40 columns are two blocks of 16."""
    options = ORDERS[order]
    weight, stats = weights(10, N_IN), make_stats(inputs(N_IN, 300))
    visit = (
        torch.argsort(stats.diagonal, descending=True, stable=True) if options.get("act_order") else torch.arange(N_IN)
    )
    grid = fit_grid(weight, spec, stats.diagonal, None if options.get("static") or order == "plain" else visit)
    schedule = [is_rounding_sweep(k, 12) for k in range(12)]
    wide = Grid(grid.scale.double(), grid.zero, grid.g_idx[visit], grid.qmax)
    gram = stats.gram.double()
    descent = Descent(weight.double()[:, visit].contiguous(), gram[visit][:, visit].contiguous(), wide, 16)
    descent.kernels = FarKernels(reach)
    for rounding in schedule:
        descent.sweep(rounding)
    near, far = [(16, 32)] * 2, [(32, 32)]
    sweep = {0: [(16, N_IN)] * 4, 40: 2 * (near + far), 1000: [(16, N_IN)] * 4}[reach]
    assert descent.kernels.heard == sweep * len(schedule)
    torch.testing.assert_close(descent.correlation, descent.residual @ descent.gram, rtol=1e-9, atol=1e-9)
    codes = naive_coordinate_descent(weight, gram, grid, visit, schedule)
    in_order = descent.codes[:, torch.argsort(visit)]
    equal(weight, gram, (in_order, grid.dequantize(in_order)), (codes, grid.dequantize(codes)))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq(spec, order, monkeypatch):
    monkeypatch.setattr(blocks, "_chosen", {"cpu": TorchKernels()})
    options = ORDERS[order]
    weight, stats = weights(10, N_IN), make_stats(inputs(N_IN, 300))
    act = bool(options.get("act_order"))
    visit = visiting_order(stats.diagonal, spec, act, order == "group-aware")
    static = spec.group_size == -1 or bool(options.get("static"))
    grid = fit_grid(weight, spec, stats.diagonal, visit if act and not static else None)
    gram, importance = stats.gram.double(), stats.diagonal[visit]
    upper, ok = upper_factor(gram[visit][:, visit], 0.01)
    assert ok
    visited = replace(grid, scale=grid.scale.double(), g_idx=grid.g_idx[visit])
    fit = None if static else lambda part, columns: fit_scale_zero(part.float(), spec, importance[columns])
    layer = feedback_rounding(weight.double()[:, visit], upper, visited, spec, fit, 16)
    values = (layer.codes.double() - layer.zero[:, visited.g_idx]) * layer.scale[:, visited.g_idx]
    back = torch.argsort(visit)
    equal(
        weight,
        gram,
        (layer.codes[:, back], values[:, back]),
        naive_gptq(weight, gram, spec, 0.01, visit, grid if static else None),
    )
