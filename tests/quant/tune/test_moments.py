"""Moments in half precision: neighbours, the exact mean, and what rounding to the nearest would lose."""

from __future__ import annotations

import pytest
import torch

from quant.tune.moments import chance, halved


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (2, 3, 4)])
def test_either_neighbour_with_the_probability_that_keeps_the_mean(shape):
    exact = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    down, draws = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32).double(), 4000
    up = ((exact.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32).double()
    total, generator = torch.zeros(shape).double(), chance(0, 1, 2)
    for _ in range(draws):
        answer = halved(exact, generator).double()
        assert bool(((answer == down) | (answer == up)).all())
        total += answer
    step = (up - down).abs()
    assert bool(((total / draws - exact.double()).abs() < 5 * step * 0.5 / draws**0.5).all())


def test_what_half_precision_holds_stays():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-120, 3.0e38]).to(torch.bfloat16).float()
    assert torch.equal(halved(exact, chance(3, 4, 5)).float(), exact)


def test_a_second_moment_falls_as_it_should_where_the_nearest_would_stay():
    v = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    nearest = v.clone()
    for step in range(700):
        v = halved(v.float() * 0.999, chance(0, step, 0))
        nearest = (nearest.float() * 0.999).to(torch.bfloat16)
    assert bool((nearest == 1).all())
    assert float(v.float().mean()) == pytest.approx(0.999**700, rel=0.02)


def test_chance_is_that_of_seed_step_and_place_alone():
    exact = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    draws = [halved(exact, chance(*which)) for which in ((1, 2, 3), (1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])
    chance(2**63 - 1, 10**7, 500)  # the largest seed that a command takes
