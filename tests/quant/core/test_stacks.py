"""Layers solved as one stack get the answers that they get one by one."""

from functools import partial

import pytest
import torch

from quant.core.gram import GramStats
from quant.core.linalg import SingularGramError, damped_factor, objective
from quant.core.stacks import StackedStats, add_times_, for_rows, times
from quant.core.types import QuantSpec
from quant.solvers.gptq import gptq
from quant.solvers.quantease import quantease
from quant.solvers.rtn import rtn
from tests.references import inputs, make_stats

LAYERS, ROWS, COLUMNS = 3, 35, 96
SOLVERS = {
    "rtn": rtn,
    "gptq": gptq,
    "gptq, static groups": partial(gptq, static_groups=True),
    "quantease": partial(quantease, num_iter=6),
    "quantease, searched": partial(quantease, num_iter=6, search_grid=True, refit_grid=True),
}
SPECS = {
    "rows": QuantSpec(3),
    "groups": QuantSpec(3, 32, range="mse"),
    "real": QuantSpec(2, 16, kind="real", range="mse"),
    "fractional": QuantSpec(3, 32, kind="fractional"),
    "symmetric": QuantSpec(4, 48, symmetric=True, range="mse"),
    "nvfp4": QuantSpec(4, 16, kind="nvfp4", range="mse"),
    "fp8": QuantSpec(8, kind="fp8"),
}


def layers():
    """Weights and inputs of very different sizes; one layer has a dead column, and one has seen fewer tokens than columns."""
    generator = torch.Generator().manual_seed(3)
    tokens = (400, 40, 300)
    x = [inputs(COLUMNS, n, seed=i) * 10.0**i for i, n in enumerate(tokens)]
    x[2][:, 5] = 0
    weights = [torch.randn(ROWS, COLUMNS, generator=generator) * 3.0**i for i in range(LAYERS)]
    return weights, [make_stats(one) for one in x]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_stack_is_its_layers(name, spec):
    """Codes but for those on an edge, grids, and the objective of every layer."""
    weights, stats = layers()
    solve = SOLVERS[name]
    whole = solve(torch.cat(weights), StackedStats(stats, ROWS), SPECS[spec]).check()
    for number, (weight, own) in enumerate(zip(weights, stats, strict=True)):
        rows = slice(number * ROWS, (number + 1) * ROWS)
        alone = solve(weight, own, SPECS[spec])
        assert (whole.codes[rows] != alone.codes).float().mean() < 0.02  # products are summed in another order
        error = objective(weight - whole.dequantize()[rows], own.gram)
        assert error == pytest.approx(objective(weight - alone.dequantize(), own.gram), rel=0.01)
        assert error < objective(weight - rtn(weight, own, SPECS[spec]).dequantize(), own.gram) * (1 + 1e-6)
        close = torch.isclose(whole.grid.scale[rows], alone.grid.scale, rtol=1e-3)
        assert close.float().mean() > 0.95
    if name == "rtn":
        assert torch.equal(
            whole.codes, torch.cat([rtn(w, s, SPECS[spec]).codes for w, s in zip(weights, stats, strict=True)])
        )


def test_products_of_parts_are_products():
    rows, matrices = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    expected = torch.cat([rows[2 * p : 2 * p + 2] @ matrices[p] for p in range(3)])
    torch.testing.assert_close(times(rows, matrices), expected)
    total = torch.ones(6, 9, dtype=torch.float64)
    add_times_(total[:, 4:], rows, matrices)  # in place, in a slice of columns
    torch.testing.assert_close(total[:, 4:], expected + 1)
    assert torch.equal(total[:, :4], torch.ones(6, 4, dtype=torch.float64))
    assert for_rows(torch.tensor([1.0, 2.0, 3.0]), 6).tolist() == [1, 1, 2, 2, 3, 3]


def test_one_singular_matrix_does_not_damp_the_others():
    good, flat = make_stats(inputs(8, 40, seed=1)).gram, torch.ones(8, 8)
    with pytest.raises(SingularGramError):
        damped_factor(torch.stack([good, flat]), 0.0)
    factors, used = damped_factor(torch.stack([good, flat]), 0.0, auto_damp=True)
    assert used > 0 and torch.equal(factors[0], damped_factor(good, 0.0)[0])
    assert torch.equal(factors[1], damped_factor(flat, used)[0])


def test_inputs_that_are_not_finite_are_told():
    bad = GramStats.from_gram(torch.full((4, 4), torch.nan))
    with pytest.raises(Exception, match="not finite"):
        StackedStats([GramStats.from_gram(torch.eye(4)), bad], 2).check()
