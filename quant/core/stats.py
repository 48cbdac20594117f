"""What calibration leaves behind for one linear layer: sums, never samples."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.core.errors import InputError

CHUNK = 4096  # tokens cast to float32 at a time, so that a batch is never copied whole


class LayerStats:
    """Sums over the calibration inputs x of one layer (or of several layers that share their input).

    gram: float32 [in, in], the sum of x xᵀ over tokens, not divided by anything. n_tokens: rows seen.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(in_features, in_features, device=device)
        self.n_tokens = 0

    def update(self, x: Tensor) -> None:
        """Add inputs x [..., in] of any floating dtype."""
        rows = x.reshape(-1, x.shape[-1])
        for part in rows.split(CHUNK):
            part = part.float()
            self.gram.addmm_(part.T, part)
        self.n_tokens += rows.shape[0]

    @property
    def diagonal(self) -> Tensor:
        """Gram diagonal [in]: how much each input column matters."""
        return self.gram.diagonal()

    def check(self, name: str = "the layer") -> LayerStats:
        """Return self. Raises InputError where a calibration input was not finite (it shows on the diagonal)."""
        if not bool(torch.isfinite(self.diagonal).all()):
            raise InputError(
                f"{name}: calibration inputs are not finite (NaN or overflow); "
                "check the model's weights, or use --dtype float32 or bfloat16"
            )
        return self

    def order(self) -> Tensor:
        """Columns by decreasing Gram diagonal (act-order), ties by position."""
        return torch.argsort(self.diagonal, descending=True, stable=True)
