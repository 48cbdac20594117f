"""What calibration leaves behind for one linear layer: sums, never samples."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.errors import InputError

CHUNK = 4096  # tokens cast to float32 at a time, so that a batch is never copied whole
BLOCK = 512  # columns: the sum is symmetric, and only blocks on and below the diagonal are computed


class GramStats:
    """Sums over the calibration inputs of one layer (or of several layers that share their input).

    gram: Ĥ = X̂ X̂ᵀ, float32 [in, in], the papers' Hessian without its factor 2 and divided by nothing. X̂ [in, tokens]
    holds the inputs as the quantized model sees them, behind everything that is quantized already; sums against the
    inputs X of the original model (X X̂ᵀ) are not kept. n_tokens: tokens seen.
    """

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(n_in, n_in, device=device)
        self._blocks = [slice(i, min(i + BLOCK, n_in)) for i in range(0, n_in, BLOCK)]
        self._mirrored = True
        self.n_tokens = 0

    @classmethod
    def from_gram(cls, gram: Tensor, n_tokens: int = 0) -> GramStats:
        """Statistics whose Gram matrix is known; it is copied."""
        stats = cls(gram.shape[0], gram.device)
        stats._sum.copy_(gram)
        stats.n_tokens = n_tokens
        return stats

    def update(self, x: Tensor) -> None:
        """Add inputs x [..., in] of any floating dtype."""
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        for part in rows.split(CHUNK):
            part = part.float()
            for block in self._blocks:
                self._sum[block, : block.stop].addmm_(part[:, block].T, part[:, : block.stop])
        self.n_tokens += rows.shape[0]
        self._mirrored = False

    @property
    def gram(self) -> Tensor:
        """The sum of x xᵀ, float32 [in, in]."""
        if not self._mirrored:
            for block in self._blocks:
                self._sum[: block.start, block] = self._sum[block, : block.start].T
            self._mirrored = True
        return self._sum

    @property
    def diagonal(self) -> Tensor:
        """Gram diagonal [in]: how much each input column matters."""
        return self._sum.diagonal()

    def check(self, name: str = "the layer") -> GramStats:
        """Return self. Raises InputError where a calibration input was not finite (it shows on the diagonal), or where a
        Gram matrix that was given is not finite or has a negative diagonal."""
        if not bool(torch.isfinite(self.diagonal).all()):
            raise InputError(
                f"{name}: calibration inputs are not finite (NaN or overflow); "
                "check the model's weights, or use --dtype float32 or bfloat16"
            )
        # In strips: a mask of the whole matrix is a quarter of its size, and the factorization has no room for it.
        if not bool(torch.stack([torch.isfinite(self._sum[block]).all() for block in self._blocks]).all()):
            raise InputError(f"{name}: the Gram matrix is not finite off its diagonal; it is no sum of x xᵀ")
        if bool((self.diagonal < 0).any()):
            raise InputError(f"{name}: the Gram matrix has a negative diagonal; it is no sum of x xᵀ")
        return self

    def order(self) -> Tensor:
        """Columns by decreasing Gram diagonal (act-order), ties by position."""
        return torch.argsort(self.diagonal, descending=True, stable=True)
