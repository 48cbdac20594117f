"""Grids with a real minimum: exact zero by sorted breakpoints, closed-form refit, storage, against float64 and brute force."""

import itertools
from dataclasses import replace

import pytest
import torch

from quant.core.grid import fit_grid, in_float16
from quant.core.real_grid import best_zero, fit_scale_minimum, refit_scale_minimum, weighted_error
from quant.core.stored import FINEST_STEP, stored_real
from quant.core.types import Grid, QuantizedWeight, QuantSpec
from tests.references import inputs, make_stats, weights

BITS = range(1, 9)
every_width = pytest.mark.parametrize("bits", BITS)


def awkward(n: int = 24) -> torch.Tensor:
    """Gaussian rows, and rows that are zero, constant, of one sign, far from 0, of two values, with one huge entry."""
    rows = weights(12, n) * 0.1
    rows[0], rows[1], rows[2] = 0.0, 0.7, -3.0
    rows[3], rows[4] = rows[3].abs() + 0.01, -rows[4].abs() - 0.01
    rows[5], rows[6] = rows[5] * 1e-3 + 5, torch.where(rows[6] > 0, 0.3, -0.1)
    rows[7, 0] = 4.0
    rows[8] = rows[8].abs() * 1e-5
    return rows


def loss(x: torch.Tensor, h: torch.Tensor, z: torch.Tensor, qmax: int) -> torch.Tensor:
    """Σ h (x + z - code)² [rows] for zeros [rows] or [rows, candidates]."""
    moved = x[:, None] + z.reshape(len(x), -1, 1)
    return (h[:, None] * (moved - moved.round().clamp(0, qmax)).square()).sum(-1)


@pytest.mark.parametrize("qmax", [1, 2, 3, 4, 7, 15])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_best_zero_is_the_best_of_all_pieces_by_brute_force(qmax, n):
    """Between two breakpoints the loss is a parabola: its vertex, if inside, or an end."""
    generator = torch.Generator().manual_seed(n)
    for spread in (0.3, 1.0, 3.0, 9.0):
        x = torch.randn(40, n, generator=generator, dtype=torch.float64) * spread + 7 * spread
        h = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        h[:, : n // 2] *= h[:, : n // 2] > 0.3
        x[0] = x[0, 0]
        for row, weight in zip(x, h, strict=True):
            breaks = (torch.arange(1, qmax + 1)[:, None] - 0.5 - row).flatten().sort().values
            between = torch.cat([breaks[:1] - 1, (breaks[1:] + breaks[:-1]) / 2, breaks[-1:] + 1])
            codes = (row + between[:, None]).round().clamp(0, qmax)
            vertex = ((codes - row) * weight).sum(1) / weight.sum().clamp(min=1e-300)
            candidates = torch.cat([breaks, vertex])[None]
            best = loss(row[None], weight[None], candidates, qmax).min()
            found = loss(row[None], weight[None], best_zero(row[None], weight[None], qmax)[:, None], qmax)
            torch.testing.assert_close(found.squeeze(), best, rtol=1e-9, atol=1e-12)


@every_width
def test_best_zero_is_no_worse_than_any_integer_zero_and_float32_agrees(bits):
    qmax, generator = 2**bits - 1, torch.Generator().manual_seed(bits)
    x = torch.randn(30, 64, generator=generator, dtype=torch.float64) * qmax / 4
    h = torch.rand(30, 64, generator=generator, dtype=torch.float64)
    own = loss(x, h, best_zero(x, h, qmax)[:, None], qmax).squeeze(1)
    integers = loss(x, h, torch.arange(qmax + 1.0, dtype=torch.float64).expand(30, -1), qmax).amin(1)
    assert bool((own <= integers * (1 + 1e-12)).all())
    assert bits > 4 or float(own.sum()) < 0.97 * float(integers.sum())  # measured: 0.34 to 0.95
    rounded = best_zero(x.float(), h.float(), qmax).double()
    torch.testing.assert_close(loss(x, h, rounded[:, None], qmax).squeeze(1), own, rtol=2e-4, atol=0)


@every_width
@pytest.mark.parametrize("group", [-1, 8, 1])
@pytest.mark.parametrize("range_", ["minmax", "mse"])
def test_awkward_rows_have_legal_grids_within_a_step(bits, group, range_):
    rows, spec = awkward(), QuantSpec(bits, group, range=range_, kind="real")
    grid = fit_grid(rows, spec, torch.rand(24) + 0.1)
    answer = QuantizedWeight(grid.quantize(rows), grid, spec).check()
    value = answer.dequantize()
    assert torch.equal(value[0], rows[0])
    torch.testing.assert_close(value[1:3], rows[1:3], rtol=FINEST_STEP, atol=0)
    assert fit_grid(rows[:8], spec).minimum_bits == 16, "only a row that is almost zero takes more"
    if range_ == "minmax":  # the range is exact, but for float16
        error, step = (value - rows).abs(), grid.scale[:, grid.g_idx]
        assert bool((error <= 0.5 * step + 2.0**-11 * rows.abs() + 2.0**-25).all())
    if bits == 1 and group == -1:  # two values are held by one bit
        torch.testing.assert_close(value[6], rows[6], rtol=1e-3, atol=0)


@every_width
def test_searched_grids_have_no_more_weighted_error_than_minmax_and_the_best_of_many(bits):
    rows, h = weights(20, 64), torch.rand(64) + 0.05
    rows[:, 3] *= 3
    real = QuantSpec(bits, kind="real")
    plain, own = (
        weighted_error(rows, h, *fit_scale_minimum(rows, replace(real, range=kind), h), real.qmax)
        for kind in ("minmax", "mse")
    )
    assert bool((own <= plain).all()) and float(own.sum()) < 0.9 * float(plain.sum())
    step = (rows.amax(1) - rows.amin(1)).double() / real.qmax
    best = torch.full((20,), torch.inf, dtype=torch.float64)
    for factor in torch.linspace(0.05, 1.1, 211):  # steps and zeros, by a fine net
        s = step * factor
        x = rows.double() / s[:, None]
        best = torch.minimum(best, loss(x, h.double().expand(20, -1), best_zero(x, h.double().expand(20, -1), real.qmax), real.qmax).squeeze(1) * s.square())  # fmt: skip
    assert float(own.sum()) < 1.1 * float(best.sum()) and float(own.sum()) > 0.999 * float(best.sum())


def test_columns_that_do_not_count_and_groups_of_them():
    rows, h = awkward(), torch.ones(24)
    h[8:16] = 0
    spec = QuantSpec(2, 8, range="mse", kind="real")
    grid = fit_grid(rows, spec, h)
    plain = fit_grid(rows, replace(spec, range="minmax"))
    assert torch.equal(grid.scale[:, 1], plain.scale[:, 1]) and torch.equal(grid.minimum[:, 1], plain.minimum[:, 1])
    assert not torch.equal(grid.scale[:, 0], plain.scale[:, 0])


def test_a_row_is_fitted_by_itself_and_groups_as_rows():
    rows, h = weights(9, 32), torch.rand(32) + 0.1
    spec = QuantSpec(3, 8, range="mse", kind="real")
    whole = fit_grid(rows, spec, h)
    alone = [fit_grid(row[None], spec, h) for row in rows]
    assert torch.equal(whole.scale, torch.cat([g.scale for g in alone]))
    assert torch.equal(whole.minimum, torch.cat([g.minimum for g in alone]))
    order = torch.randperm(32)
    moved = fit_grid(rows, spec, h, order=order)
    assert torch.equal(moved.minimum, fit_grid(rows[:, order], spec, h[order]).minimum)


def refit_problem(bits: int, n: int, seed: int, tokens: int = 64):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(10, n, generator=generator) + 0.3
    gram = make_stats(inputs(n, tokens, seed=seed)).gram
    grid = fit_grid(rows, QuantSpec(bits, kind="real"))
    codes = grid.quantize(rows * 0.8 + 0.1 * torch.randn(10, n, generator=generator)).float()
    codes[0], codes[1] = 1.0, 0.0
    return rows, gram, grid, codes


@every_width
@pytest.mark.parametrize("n", [1, 2, 17])
@pytest.mark.parametrize("tokens", [1, 64])
def test_refit_is_least_squares_rounded_to_storage_and_never_raises_the_objective(bits, n, tokens):
    rows, gram, grid, codes = refit_problem(bits, n, bits, tokens)
    spec = QuantSpec(bits, kind="real")

    def objective(s, m):
        e = rows.double() - (codes.double() * s.double() + m.double())
        return ((e @ gram.double()) * e).sum(1)

    def energy(value):
        return ((value.double() @ gram.double()) * value.double()).sum(1)

    correlation = (rows - grid.values(codes)) @ gram
    s, m = refit_scale_minimum(codes, grid.scale[:, 0], grid.minimum[:, 0], gram, correlation, spec=spec)
    before, after = objective(grid.scale, grid.minimum), objective(s[:, None], m[:, None])
    size = energy(rows) + energy(grid.values(codes))
    assert bool((after <= before + 1e-6 * size).all())
    QuantizedWeight(codes.to(torch.uint8), Grid.real(s[:, None], m[:, None], grid.g_idx, spec.qmax), spec).check()
    eigenvalues, vectors = torch.linalg.eigh(gram.double())
    root = eigenvalues.clamp(min=0).sqrt()[:, None] * vectors.T
    for row in range(10):
        features = torch.stack([codes[row].double(), torch.ones(n, dtype=torch.float64)], 1)
        line = torch.linalg.lstsq(root @ features, root @ rows[row].double(), driver="gelsd").solution
        if line[0] > 1e-3 and n > 2 and tokens > 1 and bool(codes[row].std() > 0):
            exact = objective(line[0].expand(10, 1), line[1].expand(10, 1))[row]
            # float16 moves a level by 2^-11 of itself at most
            moved = energy(2.0**-11 * (line[0] * codes[row] + line[1].abs())[None])[0]
            assert after[row] >= exact - 1e-6 * size[row]
            assert after[row] <= exact + 2 * moved + 1e-6 * size[row] or bool(line[1].abs() * FINEST_STEP > line[0])


def test_refit_leaves_free_entries_out():
    rows, gram, grid, codes = refit_problem(2, 17, 3)
    free = torch.rand(rows.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    free[2] = True
    value = torch.where(free, rows * 1.1, grid.values(codes))
    correlation = (rows - value) @ gram
    s, m = refit_scale_minimum(
        codes, grid.scale[:, 0], grid.minimum[:, 0], gram, correlation, spec=QuantSpec(2, kind="real"), free=free
    )
    new = torch.where(free, rows * 1.1, codes * s[:, None] + m[:, None])
    before, after = ((((rows - v) @ gram) * (rows - v)).sum(1) for v in (value, new))
    assert bool((after <= before * (1 + 1e-5)).all()) and float(after.sum()) < 0.8 * float(before.sum())
    assert s[2] == grid.scale[2, 0] and m[2] == grid.minimum[2, 0]
    for row in (3, 4, 5):  # the equations of the masked features, in float64
        v = torch.stack([codes[row], torch.ones(17)]).double() * ~free[row]
        wanted = rows[row].double() - free[row] * rows[row].double() * 1.1
        a, b = v @ gram.double() @ v.T, v @ gram.double() @ wanted
        line = torch.linalg.solve(a, b)
        torch.testing.assert_close(torch.stack([s[row], m[row]]).double(), line, rtol=3e-3, atol=1e-3)


@pytest.mark.parametrize("largest", [65504.0, torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).max])
@every_width
def test_no_level_is_larger_than_the_dtype_holds(bits, largest):
    spec = QuantSpec(bits, kind="real", largest=largest)
    rows = weights(6, 32)
    rows = rows / rows.abs().amax(1, keepdim=True)
    rows[1], rows[2], rows[3] = rows[1].abs(), -rows[2].abs(), torch.where(rows[3] > 0, 1.0, -1.0)
    rows[4] = 1.0
    rows = rows * largest
    grid = fit_grid(rows, spec)
    QuantizedWeight(grid.quantize(rows), grid, spec).check()
    levels = grid.values(torch.arange(spec.qmax + 1.0).expand(6, -1))
    assert bool((levels.abs() <= largest).all())
    value = grid.dequantize(grid.quantize(rows))
    narrow = (rows / largest).amax(1) - (rows / largest).amin(1) <= 1
    assert narrow.tolist() == [False, True, True, False, True, False]
    assert bool(((value - rows).abs() <= grid.scale * 0.51 + largest * 2.0**-9)[narrow].all())


def test_small_rows_and_multiples_of_the_finest_number():
    spec = QuantSpec(3, kind="real", finest=2.0**-20)
    rows = weights(6, 32) * 1e-4
    rows[0] *= 1e-6
    grid = fit_grid(rows, spec)
    for numbers in (grid.scale, grid.minimum):
        assert torch.equal((numbers / spec.finest).round() * spec.finest, numbers)
    s, m = stored_real(torch.tensor([0.1, 1e-9]), torch.tensor([1.0, 3.0]), QuantSpec(3, kind="real"))
    assert s[1] >= 3 * FINEST_STEP * 0.999 and m.tolist() == [1.0, 3.0]


def test_bits_are_counted_and_files_of_integer_grids_stay_as_they_were():
    rows = weights(64, 128)
    for group in (-1, 32):
        spec = QuantSpec(3, group, kind="real")
        grid = fit_grid(rows, spec)
        answer = QuantizedWeight(grid.quantize(rows), grid, spec)
        assert answer.bits_per_weight() == 3 + 32 / (group if group > 0 else 128)
    assert "kind" not in QuantSpec(3).to_json() and QuantSpec(3, kind="real").to_json()["kind"] == "real"
    assert QuantSpec(**QuantSpec(3, kind="real").to_json()) == QuantSpec(3, kind="real")


def test_check_refuses_illegal_minima():
    rows, spec = weights(4, 16), QuantSpec(3, kind="real")
    grid = fit_grid(rows, spec)
    good = QuantizedWeight(grid.quantize(rows), grid, spec).check()
    for wrong, said in (
        (replace(grid, minimum=grid.minimum * torch.nan), "minima must be finite"),
        (replace(grid, minimum=grid.minimum[:, :0]), "does not fit codes"),
        (replace(grid, scale=torch.full_like(grid.scale, 2e38)), "ends of the grid are infinite"),
        (fit_grid(rows, QuantSpec(3)), "a grid of kind real has no real minimum"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(good, grid=wrong).check()
    with pytest.raises(ValueError, match="integer has a real minimum"):
        replace(good, spec=QuantSpec(3)).check()
    with pytest.raises(ValueError, match="a symmetric grid has its zero point in the middle"):
        QuantSpec(3, symmetric=True, kind="real")
    with pytest.raises(ValueError, match="kind='x'"):
        QuantSpec(3, kind="x")


def test_rows_that_are_almost_zero_are_stored_in_float16():
    rows = weights(6, 48)
    for row, factor in ((1, 1e-4), (2, 1e-6), (3, 1e-9), (4, 1e-30)):
        rows[row] *= factor
    for spec in (QuantSpec(4, kind="real"), QuantSpec(8, 16, kind="real")):
        grid = fit_grid(rows, spec)
        answer = QuantizedWeight(grid.quantize(rows), grid, spec)
        stored = in_float16(answer, rows).check()
        assert 32 in (grid.scale_bits, grid.minimum_bits)
        assert (stored.grid.scale_bits, stored.grid.minimum_bits) == (16, 16)
        error = (stored.dequantize() - rows).abs()
        assert bool(
            (error <= stored.grid.scale[:, grid.g_idx] * 0.51 + 2.0**-11 * rows.abs() + spec.qmax * 2.0**-25).all()
        )
        assert in_float16(stored, rows) is stored


@pytest.mark.parametrize(("bits", "n"), itertools.product((1, 3), (1, 40)))
def test_positions_and_values_are_inverse(bits, n):
    rows, spec = awkward(n), QuantSpec(bits, kind="real")
    grid = fit_grid(rows, spec)
    codes = grid.quantize(rows)
    assert torch.equal(grid.dequantize(codes), codes.float() * grid.scale + grid.minimum)
    assert torch.equal(grid.quantize(grid.dequantize(codes)), codes)
    loops = (codes.float() - grid.float_zero()) * grid.scale
    torch.testing.assert_close(loops, grid.dequantize(codes), rtol=1e-6, atol=1e-7)
