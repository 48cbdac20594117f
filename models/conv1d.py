"""Linears in the place of the library's Conv1D, which computes the same from the transpose of a weight (GPT-2)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from models.stored import Layout


def plain_linears(blocks: Iterable[nn.Module], layout: Layout) -> None:
    """Put a linear, on `meta`, in the place of every module of some blocks whose weight the family's checkpoints hold
    transposed: what reads and quantizes linears knows no other kind."""
    for block in blocks:
        for weight in layout.transposed:
            name = weight.removesuffix(".weight")
            old = block.get_submodule(name)
            assert isinstance(old.weight, nn.Parameter)
            n_in, n_out = old.weight.shape
            new = nn.Linear(n_in, n_out, old.bias is not None, device="meta", dtype=old.weight.dtype)
            parent, _, own = name.rpartition(".")
            setattr(block.get_submodule(parent), own, new)
