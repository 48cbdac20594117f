import itertools
import math
from dataclasses import replace

import pytest
import torch

from quant.blocks.weights import BlockWeights
from quant.core.grid import (
    SMALLEST_HALF,
    fit_grid,
    fit_scale_zero,
    in_float16,
    largest_of,
    misfit_float16,
    range_to_grid,
)
from quant.core.types import QuantizedWeight, QuantSpec
from quant.learn.fake_quant import fake_quantize, grid_of, group_range
from quant.learn.omniquant import WeightClip
from tests.references import weights

SPECS = [
    QuantSpec(bits, group, symmetric, kind)
    for bits, group, symmetric, kind in itertools.product((1, 2, 3, 4, 8), (-1, 16), (False, True), ("minmax", "mse"))
    if not (symmetric and bits == 1)
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_the_nearest_on_the_grid(spec: QuantSpec) -> None:
    weight = weights(12, 48)
    grid = fit_grid(weight, spec, torch.rand(48) + 0.1)
    codes = grid.quantize(weight)
    QuantizedWeight(codes, grid, spec).check()
    scale, zero = grid.scale.double()[:, grid.g_idx], grid.zero.double()[:, grid.g_idx]
    every = scale[..., None] * (torch.arange(spec.numbers.levels, dtype=torch.float64) - zero[..., None])
    nearest = (every - weight.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close((grid.dequantize(codes).double() - weight.double()).abs(), nearest, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_minmax_covers_the_range_within_one_step(bits: int) -> None:
    weight = weights(64, 200)
    grid = fit_grid(weight, QuantSpec(bits))
    error = (grid.dequantize(grid.quantize(weight)) - weight).abs()
    # Half a step inside; up to one step at the ends, since the zero point is rounded to an integer.
    assert bool((error <= grid.scale * (1.01 if bits > 1 else 2)).all())
    assert bool((grid.zero >= (1 if bits > 1 else 0)).all())


def test_symmetric_zero_point_is_the_middle_code() -> None:
    for bits in range(2, 9):
        assert fit_grid(weights(4, 32), QuantSpec(bits, symmetric=True)).zero.unique().tolist() == [2 ** (bits - 1)]
    assert fit_grid(weights(4, 32), QuantSpec(2, symmetric=True, levels=5)).zero.unique().tolist() == [2]


def test_zero_point_is_never_zero_and_the_top_stays_covered() -> None:
    positive = weights(8, 64).abs() + 0.5
    for bits in (2, 3, 4, 8):
        grid = fit_grid(positive, QuantSpec(bits))
        assert bool((grid.zero == 1).all())
        top = grid.scale * (grid.qmax - grid.zero)
        assert bool((top >= positive.amax(1, keepdim=True) * 0.998).all())


def test_mse_never_has_more_weighted_error_than_minmax_and_wins_with_an_outlier() -> None:
    weight, importance = weights(16, 64), torch.rand(64) + 0.01
    weight[:, 3] *= 6
    importance[3] = 1e-3
    for symmetric in (False, True):
        error = {}
        for kind in ("minmax", "mse"):
            grid = fit_grid(weight, QuantSpec(3, symmetric=symmetric, range=kind), importance)
            error[kind] = ((grid.dequantize(grid.quantize(weight)) - weight).square() * importance).sum(1)
        assert bool((error["mse"] <= error["minmax"] * (1 + 1e-5)).all())
        assert float(error["mse"].sum()) < 0.8 * float(error["minmax"].sum())  # measured: 0.18 to 0.33


@pytest.mark.parametrize(("bits", "power"), [(2, 2.4), (3, 2.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_the_best_of_all_shrinks_by_brute_force(bits: int, power: float, symmetric: bool) -> None:
    weight, importance = weights(20, 24), torch.rand(24)
    spec = QuantSpec(bits, range="mse", symmetric=symmetric)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        codes = (torch.round(weight / scale[:, None]) + zero[:, None]).clamp(0, spec.qmax)
        return ((weight - scale[:, None] * (codes - zero[:, None])).abs().pow(power) * importance).sum(1)

    lo, hi = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    shrunk = torch.stack([error(*range_to_grid(lo * (1 - i / 100), hi * (1 - i / 100), spec)) for i in range(80)]).amin(
        0
    )
    chosen = error(*fit_scale_zero(weight, spec, importance))
    if symmetric:
        torch.testing.assert_close(chosen, shrunk)
    else:  # the ends move by themselves too
        # measured: at most 0.962
        assert bool((chosen <= shrunk * (1 + 1e-5)).all()) and float(chosen.sum()) < 0.97 * float(shrunk.sum())


def test_awkward_rows() -> None:
    rows = torch.stack([torch.zeros(32), torch.full((32,), 0.7), torch.full((32,), -3.0), torch.linspace(-1, 1, 32)])
    for spec in (QuantSpec(3), QuantSpec(3, symmetric=True), QuantSpec(4, 8), QuantSpec(2, range="mse")):
        grid = fit_grid(rows, spec)
        value = grid.dequantize(grid.quantize(rows))
        assert torch.equal(value[0], rows[0])
        if not spec.symmetric and spec.range == "minmax":
            torch.testing.assert_close(value[1:3], rows[1:3], rtol=1e-3, atol=0)


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e4, 1e12])
def test_huge_and_tiny_scales(factor: float) -> None:
    weight = weights(8, 64)
    plain, scaled = (fit_grid(w, QuantSpec(4)) for w in (weight, weight * factor))
    value, value_scaled = plain.dequantize(plain.quantize(weight)), scaled.dequantize(scaled.quantize(weight * factor))
    error, error_scaled = (value - weight).square().sum(), (value_scaled / factor - weight).square().sum()
    assert abs(float(error_scaled / error) - 1) < 0.02  # measured: at most 2.6e-4
    assert plain.scale_bits == 16
    assert scaled.scale_bits == (16 if 1e-3 <= factor <= 1e4 else 32)


def test_groups_in_a_given_order() -> None:
    weight, order = weights(6, 32), torch.randperm(32)
    grid = fit_grid(weight, QuantSpec(3, 8), order=order)
    plain = fit_grid(weight[:, order], QuantSpec(3, 8))
    assert torch.equal(grid.scale, plain.scale)
    assert torch.equal(
        grid.dequantize(grid.quantize(weight))[:, order], plain.dequantize(plain.quantize(weight[:, order]))
    )


def test_one_column_and_one_group_of_all() -> None:
    weight = weights(6, 1)
    grid = fit_grid(weight, QuantSpec(4))
    torch.testing.assert_close(grid.dequantize(grid.quantize(weight)), weight, rtol=1e-3, atol=0)
    row = weights(6, 32)
    whole, grouped = fit_grid(row, QuantSpec(3)), fit_grid(row, QuantSpec(3, 32))
    assert torch.equal(whole.scale, grouped.scale) and torch.equal(whole.zero, grouped.zero)


def test_bits_per_weight_counts_what_is_stored() -> None:
    weight = weights(64, 128)
    whole = fit_grid(weight, QuantSpec(3))
    assert QuantizedWeight(whole.quantize(weight), whole, QuantSpec(3)).bits_per_weight() == 3 + (16 + 3) / 128
    spec = QuantSpec(4, 32, symmetric=True)
    grid = fit_grid(weight, spec)
    assert QuantizedWeight(grid.quantize(weight), grid, spec).bits_per_weight() == 4 + 16 / 32
    order = torch.randperm(128)
    moved = fit_grid(weight, QuantSpec(4, 32), order=order)
    answer = QuantizedWeight(moved.quantize(weight), moved, QuantSpec(4, 32))
    assert not answer.has_plain_groups() and answer.storage_bits() == 64 * 128 * 4 + 64 * 4 * (16 + 4) + 128 * 32
    five = QuantSpec(2, levels=5, symmetric=True)
    assert five.code_bits == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 4, "group_size": 0}, "group_size=0"),
        ({"bits": 4, "range": "best"}, "best"),
        ({"bits": 1, "symmetric": True}, "levels=3"),
        ({"bits": 2, "levels": 1}, "levels=1"),
    ],
)
def test_bad_specs_say_what_is_wrong(arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        QuantSpec(**arguments)


def test_group_size_that_does_not_divide_names_ones_that_do() -> None:
    with pytest.raises(ValueError, match=r"group_size=48 does not divide in_features=128; use one of 32, 64, 128, -1"):
        fit_grid(weights(4, 128), QuantSpec(4, 48))


def test_check_refuses_illegal_answers() -> None:
    weight, spec = weights(4, 16), QuantSpec(3)
    grid = fit_grid(weight, spec)
    good = QuantizedWeight(grid.quantize(weight), grid, spec)
    good.check()
    with pytest.raises(ValueError, match="codes"):
        QuantizedWeight(good.codes + 8, grid, spec).check()
    with pytest.raises(ValueError, match="scales"):
        QuantizedWeight(good.codes, type(grid)(grid.scale * torch.nan, grid.zero, grid.g_idx, grid.qmax), spec).check()
    with pytest.raises(ValueError, match="zero points"):
        QuantizedWeight(good.codes, type(grid)(grid.scale, grid.zero + 9, grid.g_idx, grid.qmax), spec).check()
    with pytest.raises(ValueError, match="g_idx"):
        QuantizedWeight(good.codes, type(grid)(grid.scale, grid.zero, grid.g_idx + 1, grid.qmax), spec).check()


LARGEST_OF = [torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32)]


def near(largest: float) -> torch.Tensor:
    """Rows that reach the largest number on either side, on one side, or nowhere near it."""
    rows = weights(6, 32)
    rows = rows / rows.abs().amax(1, keepdim=True)
    rows[1], rows[2], rows[3] = rows[1].abs(), -rows[2].abs(), torch.where(rows[3] > 0, 1.0, -1.0)
    rows[5] *= 1e-3
    return rows * largest


def unbounded(lo: torch.Tensor, hi: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids without a largest level: [lo, hi] is covered, in float16 scales where they are near."""

    def stored(scale: torch.Tensor) -> torch.Tensor:
        half = scale.half().float()
        return torch.where((half - scale).abs() <= scale / 64, half, scale)

    if spec.symmetric:
        return stored(torch.maximum(-lo, hi) * (2 / spec.qmax)), torch.full_like(lo, (spec.qmax + 1) // 2).int()
    scale = stored((hi - lo) / spec.qmax)
    zero = torch.round(-lo / scale).clamp(0, spec.qmax)
    if spec.qmax > 1:
        scale, zero = torch.where(zero < 1, stored(hi / (spec.qmax - 1)), scale), zero.clamp(min=1)
    return scale, zero.int()


@pytest.mark.parametrize("largest", LARGEST_OF)
@pytest.mark.parametrize("spec", [s for s in SPECS if s.group_size == -1 and s.range == "minmax"], ids=str)
def test_no_level_is_larger_than_the_dtype_holds(spec: QuantSpec, largest: float) -> None:
    weight = near(largest)
    lo, hi = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    scale, zero = range_to_grid(lo, hi, replace(spec, largest=largest))
    levels = (torch.arange(spec.numbers.levels).double() - zero.double()[:, None]) * scale.double()[:, None]
    assert bool((levels.abs() <= largest).all())
    free, free_zero = unbounded(lo / 2**20, hi / 2**20, spec) if largest > 1e6 else unbounded(lo, hi, spec)
    free = free * 2**20 if largest > 1e6 else free  # (hi - lo overflows near float32's largest number)
    ends = free.double() * torch.maximum(free_zero, spec.qmax - free_zero)
    bounded = ends > largest
    assert bool(bounded.any()) and not bool(bounded[5])
    rounding = 0 if largest < 1e6 else 2e-7  # of ranges that overflow, whose ends are divided one by one
    torch.testing.assert_close(scale[~bounded], free[~bounded], rtol=rounding, atol=0)
    assert torch.equal(zero[~bounded], free_zero[~bounded])
    # A bounded scale is the largest that is stored: the next float16, or float32 beyond float16, is too large.
    steps, own = torch.maximum(zero, spec.qmax - zero)[bounded], scale[bounded]
    following = own * (1 + 2**-10) if largest < 1e6 else torch.nextafter(own, torch.tensor(torch.inf))
    assert bool((following.double() * steps > largest).all())
    assert largest > 1e6 or torch.equal(own, own.half().float())


@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_bounds_cost_no_bits_where_nothing_is_near(range_: str) -> None:
    for factor in (0.02, 1.0, 1000.0):
        weight = weights(16, 64) * factor
        for bits in (1, 2, 3, 4, 8):
            plain, bounded = (
                fit_grid(weight, QuantSpec(bits, 16, range=range_, largest=largest), torch.arange(1.0, 65.0))
                for largest in (torch.finfo(torch.float32).max, 65504.0)
            )
            assert torch.equal(plain.zero, bounded.zero) and torch.equal(plain.scale, bounded.scale)


def test_the_largest_level_belongs_to_the_weights_and_not_to_the_spec() -> None:
    spec = QuantSpec(3, 16, largest=65504.0, finest=2.0**-40)
    assert spec == QuantSpec(3, 16) and hash(spec) == hash(QuantSpec(3, 16)) and str(spec) == str(QuantSpec(3, 16))
    assert spec.to_json() == {"bits": 3, "group_size": 16, "symmetric": False, "range": "minmax", "levels": None}
    assert QuantSpec(**spec.to_json()).largest == torch.finfo(torch.float32).max


@pytest.mark.parametrize("symmetric", [False, True])
def test_learned_grids_stay_within_the_largest_value(symmetric: bool) -> None:
    spec = QuantSpec(3, 16, symmetric, largest=65504.0)
    weight = near(65504.0).requires_grad_()
    clip = WeightClip("linear", spec, rate=0.01)
    logits = {k: t.requires_grad_() for k, t in clip.initial(BlockWeights({"linear.weight": weight}), {}).items()}
    scale, zero = range_to_grid(*clip.clip("linear", *group_range(weight, spec), logits), spec)
    value = fake_quantize(weight, scale, zero, spec.qmax)
    assert bool(torch.isfinite(value.half()).all())
    (value / 65504).square().mean().backward()
    for parameter in (weight, *logits.values()):
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
    assert float(logits["upper"].grad.abs().sum()) > 0
    assert torch.equal(grid_of(scale, zero, weight.shape[1], spec.qmax).scale, scale)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_smallest_rows_have_a_scale(symmetric: bool) -> None:
    for value in (1.4e-45, 9.2e-41, 1e-42):
        weight = weights(4, 16)
        weight[1], weight[2] = value, -value
        for range_ in ("minmax", "mse"):
            grid = fit_grid(weight, QuantSpec(3, symmetric=symmetric, range=range_))
            answer = QuantizedWeight(grid.quantize(weight), grid, QuantSpec(3, symmetric=symmetric)).check()
            assert float((answer.dequantize() - weight)[1:3].abs().max()) <= float(grid.scale[1:3].max())


def test_check_refuses_levels_that_float32_cannot_hold() -> None:
    weight, spec = weights(4, 16), QuantSpec(2, symmetric=True)
    grid = fit_grid(weight, spec)
    huge = replace(grid, scale=torch.full_like(grid.scale, 2e38))
    with pytest.raises(ValueError, match="ends of the grid are infinite"):
        QuantizedWeight(grid.quantize(weight), huge, spec).check()
    QuantizedWeight(grid.quantize(weight), replace(huge, scale=huge.scale / 2), spec).check()


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(8, 16), QuantSpec(4, 16, symmetric=True)], ids=str)
def test_rows_that_are_almost_zero_get_the_nearest_float16_scale(spec):
    weight = weights(6, 48)
    for row, factor in ((1, 1e-4), (2, 1e-6), (3, 1e-9), (4, 1e-30)):
        weight[row] *= factor
    grid = fit_grid(weight, spec)
    answer = QuantizedWeight(grid.quantize(weight), grid, spec)
    stored = in_float16(answer, weight).check()
    scale, before = stored.grid.scale, answer.grid.scale
    assert answer.grid.scale_bits == 32 and stored.grid.scale_bits == 16
    nearest = before.double().clamp(min=SMALLEST_HALF)
    assert bool(((scale.double() - nearest).abs() <= torch.maximum(nearest * 2.0**-11, torch.tensor(2.0**-25))).all())
    assert bool((scale >= SMALLEST_HALF).all())
    same = (scale == before)[:, grid.g_idx]
    assert torch.equal(stored.codes[same], answer.codes[same]) and bool(same[0].all()) and not bool(same[4].any())
    wide = stored.grid.scale.double()[:, grid.g_idx]
    error = (stored.dequantize().double() - answer.dequantize().double()).abs()
    assert bool((error <= wide * 1.01).all()), "rounded again to the grid as it is stored"
    assert in_float16(stored, weight) is stored


def test_a_layer_out_of_float16s_range_keeps_its_scales():
    weight, spec = weights(6, 48), QuantSpec(4)
    for factor, fits in ((1.0, True), (1e-6, False), (1e-30, False), (0.0, True)):
        grid = fit_grid(weight * factor, spec)
        answer = QuantizedWeight(grid.quantize(weight * factor), grid, spec)
        assert in_float16(answer, weight * factor) is answer
        assert (misfit_float16(largest_of(weight * factor), 15) is None) == fits
    assert misfit_float16(2.0**-14, 15) is None and "too small" in misfit_float16(2.0**-14.1, 15)
    grid = fit_grid(weight * 1e9, spec)  # above float16's largest number
    answer = QuantizedWeight(grid.quantize(weight * 1e9), grid, spec)
    assert in_float16(answer, weight * 1e9) is answer


def test_the_largest_weight_tells_whether_every_step_is_finite_in_float16():
    assert largest_of(torch.tensor([[1.0, -3.0], [2.0, 0.5]])) == 3.0 and math.isnan(
        largest_of(torch.tensor([math.nan]))
    )
    for spec in (QuantSpec(2), QuantSpec(4), QuantSpec(8, symmetric=True)):
        most = 65504.0 * spec.qmax / 2
        both = torch.tensor([[-most, most * 0.5, most]])
        assert misfit_float16(most, spec.qmax) is None and fit_grid(both, spec).scale_bits == 16
        assert "too large" in misfit_float16(most * 1.01, spec.qmax)
        assert fit_grid(both * 1.01, spec).scale_bits == 32


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, largest=65504.0), QuantSpec(4, symmetric=True)])
def test_ends_that_are_not_finite_give_no_scale_and_leave_the_others_alone(spec):
    """Learning that diverges goes back by its loss, which is not finite then."""
    low, high = torch.tensor([-1.0, math.nan, -math.inf]), torch.tensor([2.0, math.nan, math.inf])
    scale, zero = range_to_grid(low, high, spec)
    alone = range_to_grid(low[:1], high[:1], spec)
    assert scale[:1] == alone[0] and zero[:1] == alone[1] and bool(scale[1].isnan())


@pytest.mark.parametrize(
    ("kind", "bits", "size"), [("integer", 3, 8), ("real", 3, 8), ("fractional", 3, 8), ("iq4_nl", 4, 32)]
)
def test_values_of_groups_side_by_side_are_those_of_groups_by_column(kind, bits, size):
    """Bit for bit; and where their columns are not side by side."""
    weight = weights(6, 3 * size)
    grid = fit_grid(weight, QuantSpec(bits, size, kind=kind))
    codes = grid.quantize(weight)
    order = torch.randperm(3 * size, generator=torch.Generator().manual_seed(0))
    moved = replace(grid, g_idx=grid.g_idx[order])
    assert grid.has_plain_groups() and not moved.has_plain_groups()
    values = grid.dequantize(codes)
    parts = [grid.of_group(g).dequantize(codes[:, g * size : (g + 1) * size]) for g in range(3)]
    assert torch.equal(values, torch.cat(parts, 1))
    assert torch.equal(moved.dequantize(codes[:, order]), values[:, order])
    if kind == "integer":
        expected = (codes.double() - grid.zero[:, grid.g_idx].double()) * grid.scale[:, grid.g_idx].double()
        torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=0)
