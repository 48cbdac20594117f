"""Hadamard matrices by their definition, and random orthogonal ones."""

import pytest
import torch

from quant.core.hadamard import hadamard, hadamard_exists, kronecker_sizes, random_hadamard, random_orthogonal, seeded

SIZES = [1, 2, 4, 8, 12, 20, 24, 28, 32, 36, 40, 44, 48, 60, 68, 76, 80, 84, 104, 108, 344 * 4]


@pytest.mark.parametrize("n", SIZES)
def test_rows_are_orthogonal_and_of_signs(n):
    matrix = hadamard(n)
    if n == 1376:
        assert matrix is None and not hadamard_exists(n)  # 1375 and 687 are no primes
        return
    assert hadamard_exists(n) and bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 5, 6, 7, 10, 52, 92, 100, 172])
def test_sizes_without_one_are_told(n):
    assert hadamard(n) is None and not hadamard_exists(n)


@pytest.mark.parametrize("n", [1, 2, 7, 12, 14, 64, 86, 96, 172, 300])
def test_random_ones_are_orthogonal_for_every_size(n):
    matrix = random_hadamard(n, seeded(0, "a"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(matrix, random_hadamard(n, seeded(0, "a")))
    assert n == 1 or not torch.equal(matrix, random_hadamard(n, seeded(1, "a")))
    assert n == 1 or not torch.equal(matrix, random_hadamard(n, seeded(0, "b")))


def test_one_channel_spreads_evenly():
    """Every entry of a rotated unit vector has the magnitude 1 / √n, where n has a Hadamard matrix."""
    matrix = random_hadamard(96, seeded(3, "a"))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, 96**-0.5), rtol=1e-12, atol=0)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    random_orthogonal(5, seeded(0, "a"))
    random_hadamard(12, seeded(0, "a"))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (1, (1, 1)),
        (64, (8, 8)),
        (768, (24, 32)),
        (11008, (86, 128)),
        (14336, (112, 128)),
        (8960, (80, 112)),
        (97, (1, 97)),
    ],
)
def test_factors_are_even_and_known_where_they_can_be(n, sizes):
    """86 = 2 · 43 has none, and the pair that has costs far more."""
    assert kronecker_sizes(n) == sizes
