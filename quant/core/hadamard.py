"""Orthogonal matrices that spread over all channels what stands in few: Hadamard's, with random signs, for every size."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def hadamard(n: int) -> Tensor | None:
    """Entries ±1 with H Hᵀ = n I, float64 [n, n]: by doubling (Sylvester 1867) and from squares modulo a prime
    (Paley 1933, both constructions: n - 1 or n / 2 - 1 is a prime). None for sizes that these do not reach."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 2 == 0 and (half := hadamard(n // 2)) is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if n % 4:
        return None
    if (n - 1) % 4 == 3 and is_prime(n - 1):
        return torch.eye(n, dtype=torch.float64) + _bordered(n - 1, -1.0)
    if (n // 2 - 1) % 4 == 1 and is_prime(n // 2 - 1):
        signs, diagonal = ([[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]])
        whole = torch.kron(_bordered(n // 2 - 1, 1.0), torch.tensor(signs, dtype=torch.float64))
        return whole + torch.kron(torch.eye(n // 2, dtype=torch.float64), torch.tensor(diagonal, dtype=torch.float64))
    return None


def is_prime(n: int) -> bool:
    """Whether n has no divisor but 1 and itself."""
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _bordered(q: int, corner: float) -> Tensor:
    """[[0, 1ᵀ], [±1, χ(i - j)]] of size q + 1: χ(x) is 1 for squares modulo the prime q, -1 for others, 0 for 0."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[(torch.arange(1, q) ** 2) % q] = 1.0
    character[0] = 0.0
    place = torch.arange(q)
    whole = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    whole[0, 1:], whole[1:, 0] = 1.0, corner
    whole[1:, 1:] = character[(place[:, None] - place) % q]
    return whole


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """diag(s) H / √n with random signs s: orthogonal, float64 [n, n].

    Where no Hadamard matrix of the size is known here, that of the largest divisor that has one, Kronecker a random
    orthogonal matrix of what is left (14 = 2 · 7, 172 = 4 · 43).
    """
    size = next(size for size in range(n, 0, -1) if n % size == 0 and hadamard_exists(size))
    known = hadamard(size)
    assert known is not None
    rest = random_orthogonal(n // size, generator)
    signs = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
    return signs * torch.kron(known / math.sqrt(size), rest)


def hadamard_exists(n: int) -> bool:
    """Whether `hadamard` has a matrix of the size, told without making one."""
    if n == 1 or (n % 2 == 0 and hadamard_exists(n // 2)):
        return True
    first = (n - 1) % 4 == 3 and is_prime(n - 1)
    return n % 4 == 0 and (first or ((n // 2 - 1) % 4 == 1 and is_prime(n // 2 - 1)))


def kronecker_sizes(n: int) -> tuple[int, int]:
    """(p1, p2) with p1 p2 = n of Hadamard matrices for both, if the product of a vector with their Kronecker product costs at
    most twice what the cheapest factors do; else the cheapest factors."""
    pairs = [(p, n // p) for p in range(1, math.isqrt(n) + 1) if n % p == 0]
    cheapest = min(pairs, key=sum)
    known = [pair for pair in pairs if all(map(hadamard_exists, pair)) and sum(pair) <= 2 * sum(cheapest)]
    return min(known, key=sum, default=cheapest)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A matrix of Haar's measure, float64 [n, n]: QR of normal numbers with the signs of R's diagonal (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator that depends on a seed and on what it is for."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
