"""Products that a block computes beside its linears, on what they read and on the heads of its attention.

    x' = vec(P1ᵀ mat(x) P2)        mat(x) [p1, p2], row by row; the readers hold W (P1 ⊗ P2)⁻ᵀ

(FlatQuant, arXiv 2410.09426, equation 3.) A token costs 2 n (p1 + p2) flops for n = p1 p2 inputs in place of the 2 n² of a
dense matrix. Queries become q P and keys k P⁻ᵀ behind rotary embeddings, so that their product stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AND = "+"  # between the names of linears that read one tensor: what belongs to their input stands under all of them


def kronecker(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """x (left ⊗ right) of x [..., p1 * p2], left [p1, p1], right [p2, p2]; the one that is missing is the identity.

    Three dimensions on the way, so that nobody takes a product for one of attention.
    """
    n_right = right.shape[0] if right is not None else x.shape[-1] // _size(left)
    rows = x.reshape(-1, x.shape[-1] // n_right, n_right)
    if right is not None:
        rows = rows @ right
    if left is not None:
        rows = left.mT @ rows
    return rows.reshape(x.shape)


def _size(matrix: Tensor | None) -> int:
    assert matrix is not None
    return matrix.shape[0]


def flops_of(n_in: int, left: Tensor | None, right: Tensor | None) -> int:
    """Flops a token of `kronecker` on n_in inputs."""
    return 2 * n_in * sum(matrix.shape[0] for matrix in (left, right) if matrix is not None)


class SharedProduct:
    """Hook of linears that read one tensor: the first computes `kronecker` of it, the others get the same."""

    def __init__(self, left: Tensor | None, right: Tensor | None) -> None:
        self.left, self.right = left, right
        self.seen: Tensor | None = None
        self.product: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple) -> tuple[Tensor]:
        """The product in the input's place."""
        if self.seen is not args[0]:
            self.seen, self.product = args[0], kronecker(args[0], self.left, self.right)
        assert self.product is not None
        return (self.product,)


@dataclass(frozen=True)
class HeadForm:
    """What happens to the heads [..., d] of one attention before they are quantized. query, key: [d, d], P and P⁻ᵀ. clips:
    [3, 2], factors of the lowest and highest entry of a token's queries, keys and values."""

    query: Tensor | None = None
    key: Tensor | None = None
    clips: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor | None, clips: Tensor | None) -> HeadForm:
        """With the keys' matrix, inverted in float64; gradients pass. It is not finite where P is singular."""
        if matrix is None:
            return cls(clips=clips)
        inverse = torch.linalg.inv_ex(matrix.double()).inverse  # `inv` would wait for the device
        return cls(matrix, inverse.mT.to(matrix.dtype), clips)

    def clip(self, which: int) -> Tensor | None:
        """[2], of queries (0), keys (1) or values (2)."""
        return None if self.clips is None else self.clips[which]


class RunningAttention:
    """Hooks of attention modules that tell whose heads are multiplied now."""

    def __init__(self) -> None:
        self.form = HeadForm()

    def hooks(self, form: HeadForm) -> tuple[Callable[..., None], Callable[..., None]]:
        """Those in front of a module and behind it."""

        def enter(module: nn.Module, args: tuple) -> None:
            self.form = form

        def leave(module: nn.Module, args: tuple, output: object) -> None:
            self.form = HeadForm()

        return enter, leave
