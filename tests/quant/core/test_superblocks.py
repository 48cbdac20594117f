"""Grids of GGUF's super-blocks: taken apart exactly, searched, refitted in closed form, and the file's own numbers."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from quant.core.gram import GramStats
from quant.core.grid import fit_grid
from quant.core.names import SUPER_COLUMNS, SUPER_GRIDS
from quant.core.superblocks import refit_integers, refit_units, units_of
from quant.core.types import Grid, QuantSpec, group_index
from quant.export.gguf_types import encode, type_of
from quant.kernels.matmul.pack import pack_weight
from quant.solvers import get_solver
from quant.solvers.quantease import Descent
from tests.references import objective64

KINDS = tuple(SUPER_GRIDS)
METHODS = {
    "rtn": {}, "gptq": {}, "gptq, groups in order": {"group_aware": True}, "gptaq": {}, "qronos": {}, "quantease": {},
    "quantease, searched": {"search_grid": True, "refit_grid": True, "num_iter": 6},
    "gptq_quantease": {"refit_grid": True, "num_iter": 4},
}  # fmt: skip


def spec_for(kind: str, range_: str = "mse") -> QuantSpec:
    return QuantSpec(SUPER_GRIDS[kind].bits, SUPER_GRIDS[kind].part, range=range_, kind=kind)


def layer(n_out: int = 6, n_in: int = 512, seed: int = 0) -> tuple[torch.Tensor, GramStats]:
    """Weights with rows of several sizes, and what correlated inputs with a few large channels give."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, n_in, generator=generator) * torch.logspace(-3, 0, n_out)[:, None]
    mixing = torch.eye(n_in) + 0.1 * torch.randn(n_in, n_in, generator=generator)
    x = torch.randn(3 * n_in, n_in, generator=generator) @ mixing
    x[:, ::37] *= 20
    stats = GramStats.from_gram(x.T @ x)
    stats.cross = stats.gram.clone()
    return weight, stats


def awkward(n_in: int = 256) -> torch.Tensor:
    """Rows of zeros, of one value, of one sign, with one outlier, with parts that are zero, almost too small, and large."""
    rows = torch.randn(8, n_in, generator=torch.Generator().manual_seed(1))
    rows[0] = 0
    rows[1] = 0.25
    rows[2] = rows[2].abs() + 0.5
    rows[3] = -rows[3].abs()
    rows[4, 7] = 1000
    rows[5, 32:96] = 0
    rows[6] *= 1e-6
    rows[7] *= 3e4
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_taken_apart_exactly(kind):
    own, generator = SUPER_GRIDS[kind], torch.Generator().manual_seed(2)
    shape = (40, 2, SUPER_COLUMNS // own.part)
    d, e = (torch.rand(2, 40, 2, generator=generator) * 0.1 + 1e-4).half().float()
    a = torch.randint(1, own.most + 1, shape, generator=generator).float()
    b = torch.randint(0, own.most + 1, shape, generator=generator).float()
    scale, minimum = (d[..., None] * a).flatten(1), -(e[..., None] * b).flatten(1)
    index = group_index(512, own.part)
    zero = torch.full(scale.shape, 2 ** (own.bits - 1), dtype=torch.int32)
    spec = spec_for(kind)
    grid = Grid.real(scale, minimum, index, spec.qmax) if own.minima else Grid(scale, zero, index, spec.qmax)
    units = units_of(grid, spec)
    assert torch.equal(units.scale, scale) and float(units.a.max()) <= own.most
    if own.minima:
        assert torch.equal(units.minimum, minimum) and float(units.b.max()) <= own.most
    spoilt = scale.clone()
    spoilt[3, 1] *= 1 + 2.0**-20
    other = Grid.real(spoilt, minimum, index, spec.qmax) if own.minima else Grid(spoilt, zero, index, spec.qmax)
    with pytest.raises(ValueError, match="no small integers times a float16 number"):
        units_of(other, spec)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_answer_is_the_file_s_own(kind, method):
    """Dequantized by the gguf package the blocks are the answer, in every element; and they take the bits that it says."""
    solve, (weight, stats) = get_solver(method.split(",")[0]), layer()
    spec = spec_for(kind)
    check_file(solve(weight, stats, spec, **METHODS[method]).check(), kind)


@pytest.mark.parametrize("range_", ["minmax", "mse"])
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_weights_are_held(kind, range_):
    weight, spec = awkward(), spec_for(kind, range_)
    answer = get_solver("rtn")(weight, None, spec).check()
    check_file(answer, kind)
    scale = answer.grid.scale.repeat_interleave(spec.group_size, 1)
    inside = (weight - answer.dequantize()).abs() <= 0.5001 * scale
    # but for rows whose parts differ by more than the integers can, or that float16 cannot scale
    assert float(inside[[1, 2, 3]].float().mean()) > 0.6 and bool((answer.dequantize()[0].abs() <= 2e-6).all())


def check_file(answer, kind: str) -> None:
    chosen = type_of(answer)
    data = encode(answer, chosen)
    assert chosen.type == Type[kind.upper()] and 8 * data.size == answer.storage_bits()
    assert np.array_equal(gguf.dequantize(data, chosen.type), answer.dequantize().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_searching_refitting_and_descent_each_lower_the_objective(kind):
    weight, stats = layer()
    left = {}
    for name, options, range_ in (
        ("plain", {}, "minmax"), ("rtn", {}, "mse"), ("gptq", {}, "mse"), ("quantease", {"num_iter": 9}, "mse"),
        ("best", {"num_iter": 9, "search_grid": True, "refit_grid": True}, "mse"),
    ):  # fmt: skip
        solver = get_solver({"plain": "rtn", "best": "quantease"}.get(name, name))
        left[name] = objective64(
            weight - solver(weight, stats, spec_for(kind, range_), **options).dequantize(), stats.gram
        )
    assert left["best"] < left["quantease"] < left["rtn"] < left["plain"] and left["gptq"] < left["rtn"], left


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_is_near_what_every_pair_of_integers_would_give(kind):
    """One part: all scales and minima that its integers can make, with the numbers of the super-block that were chosen."""
    own, spec = SUPER_GRIDS[kind], spec_for(kind)
    weight = layer(3, 256, seed=5)[0]
    grid = fit_grid(weight, spec, torch.ones(256))
    units, wide = units_of(grid, spec), weight.double()
    for row in range(len(weight)):
        part, best = wide[row, : own.part], float("inf")
        a = torch.arange(1, own.most + 1, dtype=torch.float64)[:, None, None] * units.d[row, 0]
        if own.minima:
            b = torch.arange(own.most + 1, dtype=torch.float64)[:, None] * units.e[row, 0]
            codes = ((part + b) / a).round().clamp(0, spec.qmax)
            best = float((codes * a - b - part).square().sum(-1).min())
        else:
            for zero in (2 ** (own.bits - 1), 2 ** (own.bits - 1) - 1):
                codes = ((part / a).round() + zero).clamp(0, spec.qmax) - zero
                best = min(best, float((codes * a - part).square().sum(-1).min()))
        mine = float((grid.dequantize(grid.quantize(weight))[row, : own.part].double() - part).square().sum())
        assert best <= mine * (1 + 1e-6) and mine <= 1.35 * best + 1e-12, (mine, best)


def quadratic(codes, a, b, d, e, target, gram) -> torch.Tensor:
    """Σ over the inputs of (target - Ŵ)², float64 [out], plainly."""
    error = target - (d[:, None] * a * codes - e[:, None] * b).double()
    return ((error @ gram.double()) * error).sum(1)


def test_the_refit_of_a_super_block_is_the_best_float16_pair():
    """Against every pair of float16 numbers around it; and never above what was there."""
    weight, stats = layer(5, 256, seed=3)
    spec, gram = spec_for("q4_k"), layer(5, 256, seed=3)[1].gram
    grid = fit_grid(weight, QuantSpec(4, 32, kind="q4_k"))
    units, codes = units_of(grid, spec), grid.quantize(weight).float()
    a, b = (t[:, 0].repeat_interleave(32, 1) for t in (units.a, units.b))
    d, e = units.d[:, 0], units.e[:, 0]
    before = quadratic(codes, a, b, d, e, weight.double(), gram)
    correlation = (weight - grid.dequantize(grid.quantize(weight))) @ gram
    new_d, new_e = refit_units(codes, d.clone(), a, e.clone(), b, gram, correlation)
    after = quadratic(codes, a, b, new_d, new_e, weight.double(), gram)
    assert bool((after < before).all())
    assert torch.equal(new_d.half().float(), new_d) and torch.equal(new_e.half().float(), new_e)
    best = after.clone()
    for i in range(-3, 4):
        for j in range(-3, 4):
            around = [(t.half().view(torch.int16) + k).view(torch.float16).float() for t, k in ((new_d, i), (new_e, j))]
            best = torch.minimum(best, quadratic(codes, a, b, *around, weight.double(), gram))
    assert bool((after <= best * 1.002).all())


@pytest.mark.parametrize("minima", [True, False])
def test_the_integers_of_a_part_against_all_there_are(minima):
    weight, stats = layer(6, 32, seed=4)
    gram, generator = stats.gram, torch.Generator().manual_seed(0)
    codes = torch.randint(0 if minima else -4, 4, weight.shape, generator=generator).float()
    d = e = torch.full((6,), 0.0625)
    a, b = torch.full((6,), 5.0), torch.full((6,), 4.0 if minima else 0.0)
    weight = 0.0625 * (7 * codes - 9 * minima) + 0.05 * weight  # another pair is much better
    correlation = (weight - (d[:, None] * a[:, None] * codes - e[:, None] * b[:, None])) @ gram
    new_a, new_b = refit_integers(codes, d, a, e if minima else None, b, gram, correlation, 15)
    wide = lambda t: t[:, None].expand_as(codes)  # noqa: E731
    after = quadratic(codes, wide(new_a), wide(new_b), d, e, weight.double(), gram)
    lowest = torch.full_like(after, torch.inf)
    for tried_a in range(1, 16):
        for tried_b in range(16) if minima else (0,):
            pair = (torch.full((6,), float(n)) for n in (tried_a, tried_b))
            lowest = torch.minimum(lowest, quadratic(codes, *map(wide, pair), d, e, weight.double(), gram))
    before = quadratic(codes, wide(a), wide(b), d, e, weight.double(), gram)
    assert bool((after <= before).all()) and bool((before - after >= 0.95 * (before - lowest)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_refit_keeps_the_descent_s_books(kind):
    """The residual is W - Ŵ and the correlation its product, after every refit, which never raises the objective."""
    weight, stats = layer(seed=6)
    spec = spec_for(kind, "minmax")
    descent = Descent(weight, stats.gram, fit_grid(weight, spec), 64)
    last = float("inf")
    for _ in range(3):
        descent.sweep(rounding=True)
        before = objective64(descent.residual, stats.gram)
        descent.refit(spec)
        grid = descent.grid(descent.group)
        units_of(grid, spec)
        expected = weight - grid.dequantize(descent.codes)
        assert torch.allclose(descent.residual, expected, atol=1e-5 * float(weight.abs().max()))
        product = expected.double() @ stats.gram.double()
        assert float((descent.correlation - product).norm()) <= 1e-4 * float((weight @ stats.gram).norm())
        after = objective64(expected, stats.gram)
        assert after <= before * (1 + 1e-6) and after < last
        last = after


def test_what_no_grid_is_says_so():
    with pytest.raises(ValueError, match="it has 4 bits in groups of 32"):
        QuantSpec(3, 32, kind="q4_k")
    with pytest.raises(ValueError, match="super-blocks of 256 columns, not in_features=128"):
        fit_grid(torch.randn(4, 128), spec_for("q4_k"))
    weight, stats = layer(4, 256)
    with pytest.raises(ValueError, match="q4_k holds columns in order: leave act_order out"):
        get_solver("quantease")(weight, stats, spec_for("q4_k"), act_order=True, static_groups=True, refit_grid=True)
    with pytest.raises(ValueError, match="integer zero points"):
        get_solver("spqr")(weight, stats, spec_for("q3_k"))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_products_are_those_of_the_values(kind):
    weight, stats = layer(40, 512, seed=7)
    answer = get_solver("gptq")(weight, stats, spec_for(kind))
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(8))
    expected = x.double() @ answer.dequantize().double().T
    assert torch.allclose(pack_weight(answer).matmul(x).double(), expected, atol=1e-4 * float(expected.abs().max()))
