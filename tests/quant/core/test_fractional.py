"""Fractional zero points: what is stored is the nearest that can be, by brute force, and refits are least squares."""

from dataclasses import replace

import pytest
import torch

from quant.core.grid import fit_grid, in_float16
from quant.core.real_grid import refit_scale_minimum
from quant.core.stored import stored_fraction
from quant.core.types import QuantizedWeight, QuantSpec, is_short
from tests.references import inputs, make_stats, weights

SHORT = (torch.arange(1, 31 << 6, dtype=torch.int32) << 4).to(torch.int16).view(torch.float16).double()  # all of them


def test_short_scales_are_the_float16_numbers_of_eleven_bits():
    assert torch.isfinite(SHORT).all() and len(SHORT) == 31 * 64 - 1 and float(SHORT[0]) == 2.0**-20


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_the_nearest_scale_and_zero_by_brute_force(bits):
    generator = torch.Generator().manual_seed(bits)
    scale = (torch.rand(300, generator=generator) * 20 - 14).exp2()
    minimum = -scale * torch.rand(300, generator=generator) * 2**bits
    own, lowest = stored_fraction(scale, minimum, QuantSpec(bits, kind="fractional"))
    nearest = (SHORT - scale[:, None].double()).abs().amin(1)
    assert bool(((own.double() - scale.double()).abs() <= nearest * (1 + 1e-12)).all())
    every = torch.arange(32 << bits, dtype=torch.float64) / 32
    levels = -own[:, None].double() * every
    assert torch.equal((levels - lowest[:, None].double()).abs().amin(1), torch.zeros(300, dtype=torch.float64))
    best = (levels - minimum[:, None].double()).abs().amin(1)
    torch.testing.assert_close((lowest.double() - minimum.double()).abs(), best, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_zero_points_stay_in_their_range_and_scales_far_out_keep_their_digits(bits):
    spec = QuantSpec(bits, kind="fractional")
    scale, minimum = stored_fraction(
        torch.tensor([0.1, 0.1, 1e-9, 3e7, 1e-45]), torch.tensor([0.5, -9.0, 0.0, 0.0, 0.0]), spec
    )
    assert minimum[0] == 0 and minimum[1] == -scale[1] * (2**bits - 1 / 32)
    assert bool(((scale[2:4] / torch.tensor([1e-9, 3e7]) - 1).abs() < 2.0**-7).all()) and scale[4] > 0
    mantissa, _ = torch.frexp(scale)
    assert torch.equal((mantissa * 128).round(), mantissa * 128)


@pytest.mark.parametrize("largest", [1.0, 3.4e38, 65504.0])
def test_no_level_is_beyond_the_largest_number(largest):
    spec = QuantSpec(3, kind="fractional", largest=largest)
    rows = weights(6, 16)
    rows[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.5, 0.0])
    rows = rows.clamp(-1, 1) * largest
    grid = fit_grid(rows, spec)
    QuantizedWeight(grid.quantize(rows), grid, spec).check()
    assert bool((grid.values(torch.arange(8.0).expand(6, -1)).abs() <= largest).all())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_refit_never_raises_the_objective_and_comes_near_least_squares(bits):
    spec = QuantSpec(bits, kind="fractional")
    rows = weights(10, 17) + 0.1
    gram = make_stats(inputs(17, 64)).gram
    grid = fit_grid(rows, spec)
    codes = grid.quantize(rows * 0.8).float()
    correlation = (rows - grid.values(codes)) @ gram
    scale, minimum = refit_scale_minimum(codes, grid.scale[:, 0], grid.minimum[:, 0], gram, correlation, spec=spec)

    def objective(s, m):
        e = rows.double() - codes.double() * s[:, None].double() - m[:, None].double()
        return ((e @ gram.double()) * e).sum(1)

    after, before = objective(scale, minimum), objective(grid.scale[:, 0], grid.minimum[:, 0])
    assert bool((after <= before * (1 + 1e-6)).all()) and float(after.sum()) < float(before.sum())
    for factor in (2.0**-6, -(2.0**-6)):  # nor does a neighbour do better by much
        other = stored_fraction(scale * (1 + factor), minimum, spec)
        assert float(objective(*other).sum()) > 0.9 * float(after.sum())
    stored = replace(grid, scale=scale[:, None], minimum=minimum[:, None])
    QuantizedWeight(codes.to(torch.uint8), stored, spec).check()


def test_rows_that_are_almost_zero_get_short_scales_where_the_layer_has_them():
    rows = weights(8, 32) * 0.05
    rows[3] *= 1e-7
    spec = QuantSpec(3, kind="fractional")
    grid = fit_grid(rows, spec)
    answer = QuantizedWeight(grid.quantize(rows), grid, spec).check()
    assert not is_short(grid, spec)
    stored = in_float16(answer, rows).check()
    assert is_short(stored.grid, spec) and stored.bits_per_weight() == 3 + 19 / 32
    assert torch.equal(stored.dequantize()[:3], answer.dequantize()[:3])
    assert float(stored.dequantize()[3].abs().max()) < 2.0**-18


def test_check_refuses_other_zero_points():
    rows, spec = weights(4, 16), QuantSpec(3, kind="fractional")
    grid = fit_grid(rows, spec)
    good = QuantizedWeight(grid.quantize(rows), grid, spec).check()
    for wrong in (grid.minimum * 1.01, grid.minimum * 0 + grid.scale, -9 * grid.scale):
        with pytest.raises(ValueError, match="zero points must be multiples of 1/32 from 0 to below 8"):
            replace(good, grid=replace(grid, minimum=wrong)).check()
