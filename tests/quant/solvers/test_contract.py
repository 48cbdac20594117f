"""What every registered solver promises; a new file in quant/ is held to it without a new test."""

import pytest
import torch

from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.linalg import relative_error
from quant.core.types import QuantSpec
from quant.run.directory import RunDirectory
from quant.solvers import declaration_of, get_solver, solver, solver_options, solvers
from quant.solvers.rtn import rtn
from tests.references import inputs, make_stats, problem, weights

SOLVERS = solvers()
SPECS = [QuantSpec(3), QuantSpec(4, 16), QuantSpec(2, symmetric=True), QuantSpec(3, 32, range="mse"), QuantSpec(8),
         QuantSpec(4, 16, kind="nvfp4"), QuantSpec(4, 32, kind="iq4_nl", range="mse")]  # fmt: skip
every_solver = pytest.mark.parametrize("name", SOLVERS)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


@every_solver
@every_spec
def test_answer_is_legal_and_not_worse_than_rtn(name, spec):
    if name == "spqr" and spec.level_kind:
        pytest.skip("its scales of two levels are of integer zero points")
    weight, stats = problem()
    answer = SOLVERS[name](weight, stats, spec).check()
    assert answer.codes.shape == weight.shape and answer.spec == spec
    assert torch.equal(answer.dequantize(), answer.grid.dequantize(answer.codes))
    error = relative_error(weight, answer.dequantize(), stats.gram)
    nearest = relative_error(weight, rtn(weight, stats, spec).dequantize(), stats.gram)
    assert error <= nearest * (1 + 1e-6)
    assert error > 0
    if name != "rtn" and spec.bits < 8:
        assert error < 0.9 * nearest  # measured: 0.79 (spqr), 0.75 (gptq), 0.51 and below with descent


@every_solver
def test_inputs_are_left_alone_and_answers_repeat(name):
    weight, stats = problem()
    kept, gram = weight.clone(), stats.gram.clone()
    first, second = (SOLVERS[name](weight, stats, QuantSpec(3, 16)) for _ in range(2))
    assert torch.equal(weight, kept) and torch.equal(stats.gram, gram)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.grid.scale, second.grid.scale)


@every_solver
def test_rows_do_not_know_of_each_other(name):
    if declaration_of(name).rows_coupled:
        pytest.skip("it declares that they do")
    weight, stats = problem()
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    answer, moved = (SOLVERS[name](w, stats, QuantSpec(3)) for w in (weight, weight[shuffled]))
    assert torch.equal(answer.codes[shuffled], moved.codes)


@every_solver
def test_one_group_equals_the_whole_row(name):
    weight, stats = problem()
    whole, grouped = (SOLVERS[name](weight, stats, QuantSpec(3, g)) for g in (-1, 64))
    assert torch.equal(whole.dequantize(), grouped.dequantize())


@every_solver
def test_dead_columns_get_their_nearest_code(name):
    weight = weights(24, 64)
    x = inputs(64, 256)
    dead = [0, 17, 63]
    x[:, dead] = 0
    stats = make_stats(x)
    answer = SOLVERS[name](weight, stats, QuantSpec(4)).check()
    assert torch.equal(answer.codes[:, dead], answer.grid.quantize(weight)[:, dead])
    assert not torch.equal(answer.codes, answer.grid.quantize(weight)) or name == "rtn"


@every_solver
def test_rank_deficient_gram(name):
    weight = weights(24, 64)
    stats = make_stats(inputs(64, 20))  # 20 tokens for 64 columns
    answer = SOLVERS[name](weight, stats, QuantSpec(3)).check()
    nearest = rtn(weight, stats, QuantSpec(3))
    assert relative_error(weight, answer.dequantize(), stats.gram) <= relative_error(
        weight, nearest.dequantize(), stats.gram
    )


@every_solver
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (8, 1), (3, 200)])
def test_odd_shapes(name, shape):
    weight, stats = weights(*shape), make_stats(inputs(shape[1], 64))
    answer = SOLVERS[name](weight, stats, QuantSpec(4)).check()
    assert answer.codes.shape == shape
    assert relative_error(weight, answer.dequantize(), stats.gram) < 0.05  # measured: at most 0.027 (rtn, one row)


@every_solver
def test_constant_and_zero_rows(name):
    weight, stats = problem()
    weight[0], weight[1] = 0.0, 0.25
    value = SOLVERS[name](weight, stats, QuantSpec(3)).check().dequantize()
    assert torch.equal(value[0], weight[0])
    shared = 0.2 if declaration_of(name).rows_coupled else 0.0  # rows that share scales: a constant one has not its own
    torch.testing.assert_close(value[1], weight[1], rtol=2e-3 + shared, atol=0)  # measured: 2.4e-4


@every_solver
@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scaling_the_weights_scales_the_answer(name, factor):
    weight, stats = problem()
    error, scaled = (
        relative_error(w, SOLVERS[name](w, stats, QuantSpec(4)).dequantize(), stats.gram)
        for w in (weight, weight * factor)
    )
    assert abs(scaled / error - 1) < 0.1  # measured: at most 0.028


@every_solver
@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_scaling_the_inputs_changes_nothing(name, factor):
    weight, x = weights(24, 64), inputs(64, 256)
    answer, scaled = (SOLVERS[name](weight, make_stats(v), QuantSpec(3)) for v in (x, x * factor))
    assert float((answer.codes != scaled.codes).float().mean()) < 0.01  # measured: none


@every_solver
def test_a_parameter_is_taken_as_it_is(name):
    weight, stats = problem()
    answer = SOLVERS[name](torch.nn.Parameter(weight), stats, QuantSpec(3))
    assert torch.equal(answer.codes, SOLVERS[name](weight, stats, QuantSpec(3)).codes)


@every_solver
def test_half_precision_weights_are_solved_in_float32(name):
    weight, stats = problem()
    half = weight.half()
    assert torch.equal(
        SOLVERS[name](half, stats, QuantSpec(3)).codes, SOLVERS[name](half.float(), stats, QuantSpec(3)).codes
    )


@every_solver
def test_non_finite_calibration_is_an_error(name):
    x = inputs(64, 32)
    x[3, 5] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        SOLVERS[name](weights(8, 64), make_stats(x), QuantSpec(3))


@every_solver
def test_blocks_of_no_columns_are_an_error(name):
    weight, stats = problem()
    if "block_size" in solver_options(SOLVERS[name]):
        for size in (0, -1):
            with pytest.raises(ValueError, match=f"block_size={size}"):
                SOLVERS[name](weight, stats, QuantSpec(8), block_size=size)


@every_solver
@pytest.mark.parametrize("factor", [1.0, 0.02])
def test_a_row_of_zeros_costs_the_others_nothing(name, factor):
    weight, stats = problem()
    weight *= factor
    spec = QuantSpec(3, 16)
    some = weight.clone()
    some[5] = 0
    errors = [relative_error(w, SOLVERS[name](w, stats, spec).check().dequantize(), stats.gram) for w in (some, weight)]
    assert errors[0] < 1.25 * errors[1]  # measured: 0.98 to 0.993


@every_solver
def test_group_size_must_divide(name):
    weight, stats = problem()
    with pytest.raises(ValueError, match="does not divide"):
        SOLVERS[name](weight, stats, QuantSpec(3, 48))


@every_solver
def test_a_given_grid_is_kept(name):
    weight, stats = problem()
    grid = rtn(weight * 0.9, stats, QuantSpec(3, 16)).grid
    answer = SOLVERS[name](weight, stats, QuantSpec(3, 16), grid=grid)
    assert torch.equal(answer.grid.scale, grid.scale) and torch.equal(answer.grid.zero, grid.zero)


@every_solver
def test_disk_and_back_is_bit_exact(name, tmp_path):
    weight, stats = problem()
    answer = SOLVERS[name](weight, stats, QuantSpec(3, 16))
    run = RunDirectory(tmp_path / "run")
    run.blocks.mkdir(parents=True)
    run.write_block(0, {"a.b": answer}, [], {"solve": 1.0})
    back = run.read_weights(0)["a.b"].check()
    assert torch.equal(back.codes, answer.codes) and torch.equal(back.dequantize(), answer.dequantize())
    assert back.spec == answer.spec and back.bits_per_weight() == answer.bits_per_weight()


@every_solver
def test_declarations_are_true_of_the_answer(name):
    weight, stats = problem()
    function, declared = SOLVERS[name], declaration_of(name)
    for options in [{}] + [{"outlier": 0.1}] * ("outlier" in solver_options(function)):
        answer = function(weight, stats, QuantSpec(3, 16), **options)
        more = answer.grid.bilevel is not None or bool(answer.outliers is not None and answer.outliers.index.numel())
        every = solver_options(function) | options
        assert declared.outliers(every) == more
        # declared: at most 7.3 matrices of the Gram matrix's size (quantease with outliers)
        assert 0 <= declared.workspace(24, 64, every, 16) < 20 * 4 * 64 * 64


def test_a_solver_that_declares_nothing_is_planned_for(monkeypatch):
    from quant import solvers as registry

    for registered in ("_solvers", "_declarations"):
        monkeypatch.setattr(registry, registered, dict(getattr(registry, registered)))

    @solver("nearest")
    def nearest(weight, stats, spec, *, strength=1.0):
        return rtn(weight * strength, stats, spec)

    declared, options = declaration_of("nearest"), solver_options(nearest)
    assert not declared.outliers(options) and not declared.rows_coupled
    assert declared.workspace(24, 64, options, -1) == 0


def test_unknown_solver_names_the_nearest():
    with pytest.raises(InputError, match="did you mean quantease"):
        get_solver("quantese")


def test_options_are_read_from_the_signature():
    assert solver_options(get_solver("gptq"))["percdamp"] == 0.01
    assert "grid" not in solver_options(get_solver("gptq"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_solver
@pytest.mark.parametrize("spec", [QuantSpec(3), QuantSpec(4, 64), QuantSpec(2, 64, range="mse")], ids=str)
@pytest.mark.parametrize("shape", [(768, 256), (256, 768)], ids=str)
def test_cuda_gives_the_answer_of_the_cpu(name, spec, shape):
    weight, stats = weights(*shape), make_stats(inputs(shape[1], 3 * shape[1]))
    there = GramStats.from_gram(stats.gram.to("cuda"), stats.n_tokens)
    answer = SOLVERS[name](weight, stats, spec).check()
    on_device = SOLVERS[name](weight.to("cuda"), there, spec).to("cpu").check()
    errors = [relative_error(weight, a.dequantize(), stats.gram) for a in (on_device, answer)]
    # Sums are ordered differently: a value on the edge between two codes may fall either way, and later ones follow.
    assert abs(errors[0] / errors[1] - 1) < 0.01
    assert float((on_device.codes != answer.codes).float().mean()) < (1e-4 if name == "rtn" else 0.2)
    torch.testing.assert_close(on_device.grid.scale, answer.grid.scale, rtol=0.05, atol=1e-4)
