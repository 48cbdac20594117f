"""Levels that are not evenly spaced: tables, scales, and solvers on them, beside slow float64 references."""

import math

import gguf
import pytest
import torch

from quant.core.grid import fit_grid, in_float16
from quant.core.level_grid import covering, in_tensor, refit_levels, stored_levels, tensor_unit
from quant.core.levels import TABLES, level_codes, levels_of
from quant.core.linalg import damped_factor
from quant.core.names import LEVEL_GRIDS
from quant.core.types import QuantSpec
from quant.solvers.gptq import gptq
from quant.solvers.quantease import quantease
from quant.solvers.rtn import rtn
from tests.references import inputs, make_stats

SPECS = [
    QuantSpec(kind.bits, size, kind=name, range=way)
    for name, kind in LEVEL_GRIDS.items()
    for size in kind.groups
    for way in ("minmax", "mse")
]
NAMES = [f"{spec.kind} {spec.group_size} {spec.range}" for spec in SPECS]


def layer(n_out=130, n_in=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator) * torch.rand(n_out, 1, generator=generator)
    return weight, make_stats(inputs(n_in, 600, seed=seed))


def objective(weight, answer, stats):
    error = (weight - answer.dequantize()).double()
    return float((error @ stats.gram.double() * error).sum())


def nearest(ratio, table):
    """By looking at every level."""
    distance = (ratio[..., None].double() - torch.tensor(table, dtype=torch.float64)).abs()
    return distance.argmin(-1)


def test_tables_are_those_of_the_formats():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert TABLES["fp8"] == tuple(sorted(set(every[every.isfinite()].tolist())))
    halves = [sign * value / 2 for sign in (1, -1) for value in gguf.quants.MXFP4.kvalues[:8]]
    assert TABLES["nvfp4"] == TABLES["mxfp4"] == tuple(sorted({half for half in halves}))
    assert TABLES["iq4_nl"] == tuple(map(float, gguf.quants.IQ4_NL.kvalues))


@pytest.mark.parametrize("kind", sorted(TABLES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_codes_are_the_nearest_and_the_lower_half_way(kind, dtype):
    table = TABLES[kind]
    levels = torch.tensor(table, dtype=torch.float64)
    middles = (levels[1:] + levels[:-1]) / 2
    exact = torch.cat([levels, middles]).to(dtype)
    assert torch.equal(exact.double(), torch.cat([levels, middles]))
    expected = torch.cat([torch.arange(len(levels)), torch.arange(len(middles))])
    assert torch.equal(level_codes(exact, table), expected)
    spread = (torch.randn(500, generator=torch.Generator().manual_seed(1)) * levels.max() / 2).to(dtype)
    assert torch.equal(levels_of(level_codes(spread, table), table).double(), levels[nearest(spread.double(), table)])
    ends = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    assert level_codes(ends, table).tolist() == [0, len(table) - 1]


def test_e4m3_levels_round_as_torch_does_apart_from_the_middles():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    ours = levels_of(level_codes(x, TABLES["fp8"]), TABLES["fp8"])
    assert torch.equal(ours, x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_a_grid_is_legal_and_its_codes_are_nearest(spec):
    weight, stats = layer()
    grid = fit_grid(weight, spec, stats.importance)
    answer = in_float16(rtn(weight, stats, spec, grid=grid), weight).check()
    scale = grid.expand()[0].expand_as(weight)
    assert torch.equal(grid.quantize(weight).long(), nearest(weight / scale, TABLES[spec.kind]))
    kind = LEVEL_GRIDS[spec.kind]
    if kind.rows > 1 and spec.group_size > 0:
        for rows in grid.scale.split(kind.rows):
            assert torch.equal(rows, rows[:1].expand_as(rows))
    if kind.scale == "e8m0":
        assert torch.equal(torch.frexp(grid.scale)[0], torch.full_like(grid.scale, 0.5))
    if kind.scale == "e4m3":
        unit = tensor_unit(answer.grid.scale)
        stored = (answer.grid.scale / unit).to(torch.float8_e4m3fn).float()
        assert math.frexp(unit)[0] == 0.5 and torch.equal(stored * unit, answer.grid.scale)
    groups = weight.shape[1] // spec.group_size if spec.group_size > 0 else 1
    scales = {"nvfp4": 130 * groups * 8 + 32, "mxfp4": 130 * groups * 8, "iq4_nl": 130 * groups * 16}
    expected = scales.get(spec.kind, 32 * (130 if groups == 1 else 2 * groups))
    assert answer.storage_bits() == 130 * 256 * kind.bits + expected


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_min_max_covers_the_range_and_a_search_lowers_the_error(spec):
    weight, stats = layer()
    if spec.range == "minmax":
        whole = covering(weight.view(130, spec.n_groups(256), -1), spec)
        table = torch.tensor(TABLES[spec.kind])
        grid = fit_grid(weight, spec)
        grouped = weight.view(130, spec.n_groups(256), -1)
        ends = torch.stack([whole * table[0], whole * table[-1]])
        assert bool((grouped.amax(-1) <= ends.amax(0) * (1 + 1e-6)).all())
        assert bool((grouped.amin(-1) >= ends.amin(0) * (1 + 1e-6)).all())
        worst = {"e8m0": 1.5, "e4m3": 1 + 1 / 16, "half": 1 + 1 / 64, "float": 1 + 1e-6}[LEVEL_GRIDS[spec.kind].scale]
        assert bool((whole.abs() <= grid.scale.abs() * worst).all())
        return
    searched, plain = (fit_grid(weight, QuantSpec(spec.bits, spec.group_size, kind=spec.kind, range=way), stats.importance)
                       for way in ("mse", "minmax"))  # fmt: skip
    errors = [
        ((weight - g.dequantize(g.quantize(weight))).square() * stats.importance).sum() for g in (searched, plain)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=NAMES)
def test_solvers_are_ordered(spec):
    weight, stats = layer()
    rounded, feedback, descended = (
        objective(weight, in_float16(solve(weight, stats, spec), weight).check(), stats)
        for solve in (rtn, gptq, quantease)
    )
    assert feedback < 0.9 * rounded and descended < 0.95 * feedback
    best = in_float16(quantease(weight, stats, spec, search_grid=True, refit_grid=True), weight).check()
    assert objective(weight, best, stats) <= descended * 1.01


def slow_descent(weight, gram, scale, table, sweeps):
    """Coordinate descent in float64, a row and a column at a time."""
    w, sigma, levels = weight.double(), gram.double(), torch.tensor(table, dtype=torch.float64)
    values = w.clone()
    codes = torch.zeros_like(w, dtype=torch.long)
    for rounds in sweeps:
        for j in range(w.shape[1]):
            u = values[:, j] + (w - values) @ sigma[:, j] / sigma[j, j]
            if rounds:
                codes[:, j] = nearest(u / scale[:, j], table)
                u = levels[codes[:, j]] * scale[:, j]
            values[:, j] = u
    return codes


@pytest.mark.parametrize("spec", SPECS[::2], ids=NAMES[::2])
def test_descent_is_that_of_float64(spec):
    weight, stats = layer(64)
    answer = quantease(weight, stats, spec, num_iter=3, relax=False)
    scale = answer.grid.expand()[0].double().expand_as(weight)
    slow = slow_descent(weight, stats.gram, scale, TABLES[spec.kind], [True] * 3)
    assert (answer.codes.long() != slow).float().mean() < 0.01  # sums in another precision: codes on an edge
    exact = ((weight - levels_of(slow, TABLES[spec.kind]).double() * scale) @ stats.gram.double()).double()
    best = (exact * (weight - levels_of(slow, TABLES[spec.kind]).double() * scale)).sum()
    assert objective(weight, answer, stats) == pytest.approx(float(best), rel=2e-3)


@pytest.mark.parametrize("spec", SPECS[::2], ids=NAMES[::2])
def test_gptq_is_that_of_float64(spec):
    weight, stats = layer(64)
    answer = gptq(weight, stats, spec, static_groups=True)
    scale = answer.grid.expand()[0].double().expand_as(weight)
    upper = damped_factor(stats.gram.double(), 0.01, False)[0]
    feedback = upper / upper.diagonal()
    values, levels = torch.zeros_like(weight, dtype=torch.float64), torch.tensor(TABLES[spec.kind], dtype=torch.float64)
    codes = torch.zeros(weight.shape, dtype=torch.long)
    for k in range(weight.shape[1]):
        asked = weight[:, k].double() + (weight[:, :k].double() - values[:, :k]) @ feedback[:k, k]
        codes[:, k] = nearest(asked / scale[:, k], TABLES[spec.kind])
        values[:, k] = levels[codes[:, k]] * scale[:, k]
    assert (answer.codes.long() != codes).float().mean() < 0.01
    error = weight.double() - values
    assert objective(weight, answer, stats) == pytest.approx(
        float((error @ stats.gram.double() * error).sum()), rel=2e-3
    )


@pytest.mark.parametrize("spec", SPECS[::2], ids=NAMES[::2])
def test_a_refitted_scale_is_the_best_of_those_that_are_stored(spec):
    """Against every scale near it, in float64; shared scales stay shared, and the objective never rises."""
    n = 16
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(140, n, generator=generator)
    gram = make_stats(inputs(n, 100)).gram
    scale = stored_levels(covering(weight[:, None], spec)[:, 0] * 0.7, spec)
    codes = level_codes(weight / scale[:, None], TABLES[spec.kind])
    levels = levels_of(codes, TABLES[spec.kind])
    residual = weight - levels * scale[:, None]
    new = refit_levels(levels, scale, gram, residual @ gram, spec)

    def errors(s):
        off = (weight - levels * s[:, None]).double()
        each = (off @ gram.double() * off).sum(1)
        return torch.cat([part.sum(0, keepdim=True).expand_as(part) for part in each.split(spec.shared_rows)])

    best = errors(new)
    assert bool((best <= errors(scale) * (1 + 1e-6)).all()) and bool((best < errors(scale) * (1 - 1e-4)).any())
    assert torch.equal(stored_levels(new, spec), new)
    step = 0.5 if LEVEL_GRIDS[spec.kind].scale == "e8m0" else 0.05
    for factor in (1 - step, 1 + 2 * step if step == 0.5 else 1 + step):
        assert bool((best <= errors(stored_levels(new * factor, spec)) * (1 + 1e-5)).float().mean() > 0.95)


def test_scales_of_a_whole_tensor_keep_to_e4m3():
    scale = torch.tensor([[3.0, 1e-6], [0.75, 2.0**-20]])
    stored = in_tensor(scale)
    unit = tensor_unit(scale)
    assert unit == 2.0**-7 and stored[0, 0] == 3.0 and stored[0, 1] == unit * 2.0**-9
    assert torch.equal(in_tensor(stored), stored) and bool((stored > 0).all())
    weight, stats = layer(32)
    weight[:, :16] *= 1e-7  # a group whose own scale E4M3 does not reach beside the others
    spec = QuantSpec(4, 16, kind="nvfp4")
    answer = in_float16(rtn(weight, stats, spec), weight).check()
    assert torch.equal(in_tensor(answer.grid.scale), answer.grid.scale)
    first = answer.grid.scale[:, :1]
    assert bool(((answer.dequantize() - weight)[:, :16].abs() <= 0.3 * first).all())  # a quarter is half a level near 0
    assert torch.equal(answer.codes[:, 16:], rtn(weight[:, 16:], None, spec).codes)


@pytest.mark.parametrize("kind", sorted(LEVEL_GRIDS))
def test_awkward_weights(kind):
    spec = QuantSpec(LEVEL_GRIDS[kind].bits, LEVEL_GRIDS[kind].groups[0], kind=kind, range="mse")
    for weight in (
        torch.zeros(5, 64),
        torch.full((5, 64), -2.0),
        torch.eye(64)[:5] * 1e4,
        torch.randn(1, 64) * 1e-6,
        torch.randn(2, 64) * 1e-41,
    ):
        answer = in_float16(quantease(weight, make_stats(inputs(64, 200)), spec, refit_grid=True), weight).check()
        assert bool(torch.isfinite(answer.dequantize()).all())
        if not weight.any():
            assert answer.dequantize().abs().max() <= (1.0 if kind == "iq4_nl" else 0)  # that one has no level at 0


def test_bits_and_groups_are_those_of_the_kind():
    for bits, size, name, says in (
        (3, 16, "nvfp4", "4 bits"),
        (4, 32, "nvfp4", "groups of 16"),
        (8, 64, "fp8", "whole rows or groups of 128"),
    ):
        with pytest.raises(ValueError, match=says):
            QuantSpec(bits, size, kind=name)
    with pytest.raises(ValueError, match="symmetric"):
        QuantSpec(4, 16, True, kind="nvfp4")
    assert [QuantSpec(k.bits, k.groups[0], kind=n).code_bits for n, k in LEVEL_GRIDS.items()] == [4, 4, 8, 4]
