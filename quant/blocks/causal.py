"""Causal attention on a CPU by tiles of queries, each against the keys that it sees: the library's kernel multiplies all of
them and masks half away."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

TILE = 128  # queries


class CausalTiles(TorchFunctionMode):
    """For the length of a `with`, `scaled_dot_product_attention` with is_causal goes by tiles where that is less work: on a CPU,
    for more than one tile of queries and as many keys, without gradients. The numbers are the library's but for their last bits."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Everything else passes."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and _by_tiles(*args, kwargs):
            return causal_attention(*args, kwargs.get("scale"), kwargs.get("enable_gqa", False))
        return func(*args, **kwargs)


def _by_tiles(q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> bool:
    """Whether a call masks what is ahead and nothing else, and is worth tiles."""
    return (
        bool(given.get("is_causal"))
        and given.get("attn_mask") is None
        and not given.get("dropout_p")
        and q.device.type == "cpu"
        and not torch.is_grad_enabled()
        and q.dim() == 4
        and TILE < q.shape[-2] == k.shape[-2]
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """Attention [batch, heads, T, width] of queries to the keys up to their own place. k, v: [batch, heads, T, width], of fewer
    heads with enable_gqa."""
    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # as the library's kernel lays it out
    for start in range(0, length, TILE):
        end = min(start + TILE, length)
        seen = torch.ones(end - start, end, dtype=torch.bool).tril_(start)
        out[:, :, start:end] = F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, :end], v[:, :, :end], attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
    return out
