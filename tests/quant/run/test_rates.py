"""What a plan says a solver takes, against machines that are made up and layers that are solved."""

from __future__ import annotations

import math

import pytest
import torch

from quant.run import rates
from quant.run.config import RunConfig
from quant.run.rates import Rates, SolverCost, solver_cost
from quant.solvers import declaration_of, with_defaults

CPU, GFLOPS = torch.device("cpu"), 1e9


def of_machine(monkeypatch: pytest.MonkeyPatch, seconds, solver: str = "gptq", float32: float = GFLOPS) -> SolverCost:
    monkeypatch.setattr(rates, "_solving", lambda device, run, n_out, n_in: seconds(n_out, n_in))
    return solver_cost(CPU, RunConfig(solver=solver, wbits=4), Rates(GFLOPS, float32))


@pytest.mark.parametrize(
    ("solver", "flops"), [("gptq", lambda m, n: n**3 / 3 + m * n**2), ("quantease", lambda m, n: 60.0 * m * n**2)]
)
def test_products_at_their_rate_and_what_is_measured_besides(monkeypatch, solver, flops) -> None:
    def seconds(m: int, n: int) -> float:
        return flops(m, n) / GFLOPS + 3e-8 * n**2 + 1e-7 * m * n

    cost = of_machine(monkeypatch, seconds, solver)
    for layer in ((4096, 4096), (14336, 4096), (4096, 14336), (1, 64)):
        assert cost.seconds(*layer) == pytest.approx(seconds(*layer))


def test_products_that_are_faster_than_their_rate_keep_their_own(monkeypatch) -> None:
    """QuantEase's sweeps multiply less where few codes change."""
    cost = of_machine(monkeypatch, lambda m, n: 30.0 * m * n**2 / GFLOPS, "quantease")
    assert cost.seconds(4096, 4096) == pytest.approx(30 * 4096**3 / GFLOPS)


def test_without_declared_products_rows_grow_with_the_square(monkeypatch) -> None:
    assert declaration_of("gptaq").flops(10, 10, {}) == 0
    cost = of_machine(monkeypatch, lambda m, n: 2e-9 * m * n**2 + 1e-8 * n**2, "gptaq")
    assert cost.seconds(300, 2048) == pytest.approx((2e-9 * 300 + 1e-8) * 2048**2)


def test_rounding_takes_what_its_weights_do(monkeypatch) -> None:
    cost = of_machine(monkeypatch, lambda m, n: 5e-9 * m * n, "rtn")
    assert cost.seconds(14336, 4096) == pytest.approx(5e-9 * 14336 * 4096)


def test_noise_makes_nothing_negative(monkeypatch) -> None:
    for few, many in ((1.0, 0.5), (0.0, 0.0), (1e-9, 1e-9)):
        cost = of_machine(monkeypatch, lambda m, n, few=few, many=many: few if m == 16 else many)
        assert all(part >= 0 for part in cost[1:]) and 0 <= cost.seconds(4096, 4096) < math.inf


def test_nothing_is_solved_at_full_bits() -> None:
    assert solver_cost(CPU, RunConfig(wbits=16), Rates(GFLOPS, GFLOPS)).seconds(4096, 4096) == 0


@pytest.mark.parametrize("solver", ["gptq", "quantease", "gptq_quantease", "spqr"])
def test_declared_products_are_of_every_option(solver: str) -> None:
    flops, options = declaration_of(solver).flops, with_defaults(solver, {})
    assert flops(64, 128, options) >= 64 * 128**2
    if "num_iter" in options:
        more = flops(64, 128, options | {"num_iter": options["num_iter"] + 1})
        assert more - flops(64, 128, options) == 2 * 64 * 128**2
