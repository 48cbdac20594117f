import pytest
import torch

from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.grid import fit_grid
from quant.core.linalg import (
    SingularGramError,
    damped_factor,
    objective,
    relative_error,
    upper_factor,
)
from quant.core.types import QuantSpec
from quant.solvers.gptq import blocks_of, gptq
from tests.references import damped, inputs, make_stats, naive_gptq, objective64, weights

CASES = {
    "rows": (QuantSpec(3), {}),
    "symmetric": (QuantSpec(4, symmetric=True), {}),
    "act-order": (QuantSpec(3), {"act_order": True}),
    "groups": (QuantSpec(3, 8), {}),
    "groups of 32, mse": (QuantSpec(3, 32, range="mse"), {}),
    "groups, act-order": (QuantSpec(2, 16), {"act_order": True}),
    "groups, static": (QuantSpec(3, 16), {"static_groups": True}),
    "groups, static, act-order": (QuantSpec(3, 16), {"static_groups": True, "act_order": True}),
    "light damping": (QuantSpec(4), {"percdamp": 1e-4}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block_size", [128, 20])
def test_equals_explicit_inverses(case: str, block_size: int) -> None:
    spec, options = CASES[case]
    weight, stats = weights(10, 96), make_stats(inputs(96, 400))
    answer = gptq(weight, stats, spec, block_size=block_size, **options)
    order = (
        torch.argsort(stats.diagonal, descending=True, stable=True) if options.get("act_order") else torch.arange(96)
    )
    static = spec.group_size == -1 or options.get("static_groups")
    grid = fit_grid(weight, spec, stats.diagonal) if static else None
    codes, values = naive_gptq(weight, stats.gram, spec, options.get("percdamp", 0.01), order, grid)
    # float32 against float64: a code may differ where a value lies on the edge between two; none does here but ties.
    assert float((answer.codes != codes).float().mean()) < 0.002  # measured: the same codes
    own, expected = (objective64(weight - v, stats.gram) for v in (answer.dequantize(), values.float()))
    assert abs(own / expected - 1) < 2e-3 if bool((answer.codes != codes).any()) else abs(own / expected - 1) < 1e-6


def test_dead_columns_like_the_reference() -> None:
    x = inputs(64, 256)
    x[:, [3, 40]] = 0
    weight, stats = weights(8, 64), make_stats(x)
    codes, _ = naive_gptq(weight, stats.gram, QuantSpec(3), 0.01, torch.arange(64), fit_grid(weight, QuantSpec(3)))
    assert torch.equal(gptq(weight, stats, QuantSpec(3)).codes, codes)


def test_act_order_with_groups_reports_its_column_order() -> None:
    weight, stats = weights(8, 64), make_stats(inputs(64, 256))
    dynamic = gptq(weight, stats, QuantSpec(3, 16), act_order=True)
    static = gptq(weight, stats, QuantSpec(3, 16), act_order=True, static_groups=True)
    assert not dynamic.has_plain_groups() and static.has_plain_groups()
    assert dynamic.bits_per_weight() > static.bits_per_weight()


def test_groups_larger_than_a_block() -> None:
    weight, stats = weights(6, 384), make_stats(inputs(384, 800))
    spec = QuantSpec(3, 192)
    codes, values = naive_gptq(weight, stats.gram, spec, 0.01, torch.arange(384), None)
    answer = gptq(weight, stats, spec, block_size=128)
    own, expected = (objective64(weight - v, stats.gram) for v in (answer.dequantize(), values.float()))
    # measured: the same codes
    assert float((answer.codes != codes).float().mean()) < 0.002 and abs(own / expected - 1) < 2e-3


def test_factor_gives_the_feedback_of_the_published_one() -> None:
    """GPTQ feeds back (w - ŵ)/U_jj · U_jk with the factor U of the inverse; here U is not needed (U = V⁻¹)."""
    undamped = make_stats(inputs(50, 200)).gram.double()
    gram = damped(undamped, 0.01)
    upper, ok = upper_factor(undamped, 0.01)
    assert ok and torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper @ upper.T, gram, rtol=1e-12, atol=1e-9)
    published = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    torch.testing.assert_close(torch.linalg.inv(upper), published, rtol=1e-9, atol=1e-12)
    assert not upper_factor(-gram, 0.01)[1]


def test_singular_gram_names_the_damping_that_works() -> None:
    stats = make_stats(inputs(32, 200))
    lowest = float(torch.linalg.eigvalsh(stats.gram)[0])
    stats.gram.diagonal().sub_(lowest + 0.05 * float(stats.diagonal.mean()))  # not even positive semidefinite
    with pytest.raises(
        SingularGramError, match=r"use --percdamp [\d.]+, more calibration samples, or --auto-damp"
    ) as error:
        gptq(weights(4, 32), stats, QuantSpec(4), percdamp=1e-6)
    works = float(str(error.value).split("--percdamp ")[1].split(",")[0])
    _, used = damped_factor(stats.gram, 1e-6, auto_damp=True)
    assert used == pytest.approx(works) and works > 1e-6
    answer = gptq(weights(4, 32), stats, QuantSpec(4), percdamp=1e-6, auto_damp=True).check()
    assert answer.info["percdamp"] == used
    gptq(weights(4, 32), stats, QuantSpec(4), percdamp=works).check()


def test_hopeless_gram_is_an_error_even_with_auto_damp() -> None:
    stats = GramStats.from_gram(torch.tensor([[1.0, 50, 0], [50, 1, 0], [0, 0, 1]]))
    with pytest.raises(SingularGramError, match="degenerate"):
        gptq(weights(2, 3), stats, QuantSpec(4), auto_damp=True)


def test_objective_and_relative_error_against_the_samples() -> None:
    x, weight = inputs(40, 300), weights(12, 40)
    approximation = weight + 0.01 * weights(12, 40, seed=9)
    stats = make_stats(x)
    direct = ((weight - approximation).double() @ x.double().T).square().sum()
    norm = (weight.double() @ x.double().T).square().sum()
    assert objective(weight - approximation, stats.gram) == pytest.approx(float(direct), rel=1e-5)
    assert relative_error(weight, approximation, stats.gram) == pytest.approx(float(direct / norm), rel=1e-5)
    assert relative_error(weight, weight, stats.gram) == 0.0
    assert relative_error(weight * 0, weight, stats.gram) == float("inf")


def test_statistics_add_up_and_do_not_depend_on_batches_or_dtype() -> None:
    x = inputs(24, 9000)
    whole, parts = make_stats(x), GramStats(24)
    for batch in x.view(9, 10, 100, 24):
        parts.update(batch)
    assert whole.n_tokens == parts.n_tokens == 9000
    reference = x.double().T @ x.double()
    for stats in (whole, parts):
        torch.testing.assert_close(stats.gram.double(), reference, rtol=1e-4, atol=float(reference.abs().max()) * 1e-6)
    half = GramStats(24)
    half.update(x.half())
    assert half.gram.dtype == torch.float32
    torch.testing.assert_close(half.gram, make_stats(x.half().float()).gram)


def test_infinite_input_is_named() -> None:
    stats = GramStats(4)
    stats.update(torch.tensor([[1.0, torch.inf, 0, 0]]))
    with pytest.raises(InputError, match="block 3 fc1: calibration inputs are not finite"):
        stats.check("block 3 fc1")


@pytest.mark.parametrize(
    ("n_in", "size", "block_size"), [(20, 5, 12), (20, 10, 4), (21, 21, 8), (7, 3, 3), (9, 4, 1), (6, 8, 8)]
)
def test_blocks_are_groups_or_pieces_of_one(n_in, size, block_size):
    blocks = list(blocks_of(n_in, size, block_size))
    columns = [j for parts in blocks for part in parts for j in range(part.start, part.stop)]
    assert columns == list(range(n_in)), "every column once, in order"
    for parts in blocks:
        assert parts[-1].stop - parts[0].start <= block_size
        for part in parts:
            assert part.start // size == (part.stop - 1) // size, "a part lies in one group"
            assert size > block_size or part.start % size == 0
    starts = {part.start for parts in blocks for part in parts}
    assert starts >= set(range(0, n_in, size)), "the grid of every group is fitted at its first column"
