"""Tuned linears: the start is the solved answer, gradients are those of the formula, answers are what was computed with."""

from __future__ import annotations

import pytest
import torch

from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.names import GRIDS
from quant.core.types import Grid, QuantSpec
from quant.solvers import get_solver
from quant.tune.codes import FACTOR, MARGIN, OFFSET, POSITION, Groups, RoundPosition, TunedLinear
from tests.helpers import random_weight

SPECS = [
    QuantSpec(1),
    QuantSpec(2),
    QuantSpec(2, levels=5),
    QuantSpec(3, group_size=8),
    QuantSpec(4, group_size=16, symmetric=True),
    QuantSpec(8),
    QuantSpec(1, kind="real"),
    QuantSpec(2, group_size=8, kind="real", range="mse"),
    QuantSpec(4, kind="real"),
    QuantSpec(2, kind="fractional", range="mse"),
    QuantSpec(3, group_size=8, kind="fractional"),
]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def solved(spec, method="gptq", **options):
    """A linear with correlated inputs, solved; and its weight."""
    weight, x = gaussian(12, 32) * 0.05, gaussian(200, 32, seed=1) @ gaussian(32, 32, seed=2)
    stats = GramStats(32, torch.device("cpu"))
    stats.update(x)
    return weight, get_solver(method)(weight, stats, spec, **options)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("method", ["rtn", "gptq", "quantease"])
def test_the_start_is_the_solved_answer(spec, method):
    weight, start = solved(spec, method)
    linear = TunedLinear("w", start, spec, weight)
    parameters = linear.initial()
    assert torch.equal(linear.weight(parameters), start.dequantize())
    answer = linear.answer(parameters)
    assert torch.equal(answer.codes, start.codes)
    assert torch.equal(answer.grid.scale, start.grid.scale)
    assert start.grid.minimum is None or torch.equal(answer.grid.minimum, start.grid.minimum)
    assert set(parameters) == set(linear.keys) and (OFFSET in parameters) == spec.has_minimum
    assert answer.info["codes_moved"] == 0
    assert answer.storage_bits() == start.storage_bits()


@pytest.mark.parametrize(
    ("method", "options"), [("gptq", {"act_order": True}), ("quantease", {"outlier": 0.02})], ids=lambda x: str(x)
)
def test_column_orders_and_outliers_stay(method, options):
    spec = QuantSpec(3, group_size=8)
    weight, start = solved(spec, method, **options)
    linear = TunedLinear("w", start, spec, weight)
    parameters = linear.initial()
    assert torch.equal(linear.weight(parameters), start.dequantize())
    moved = {name: p + 0.3 * gaussian(*p.shape, seed=5) for name, p in parameters.items()}
    answer = linear.answer(moved)
    assert torch.equal(linear.weight(moved), answer.dequantize())
    assert torch.equal(answer.grid.g_idx, start.grid.g_idx)
    assert answer.outliers is start.outliers
    assert 0 < answer.info["codes_moved"] < 1
    settled = linear.answer(linear.settled(moved))
    assert linear.settled(moved)[POSITION].dtype == torch.uint8
    assert torch.equal(settled.codes, answer.codes) and torch.equal(settled.grid.scale, answer.grid.scale)


def test_a_position_stands_where_the_weight_does_unless_the_solver_chose_another_code():
    spec = QuantSpec(3)
    weight, start = solved(spec)
    position = TunedLinear("w", start, spec, weight).initial()[POSITION]
    place = weight / start.grid.scale + start.grid.zero
    inside = (place - start.codes.float()).abs() <= 0.5 - MARGIN
    assert 0.3 < inside.float().mean() < 1
    assert torch.equal(position[inside], place[inside])
    assert torch.allclose((position - start.codes.float()).abs()[~inside], torch.tensor(0.5 - MARGIN), atol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_those_of_the_formula_in_float64(spec):
    weight, start = solved(spec)
    linear = TunedLinear("w", start, spec, weight)
    parameters = {name: p.clone() for name, p in linear.initial().items()}
    parameters[POSITION] += 1.5 * gaussian(12, 32, seed=3)  # some leave the range
    for key in linear.keys[1:]:
        parameters[key] += 0.1 * gaussian(*parameters[FACTOR].shape, seed=4)
    for p in parameters.values():
        p.requires_grad_()
    x, y = gaussian(20, 32, seed=6), gaussian(20, 12, seed=7)
    (x @ linear.weight(parameters).T - y).square().sum().backward()

    u, grid = parameters[POSITION].detach().double(), start.grid
    own = linear.grid({name: p.detach() for name, p in parameters.items()})
    scale = own.scale.double()
    codes = u.round().clamp(0, grid.qmax)
    offsets = codes if grid.minimum is not None else codes - grid.zero.double()[:, grid.g_idx]
    deployed = offsets * scale[:, grid.g_idx]
    if own.minimum is not None:
        deployed += own.minimum.double()[:, grid.g_idx]
    upstream = 2 * (x.double() @ deployed.T - y.double()).T @ x.double()  # of Ŵ
    inside = (u > -0.5) & (u < grid.qmax + 0.5)
    assert 0 < inside.double().mean() < 1
    of_position = upstream * scale[:, grid.g_idx] * inside
    of_factor = torch.zeros_like(scale).index_add_(1, grid.g_idx, upstream * offsets) * grid.scale.double()
    of_offset = torch.zeros_like(scale).index_add_(1, grid.g_idx, upstream) * grid.scale.double()
    for name, reference in zip(linear.keys, (of_position, of_factor, of_offset), strict=False):
        gradient = parameters[name].grad.double()
        assert (gradient - reference).norm() < 1e-5 * reference.norm()


def test_scales_stay_numbers_of_float16_and_positive():
    spec = QuantSpec(3, group_size=8)
    weight, start = solved(spec)
    linear = TunedLinear("w", start, spec, weight)
    parameters = linear.initial()
    parameters[FACTOR] = torch.linspace(-3, 3, parameters[FACTOR].numel()).view_as(parameters[FACTOR])
    answer = linear.answer(parameters)
    assert bool((answer.grid.scale > 0).all())
    usual = parameters[FACTOR] > -0.9
    assert torch.equal(answer.grid.scale[usual].half().float(), answer.grid.scale[usual])
    assert torch.allclose(answer.grid.scale[usual], (start.grid.scale * (1 + parameters[FACTOR]))[usual], rtol=1e-3)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_change_of_scale_or_minimum_changes_no_code(kind):
    spec = QuantSpec(2, kind=kind)
    weight, start = solved(spec)
    linear = TunedLinear("w", start, spec, weight)
    parameters = linear.initial()
    for key in linear.keys[1:]:
        parameters[key] = parameters[key] + 0.2
    answer = linear.answer(parameters)
    assert torch.equal(answer.codes, start.codes)
    assert torch.allclose(answer.grid.scale, 1.2 * start.grid.scale, rtol=2.0**-7 if kind == "fractional" else 1e-3)
    if kind == "fractional":
        zero, before = (-one.minimum / one.scale for one in (answer.grid, start.grid))
        assert bool(((zero - (before - 0.2) / 1.2).clamp(min=0).abs() < 0.04).all())
    if kind == "real":
        expected = start.grid.minimum + 0.2 * start.grid.scale
        assert torch.allclose(answer.grid.minimum, expected, rtol=1e-3, atol=1e-5)


def test_codes_end_at_the_range():
    position = torch.tensor([-9.0, -0.5, 0.49, 1.51, 3.5, 3.51], requires_grad=True)
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(6, dtype=torch.int64), 3)
    row = position.unsqueeze(0)
    codes = RoundPosition.apply(row, grid.scale, grid.zero, Groups(grid), 3)
    assert codes.tolist() == [[0, 0, 0, 2, 3, 3]]
    codes.sum().backward()
    assert position.grad.tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("index", [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, 2, 1], [0, 0, 0, 0, 1, 1], [0] * 6])
def test_sums_over_groups_in_any_order_and_of_any_size(index):
    index = torch.tensor(index)
    count = int(index.max()) + 1
    groups = Groups(Grid(torch.ones(3, count), torch.zeros(3, count), index, 3))
    values = gaussian(3, 6, seed=4).double()
    by_hand = [[sum(float(row[j]) for j in range(6) if index[j] == g) for g in range(count)] for row in values]
    assert torch.allclose(groups.sum(values), torch.tensor(by_hand, dtype=torch.float64))
    wide = groups.expand(groups.sum(values)).expand(3, 6)
    assert torch.equal(wide, groups.sum(values)[:, index])


def test_scales_in_few_bits_are_refused_in_one_line():
    weight, start = solved(QuantSpec(3, group_size=16), "spqr")
    with pytest.raises(InputError, match="--tune cannot hold scales that are quantized themselves"):
        TunedLinear("block 0 w", start, QuantSpec(3, group_size=16), weight)


@pytest.mark.parametrize("kind", GRIDS)
def test_the_answer_is_what_was_computed_with_also_far_from_the_start(kind):
    spec = QuantSpec(4, group_size=16, kind=kind)
    start = random_weight(8, 64, spec)
    linear = TunedLinear("w", start, spec, start.dequantize())
    parameters = {
        POSITION: gaussian(8, 64, seed=1) * 30, FACTOR: gaussian(8, 4, seed=2) * 0.5, OFFSET: gaussian(8, 4, seed=3) * 9,
    }  # fmt: skip
    assert torch.equal(linear.weight(parameters), linear.answer(parameters).dequantize())
