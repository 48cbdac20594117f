"""Solvers on weights of every magnitude that float32 has: legal, finite, and as good as on ordinary ones."""

import math
from dataclasses import replace

import pytest
import torch

from quant.core.grid import fit_grid
from quant.core.linalg import objective, relative_error
from quant.core.scaling import exponent_outside
from quant.core.types import FINEST, LARGEST, QuantSpec
from quant.run.directory import RunDirectory
from quant.run.solving import Recipe, solve_linear
from quant.run.statistics import InputStats
from quant.solvers import get_solver, solver_options, solvers
from quant.solvers.quantease import quantease
from quant.solvers.rtn import rtn
from tests.references import objective64, problem, weights

MORE = {
    "quantease": [
        {"outlier": 0.02},
        {"outlier": 0.05, "structure_outlier": True},
        {"refit_grid": True},
        {"search_grid": True},
    ],
    "gptq_quantease": [{"refit_grid": True}],
    "spqr": [{"outlier": 0.3}],
}
WAYS = [(name, options) for name in solvers() for options in [{}, *MORE.get(name, [])]]
every_way = pytest.mark.parametrize(("name", "options"), WAYS, ids=[f"{n} {' '.join(o)}".strip() for n, o in WAYS])
SPECS = [QuantSpec(3, 16), QuantSpec(2, symmetric=True), QuantSpec(8)]


def error64(weight, approximation, gram):
    """The relative error in float64, of weights that are brought to ordinary magnitudes."""
    unit = math.ldexp(1.0, math.frexp(float(weight.double().abs().max()))[1])
    w, a = weight.double() / unit, approximation.double() / unit
    return objective64(w - a, gram) / objective64(w, gram)


def solved(name, options, weight, stats, spec):
    """The answer and its error; both must be what a checkpoint can hold and a journal can tell."""
    answer = get_solver(name)(weight, stats, spec, **options).check()
    value = answer.dequantize()
    assert bool((value.abs() <= spec.largest).all()) and answer.spec == spec
    error = error64(weight, value, stats.gram)
    assert relative_error(weight, value, stats.gram) == pytest.approx(error, rel=1e-4)
    return answer, error


@every_way
@pytest.mark.parametrize("factor", [1e-40, 1e-30, 1e-20, 1e-6, 1e6, 1e20, 1e30, None])
def test_errors_are_those_of_ordinary_weights(name, options, factor):
    """None: up to float32's largest number, where grids lose a level to overflow and the error may be any below RTN's."""
    weight, stats = problem(16, 32, 128)
    other = weight / weight.abs().max() * 3e38 if factor is None else weight * factor
    for spec in SPECS:
        error = solved(name, options, other, stats, spec)[1]
        assert error <= error64(other, rtn(other, stats, spec).dequantize(), stats.gram) * (1 + 1e-6)
        if factor is not None:  # 0.84 to 1.07: float32 scales instead of float16 ones
            assert 0.8 < error / solved(name, options, weight, stats, spec)[1] < 1.1


@every_way
@pytest.mark.parametrize(("low", "high"), [(60, 90), (-60, -90)])
def test_powers_of_two_scale_the_answer(name, options, low, high):
    weight, stats = problem(16, 32, 128)
    ends = QuantSpec(3, 16)
    first, second = (get_solver(name)(weight * 2.0**k, stats, ends, **options).check() for k in (low, high))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.grid.zero, second.grid.zero)
    assert torch.equal(first.dequantize() * 2.0 ** (high - low), second.dequantize())


@every_way
@pytest.mark.parametrize("value", [1.4e-45, 1e-42, 1e-30, 1e20, 3e38])
@pytest.mark.parametrize("shape", ["constant", "spread"])
def test_a_row_of_another_magnitude(name, options, value, shape):
    weight, stats = problem(16, 32, 128)
    weight[5] = value * (weight[5].sign() if shape == "constant" else weight[5] / weight[5].abs().max())
    for spec in (QuantSpec(3, 16), QuantSpec(4, symmetric=True)):
        error = solved(name, options, weight, stats, spec)[1]
        assert error <= error64(weight, rtn(weight, stats, spec).dequantize(), stats.gram) * (1 + 1e-6)


@every_way
def test_weights_of_a_few_denormals_are_whole_steps(name, options):
    """float32 has no scale below 1.4e-45: a grid of 8 bits that holds all of a few steps holds them exactly."""
    stats = problem(16, 32, 128)[1]
    weight = (weights(16, 32) * 3).round() * 1.4e-45
    answer = solved(name, options, weight, stats, QuantSpec(8))[0]
    assert bool((answer.grid.scale >= 1.4e-45).all())
    assert name == "spqr" or torch.equal(rtn(weight, stats, QuantSpec(8)).dequantize(), weight)
    error = error64(weight, answer.dequantize(), stats.gram)
    assert error == 0


@every_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deployed_values_are_finite_in_the_dtype_of_the_checkpoint(name, options, dtype):
    """Weights up to its largest number: without the bound, the outermost level is beyond it."""
    weight, stats = problem(16, 32, 128)
    largest = torch.finfo(dtype).max
    weight = (weight / weight.abs().max() * largest).to(dtype).float()
    for spec in (*SPECS, QuantSpec(3, 16, range="mse")):
        bounded = replace(spec, largest=largest)
        answer, error = solved(name, options, weight, stats, bounded)
        assert bool(torch.isfinite(answer.dequantize().to(dtype)).all())
        steps = torch.maximum(answer.grid.zero, answer.grid.qmax - answer.grid.zero)
        assert bool((answer.grid.scale.double() * steps <= largest).all()), "not even a code that is not used"
        assert error <= error64(weight, rtn(weight, stats, bounded).dequantize(), stats.gram) * (1 + 1e-6)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_a_given_grid_and_a_start_are_scaled_too(factor):
    weight, stats = problem(16, 32, 128)
    spec = QuantSpec(3, 16)
    for name in solvers():
        grid = fit_grid(weight * (0.9 * factor), spec)
        answer = get_solver(name)(weight * factor, stats, spec, grid=grid).check()
        assert torch.equal(answer.grid.scale, grid.scale) and torch.equal(answer.grid.zero, grid.zero)
    start = rtn(weight * factor, stats, spec)
    answer = quantease(weight * factor, stats, spec, init=start, relax=False)
    assert torch.equal(answer.grid.scale, start.grid.scale) and not torch.equal(answer.codes, start.codes)
    assert error64(weight * factor, answer.dequantize(), stats.gram) < 0.9 * error64(
        weight * factor, start.dequantize(), stats.gram
    )


@pytest.mark.parametrize("factor", [1e-30, 1e30])
@pytest.mark.parametrize("name", ["quantease", "spqr"])
def test_disk_and_back_is_bit_exact(name, factor, tmp_path):
    weight, stats = problem(16, 32, 128)
    answer = get_solver(name)(weight * factor, stats, QuantSpec(3, 16, largest=1e38), outlier=0.1)
    run = RunDirectory(tmp_path / "run")
    run.blocks.mkdir(parents=True)
    run.write_block(0, {"a": answer}, [], {"solve": 1.0})
    back = run.read_weights(0)["a"]
    assert torch.equal(back.dequantize(), answer.dequantize()) and back.storage_bits() == answer.storage_bits()
    assert back.outliers.value.dtype == answer.outliers.value.dtype == torch.float32


@pytest.mark.parametrize("factor", [1e-30, 1e-42, 1e30, 1e38])
def test_the_journal_overflows_at_no_magnitude(factor):
    weight, stats = problem(16, 32, 128)
    spec = QuantSpec(4)
    recipe, inputs = Recipe("rtn", rtn, spec), InputStats(stats)
    ordinary, other = (solve_linear(0, "here", w, inputs, recipe)[1] for w in (weight, weight * factor / 4))
    assert other.weight_peak == pytest.approx(ordinary.weight_peak, rel=1e-2)  # 1e-42 is 700 denormals
    assert 0 < other.relative_error < 0.05 and other.verdict == "ok"


def test_errors_that_are_no_numbers_are_told():
    weight, stats = problem(16, 32, 128)
    assert math.isnan(objective(weight * math.nan, stats.gram))
    for wrong in (math.nan, math.inf):
        assert not math.isfinite(relative_error(weight, weight.masked_fill(weight > 2, wrong), stats.gram))


def test_only_weights_out_of_range_are_scaled():
    for peak in (2.0**-40, 1e-6, 1.0, 65504.0, 2.0**39.9, 0.0, math.inf):
        assert exponent_outside(torch.tensor([[peak, -peak / 2]])) == 0
    for peak in (FINEST, 1e-20, 1e20, LARGEST):
        k = exponent_outside(torch.tensor([[0.0, -peak]], requires_grad=True))
        assert 2.0**-41 <= peak * 2.0**-k < 2.0**40 and k != 0


def test_options_are_read_through_the_scaling():
    assert {"num_iter", "outlier", "search_grid"} <= solver_options(get_solver("quantease")).keys()
    assert get_solver("rtn") is rtn
