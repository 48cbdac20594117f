"""The factor of the damped Gram matrix, and the layer objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from quant.core.errors import RunError
from quant.core.scaling import exponent_outside

DAMPING_STEP = 10.0
MAX_DAMPING = 1.0
STRIP = 1 << 22  # entries of an error matrix that are multiplied at a time, but at least ROWS rows
ROWS = 512
PARTS, NARROWEST = 8, 128  # blocks of columns of a Gram matrix, and columns that a block has at least


Energy = Callable[[Tensor], float]  # ‖E X‖² of a matrix E [out, in]


class SingularGramError(RunError):
    """The damped Gram matrix is not positive definite."""


def upper_factor(gram: Tensor, percdamp: float) -> tuple[Tensor, bool]:
    """Upper V with gram + percdamp · mean(diagonal) · I = V Vᵀ, and whether it exists; of a stack of them of every one.

    A Cholesky factorization from the last column to the first. Dead columns (zero diagonal) are decoupled with a 1;
    the mean is over all columns, as in GPTQ's released code. Holds two matrices of the size of gram besides it.
    """
    matrix = gram.flip(-2, -1)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    diagonal.add_(percdamp * diagonal.mean(-1, keepdim=True))
    diagonal[dead] = 1.0
    lower, info = torch.linalg.cholesky_ex(matrix)
    del matrix, diagonal
    finite = torch.isfinite(lower.diagonal(dim1=-2, dim2=-1)).all()
    return lower.flip(-2, -1), not bool(info.any()) and bool(finite)


def damped_factor(gram: Tensor, percdamp: float, auto_damp: bool = False) -> tuple[Tensor, float]:
    """V of the damped Gram matrix, see `upper_factor`, and the damping that was used; of a stack the largest.

    Raises SingularGramError, naming the damping that would work, unless ``auto_damp`` allows to use it.
    """
    upper, ok = upper_factor(gram, percdamp)
    if ok:
        return upper, percdamp
    if gram.dim() == 3:  # one of them wants more, and the others do not
        factors, used = zip(*(damped_factor(one, percdamp, auto_damp) for one in gram), strict=True)
        return torch.stack(factors), max(used)
    trial = max(percdamp, 1e-3)
    while trial < MAX_DAMPING and not ok:
        trial = min(trial * DAMPING_STEP, MAX_DAMPING)
        upper, ok = upper_factor(gram, trial)
    if not ok:
        raise SingularGramError(
            f"the Gram matrix is singular even with percdamp={MAX_DAMPING:g}: the calibration inputs are degenerate"
        )
    if not auto_damp:
        raise SingularGramError(
            f"the Gram matrix is singular at percdamp={percdamp:g}: use --percdamp {trial:g}, more calibration "
            "samples, or --auto-damp"
        )
    return upper, trial


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Float32 matrix products in that precision, for the length of the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def objective(error: Tensor, gram: Tensor) -> float:
    """tr(E Σ Eᵀ) = ‖E X‖² for error [out, in] and a symmetric gram [in, in], of which the upper triangle is read; products in
    the tensors' dtype, in full precision whatever a solver's own products have, the sum in float64.

    By strips of rows: the products and their float64 copies would be the largest tensors of a whole run. By blocks of
    columns: E_a Σ_ab E_bᵀ and E_b Σ_ba E_aᵀ have one trace, so that half of the blocks are multiplied.
    """
    n_in = error.shape[1]
    width = max(NARROWEST, -(-n_in // PARTS))
    sums = []
    with products_in("highest"):
        for rows in error.split(max(ROWS, STRIP // n_in)):
            for start in range(0, n_in, width):
                block = slice(start, start + width)
                product = rows[:, block] @ gram[block, block]
                product.addmm_(rows[:, :start], gram[:start, block], alpha=2)
                sums.append(product.double().mul_(rows[:, block]).sum())
    total = float(torch.stack(sums).sum())
    return max(total, 0.0)  # in this order, in which a total that is not a number stays one


def output_energy(error: Tensor, inputs: Tensor) -> float:
    """`objective` from the inputs [tokens, in] themselves: ‖E X‖² for error [out, in]."""
    with products_in("highest"):
        return float(torch.stack([(inputs @ rows.T).double().square_().sum() for rows in error.split(ROWS)]).sum())


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """‖(W-Ŵ)X‖² / ‖WX‖²; 0 where both vanish, inf where only the output does. For weights of any magnitude."""
    return relative_to(weight, partial(objective, gram=gram))(approximation)


def relative_to(weight: Tensor, energy: Energy) -> Callable[[Tensor], float]:
    """What gives the `relative_error` of an approximation; what it is relative to is computed once, here."""
    factor = 2.0 ** -exponent_outside(weight)
    scaled = weight if factor == 1 else weight * factor
    norm = energy(scaled)

    def error(approximation: Tensor) -> float:
        return share(energy(scaled - (approximation if factor == 1 else approximation * factor)), norm)

    return error


def share(part: float, whole: float) -> float:
    """part / whole; 0 where both vanish, inf where only the whole does."""
    return part / whole if whole > 0 else (0.0 if part == 0 else float("inf"))


def largest_eigenvalue(gram: Tensor, steps: int = 60) -> float:
    """Largest eigenvalue of a positive semidefinite matrix, from below, by power iteration.

    The start is random, of a fixed seed: one made of the matrix can be orthogonal to the eigenvector that is wanted.
    """
    vector = torch.randn(gram.shape[0], generator=torch.Generator().manual_seed(0)).to(gram)
    value = 0.0
    for _ in range(steps):
        vector = vector / vector.norm().clamp_min(torch.finfo(vector.dtype).tiny)
        product = gram @ vector
        value = float(vector @ product)
        vector = product
    return value
