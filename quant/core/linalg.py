"""The factor of the damped Gram matrix, and the layer objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    """tr(E Σ Eᵀ) = ‖E X‖² for error [out, in]; products in the tensors' dtype, in full precision whatever a solver's own
    products have, the sum in float64.

    By strips of rows: the products and their float64 copies would be the largest tensors of a whole run.
    """
    strips = error.split(max(ROWS, STRIP // error.shape[1]))
    with products_in("highest"):
        total = float(torch.stack([(rows @ gram).double().mul_(rows).sum() for rows in strips]).sum())
    return max(total, 0.0)  # in this order, in which a total that is not a number stays one


def output_energy(error: Tensor, inputs: Tensor) -> float:
    """`objective` from the inputs [tokens, in] themselves: ‖E X‖² for error [out, in]."""
    with products_in("highest"):
        return float(torch.stack([(inputs @ rows.T).double().square_().sum() for rows in error.split(ROWS)]).sum())


def relative_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """‖(W-Ŵ)X‖² / ‖WX‖²; 0 where both vanish, inf where only the output does. For weights of any magnitude."""
    return relative_errors(weight, [approximation], partial(objective, gram=gram))[0]


def relative_errors(weight: Tensor, approximations: Iterable[Tensor], energy: Callable[[Tensor], float]) -> list[float]:
    """`relative_error` of each. energy: ‖E X‖² of a matrix E [out, in]; of the weight itself it is computed once."""
    factor = 2.0 ** -exponent_outside(weight)
    weight = weight if factor == 1 else weight * factor
    norm, errors = energy(weight), []
    for approximation in approximations:
        error = energy(weight - (approximation if factor == 1 else approximation * factor))
        errors.append(error / norm if norm > 0 else (0.0 if error == 0 else float("inf")))
    return errors


def output_errors(
    weight: Tensor,
    approximations: Iterable[Tensor],
    inputs: Tensor,
    full: Tensor | None = None,
    measured: Callable[[Callable[[Tensor], float]], Callable[[Tensor], float]] = lambda energy: energy,
) -> list[float]:
    """‖WX - ŴX̂‖² / ‖WX‖² of each Ŵ at inputs X̂ [tokens, in]. full: X, where it is not the same; 0 where both vanish.
    measured: how ‖E X‖² of a matrix E is found by what measures it of any rows."""
    if full is None:
        return relative_errors(weight, approximations, measured(partial(output_energy, inputs=inputs)))
    factor = 2.0 ** -exponent_outside(weight)
    both = torch.cat([full, inputs], 1)  # WX - ŴX̂ = [W, -Ŵ] of X above X̂
    norm, errors = measured(partial(output_energy, inputs=full))(weight * factor), []
    energy = measured(partial(output_energy, inputs=both))
    for approximation in approximations:
        error = energy(torch.cat([weight, -approximation], 1) * factor)
        errors.append(error / norm if norm > 0 else (0.0 if error == 0 else float("inf")))
    return errors


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
