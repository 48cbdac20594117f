"""Causal attention by tiles, against a softmax over all keys in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from quant.blocks import causal
from quant.blocks.causal import TILE, CausalTiles


def attention64(q, k, v, scale):
    """Every row of the logits by itself."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for t in range(q.shape[-2]):
        logits = (q[:, :, t, None] @ k[:, :, : t + 1].mT) * scale
        out[:, :, t] = (logits.softmax(-1) @ v[:, :, : t + 1]).squeeze(-2)
    return out


@pytest.fixture
def tiles(monkeypatch):
    """How long the calls were that went by tiles."""
    seen, attend = [], causal.causal_attention
    monkeypatch.setattr(causal, "causal_attention", lambda q, *a: seen.append(q.shape[-2]) or attend(q, *a))
    return seen


@pytest.mark.parametrize("length", [TILE, TILE + 1, 2 * TILE, 3 * TILE - 5])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_it_is_the_softmax_over_what_is_seen(length, kv_heads, scale, tiles):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, length, 4, 16, generator=generator).transpose(1, 2)
    k, v = (torch.randn(2, kv_heads, length, n, generator=generator) for n in (16, 8))
    with torch.inference_mode(), CausalTiles():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=kv_heads < 4)
    assert tiles == ([length] if length > TILE else [])
    assert out.shape == (2, 4, length, 8)
    torch.testing.assert_close(out.double(), attention64(q, k, v, scale or 0.25), rtol=1e-5, atol=1e-5)


def test_other_calls_go_to_the_library(tiles):
    q = torch.randn(1, 2, 2 * TILE, 8)
    mask = torch.ones(2 * TILE, 2 * TILE, dtype=torch.bool).tril_()
    calls = [((q, q, q), {}), ((q, q, q), {"attn_mask": mask}), ((q, q, q, mask), {}), ((q[0], q[0], q[0]), {"is_causal": True}),
             ((q[:, :, :TILE], q, q), {"is_causal": True})]  # fmt: skip
    for args, kwargs in calls:
        with torch.inference_mode(), CausalTiles():
            out = F.scaled_dot_product_attention(*args, **kwargs)
        assert torch.equal(out, F.scaled_dot_product_attention(*args, **kwargs))
    leaf = q.clone().requires_grad_()
    with CausalTiles():
        F.scaled_dot_product_attention(leaf, q, q, is_causal=True).sum().backward()
    assert leaf.grad is not None and not tiles
