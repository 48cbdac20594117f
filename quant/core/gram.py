"""What calibration leaves behind for one linear layer: sums, never samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.core import ranks
from quant.core.errors import InputError
from quant.core.finite import all_finite

SAMPLE = 512  # columns of which the rank is counted
INDEPENDENT = 1e-4  # eigenvalues of the correlations above it count; the mean of all is 1, float32 leaves some at 4e-5
FAR_BELOW = 4  # ranks below the columns by this factor are believed, and no others: natural texts decay slowly
CHUNK = 4096  # tokens cast to float32 at a time, so that a batch is never copied whole
HALVES = (torch.float16, torch.bfloat16)
BLOCK = 512  # columns: the sum is symmetric, and only blocks on and below the diagonal are computed


class GramStats:
    """Sums over the calibration inputs of one layer (or of several layers that share their input).

    gram: Ĥ = X̂ X̂ᵀ, float32 [in, in], the papers' Hessian without its factor 2 and divided by nothing. X̂ [in, tokens]
    holds the inputs as the quantized model sees them, behind everything that is quantized already. cross: X X̂ᵀ,
    float32 [in, in], with the inputs X of the original model at the same tokens; residual: (R - R̂) X̂ᵀ, float32 [out, in],
    with what the residual stream that the layer adds to lacks there; None where they were not given. Where tokens have
    weights s, all of them are sums of s_t times the products at token t. total, full_total: sums of x̂ and of x, float32
    [in], where every token counts once; None where x was not given. n_tokens: tokens seen, whatever they weigh, 0 where
    that is not known.
    """

    def __init__(self, n_in: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(n_in, n_in, device=device)
        self._blocks = [slice(i, min(i + BLOCK, n_in)) for i in range(0, n_in, BLOCK)]
        self._mirrored = True
        self._rank: int | None = None
        self._weightless = 0
        self.cross: Tensor | None = None
        self.residual: Tensor | None = None
        self.total = torch.zeros(n_in, device=device)
        self.full_total: Tensor | None = None
        self.n_tokens = 0

    @classmethod
    def from_gram(cls, gram: Tensor, n_tokens: int = 0, rank: int | None = None) -> GramStats:
        """Statistics whose Gram matrix is known; it is copied. rank: of the inputs, where damping hides it."""
        stats = cls(gram.shape[0], gram.device)
        stats._sum.copy_(gram)
        stats.n_tokens, stats._rank = n_tokens, rank
        return stats

    def update(
        self, x: Tensor, full: Tensor | None = None, lacking: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add inputs x [..., in] of any floating dtype. full: those of the original model at the same tokens, of the same
        shape; they are given always or never. lacking [..., out]: R - R̂ there. weights [tokens]: s, 0 or more; 1 where not
        given. Raises ValueError otherwise."""
        if self.n_tokens and (full is None) != (self.cross is None):
            raise ValueError("inputs of the original model are given with every update, or with none")
        rows = x.reshape(-1, x.shape[-1])  # [tokens, in]
        if weights is not None and (weights.numel() != rows.shape[0] or bool((weights < 0).any())):
            raise ValueError(f"{weights.numel()} token weights for {rows.shape[0]} tokens; all must be 0 or more")
        root = (
            None if weights is None else weights.reshape(-1, 1).float().sqrt()
        )  # on both sides, so that sums stay symmetric
        for (part,) in _chunks(root, rows):
            for block in self._blocks:
                _add_product_(self._sum[block, : block.stop], part[:, block], part[:, : block.stop])
        if full is not None:
            if self.cross is None:
                self.cross = torch.zeros_like(self._sum)
            for original, part in _chunks(root, full.reshape(rows.shape), rows):
                _add_product_(self.cross, original, part)
        if lacking is not None:
            lacking = lacking.reshape(rows.shape[0], -1)
            if self.residual is None:
                self.residual = torch.zeros(lacking.shape[1], rows.shape[1], device=self._sum.device)
            for missing, part in _chunks(root, lacking, rows):
                _add_product_(self.residual, missing, part)
        self.total += rows.sum(0, dtype=torch.float32)
        if full is not None:
            total = full.reshape(rows.shape).sum(0, dtype=torch.float32)
            self.full_total = total if self.full_total is None else self.full_total + total
        self.n_tokens += rows.shape[0]
        self._weightless += 0 if weights is None else int((weights == 0).sum())
        self._mirrored, self._rank = False, None

    def add_up(self, paired: bool = False) -> GramStats:
        """Return self, with the sums over the inputs of all processes of this job. paired: whether those of the original model
        were given, which a process that saw no input does not know."""
        if ranks.size() == 1:
            return self
        if paired and self.cross is None:
            self.cross, self.full_total = torch.zeros_like(self._sum), torch.zeros_like(self.total)
        for block in self._blocks:
            ranks.all_sum_(self._sum[block, : block.stop])
        for sums in (self.cross, self.residual, self.total, self.full_total):
            if sums is not None:
                ranks.all_sum_(sums)
        counts = ranks.all_told([self.n_tokens, self._weightless])
        self.n_tokens, self._weightless = (sum(own) for own in zip(*counts, strict=True))
        self._mirrored, self._rank = False, None
        return self

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

    @property
    def importance(self) -> Tensor:
        """The same, as what weighs the error of a row: all rows have one."""
        return self.diagonal

    @property
    def rank(self) -> int:
        """Directions in which the inputs are known to vary, at most in: as many as tokens with a weight where those are fewer; fewer yet
        where most columns of a sample depend on the others (a text that repeats itself)."""
        if self._rank is None:
            n_in = self._sum.shape[0]
            self._rank = min(n_in, self.n_tokens - self._weightless or n_in, self._sampled_rank())
        return self._rank

    def _sampled_rank(self) -> int:
        """The rank of the correlations of at most SAMPLE columns, where it is far below their number; else all inputs."""
        live = self.diagonal.nonzero().squeeze(1)
        columns = live[:: max(1, -(-live.numel() // SAMPLE))]
        part = self.gram[columns][:, columns].double()
        root = part.diagonal().sqrt()
        correlations = part / root / root[:, None]
        # No part of a matrix has more large eigenvalues than the whole: half of the columns often say enough, in an eighth of the time.
        for every in (2, 1):
            count = int((torch.linalg.eigvalsh(correlations[::every, ::every]) > INDEPENDENT).sum())
            if count * FAR_BELOW >= columns.numel():
                return self._sum.shape[0]
        return count

    def check(self, name: str = "the layer") -> GramStats:
        """Return self. Raises InputError where a calibration input was not finite (it shows on the diagonal), or where a
        Gram matrix that was given is not finite or has a negative diagonal."""
        if not bool(torch.isfinite(self.diagonal).all()):
            raise InputError(
                f"{name}: calibration inputs are not finite (NaN or overflow); "
                "check the model's weights, or use --dtype float32 or bfloat16"
            )
        if not all_finite(self._sum):
            raise InputError(f"{name}: the Gram matrix is not finite off its diagonal; it is no sum of x xᵀ")
        if bool((self.diagonal < 0).any()):
            raise InputError(f"{name}: the Gram matrix has a negative diagonal; it is no sum of x xᵀ")
        return self


def shrunk(own: GramStats, weight: float, towards: GramStats, prior: int) -> GramStats:
    """Statistics of own's n tokens as if ``prior`` tokens like those of ``towards`` had been seen too: n times the mean of own,
    whose tokens weigh ``weight`` together, and prior times the mean of the others, whose tokens weigh 1. Cross terms likewise
    where both have them. Of two that saw nothing, or nothing with a weight, the other counts alone."""
    n = own.n_tokens if weight > 0 else 0
    added = prior if towards.n_tokens else 0

    def mixed(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        parts = [part * factor for part, factor in ((first, n / weight if n else 0.0), (second, added / towards.n_tokens if added else 0.0))
                 if part is not None and factor]  # fmt: skip
        return sum(parts[1:], parts[0]) if parts else None

    gram = mixed(own.gram, towards.gram)
    stats = GramStats.from_gram(torch.zeros_like(own.gram) if gram is None else gram, n + added)
    stats.cross = mixed(own.cross, towards.cross)
    return stats


def _chunks(root: Tensor | None, *inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of inputs [tokens, n] at the same tokens: float32, each token times its root [tokens, 1], or as they are where
    `_add_product_` takes them so."""
    plain = root is None and all(map(_by_tensor_cores, inputs))
    for start in range(0, inputs[0].shape[0], CHUNK):
        parts = tuple(rows[start : start + CHUNK] for rows in inputs)
        if not plain:
            parts = tuple(part.float() for part in parts)
        yield parts if root is None else tuple(part * root[start : start + CHUNK] for part in parts)


def _by_tensor_cores(rows: Tensor) -> bool:
    """Whether the device multiplies rows as they are and adds in float32: half precision on CUDA, if torch is of 2.8 or later. A
    product of two such numbers is exact in float32, so that the sums are of the same numbers as those of float32 inputs."""
    return rows.is_cuda and rows.dtype in HALVES and hasattr(torch.ops.aten.mm, "dtype")


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total float32 [n, k] += leftᵀ right for left [tokens, n] and right [tokens, k], both float32 or both as
    `_by_tensor_cores` allows."""
    if left.dtype in HALVES:
        total += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.T, right)
