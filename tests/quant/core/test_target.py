"""The corrected target: the optimum of its loss, in float64 and by brute force."""

import pytest
import torch

from quant.core.gram import GramStats
from quant.core.linalg import SingularGramError
from quant.core.target import Correction, corrected, divided


def double_stats(x, full, lacking):
    """Statistics in float64, as `GramStats.update` sums them in float32."""
    stats = GramStats.from_gram(x.T @ x, len(x))
    stats._sum, stats.cross, stats.residual = x.T @ x, full.T @ x, lacking.T @ x
    return stats


def problem(seed, tokens=200, n_in=12, n_out=6):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    full, weight, lacking = draw(tokens, n_in), draw(n_out, n_in), draw(tokens, n_out)
    return full, full @ draw(n_in, n_in) * 0.3 + full, weight, lacking


def loss(candidate, weight, full, x, lacking, rho, damping):
    wanted = full @ weight.T + rho * lacking
    return float((wanted - x @ candidate.T).square().sum() + damping * (candidate - weight).square().sum())


@pytest.mark.parametrize("rho", [0.0, 1.0])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_the_target_is_the_optimum_of_what_the_original_says(rho, damping):
    full, x, weight, lacking = problem(4)
    stats = double_stats(x, full, lacking)
    target, damped = corrected(weight, stats, Correction(1.0, rho, damping))
    added = damping * float(stats.gram.diagonal().mean())
    torch.testing.assert_close(damped.gram.double(), stats.gram + added * torch.eye(12), rtol=1e-6, atol=1e-4)
    best = loss(target, weight, full, x, lacking, rho, added)
    assert best < 0.9 * loss(weight, weight, full, x, lacking, rho, added), "W itself is no optimum"
    generator = torch.Generator().manual_seed(5)
    for step in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            other = target + step * torch.randn(target.shape, generator=generator, dtype=torch.float64)
            left = loss(other, weight, full, x, lacking, rho, added) - best
            apart = float((x @ (target - other).T).square().sum() + added * (target - other).square().sum())
            assert left == pytest.approx(apart, rel=1e-6), "what is left is the solvers' own objective"


def test_strength_goes_from_the_weight_to_the_target():
    full, x, weight, lacking = problem(6)
    stats = double_stats(x, full, lacking)
    whole = corrected(weight, stats, Correction(1.0))[0]
    torch.testing.assert_close(corrected(weight, stats, Correction(0.0))[0], weight)
    torch.testing.assert_close(corrected(weight, stats, Correction(0.25))[0], weight + 0.25 * (whole - weight))
    stats.cross = stats.gram.clone()
    torch.testing.assert_close(corrected(weight, stats, Correction(1.0))[0], weight, msg="equal inputs correct nothing")


def test_columns_without_inputs_and_too_few_tokens_stay_at_the_weight():
    full, x, weight, lacking = problem(7, tokens=5)
    full[:, 3], x[:, 3] = 0, 0
    stats = double_stats(x, full, lacking)
    target, damped = corrected(weight, stats, Correction(1.0, 1.0, 0.0 if stats.rank > 12 else 1e-2))
    torch.testing.assert_close(target[:, 3], weight[:, 3])
    assert damped.rank == stats.rank == 5, "the damping hides no rank"
    unseen = torch.linalg.svd(x, full_matrices=True).Vh[5:]  # directions of no input
    assert float(((target - weight) @ unseen.T).abs().max()) < 1e-9


@pytest.mark.parametrize("magnitude", [2.0**-100, 2.0**100])
def test_any_magnitude_of_the_weights(magnitude):
    full, x, weight, lacking = (tensor.float() for tensor in problem(8))
    stats = GramStats(12)
    stats.update(x, full, lacking)
    plain = corrected(weight, stats, Correction(1.0))[0]
    torch.testing.assert_close(corrected(weight * magnitude, stats, Correction(1.0))[0], plain * magnitude)


def test_what_cannot_be_corrected_is_said():
    with pytest.raises(ValueError, match="no cross term"):
        corrected(torch.ones(2, 3), GramStats.from_gram(torch.eye(3)), Correction())
    with pytest.raises(SingularGramError, match="more calibration samples"):
        divided(torch.ones(2, 2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]))


def test_the_residual_is_summed_with_the_quantized_inputs():
    full, x, _, lacking = (tensor.float() for tensor in problem(9))
    stats = GramStats(12)
    for rows in (slice(0, 70), slice(70, 200)):
        stats.update(x[rows], full[rows], lacking[rows])
    torch.testing.assert_close(stats.residual.double(), lacking.double().T @ x.double(), rtol=1e-5, atol=1e-3)
    assert stats.residual.shape == (6, 12)
