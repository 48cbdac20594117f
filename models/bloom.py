"""BLOOM: fused query_key_value, ALiBi."""

from __future__ import annotations

from typing import Any

from models.family import Groups, HeadLayout, ModelFamily, Seam, fused_heads

QKV, DENSE, UP = "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h"


def groups(config: Any) -> Groups:
    """Every linear has an input of its own."""
    return ((QKV,), (DENSE,), (UP,), ("mlp.dense_4h_to_h",))


def seams(config: Any) -> tuple[Seam, ...]:
    """The GELU between the MLP's linears lets no scale through."""
    attention = (Seam("vo", (QKV,), (DENSE,)), Seam("qk", (QKV,), (QKV,)))
    if no_norm_seams(config):
        return attention
    return (Seam("norm", ("input_layernorm",), (QKV,)), Seam("norm", ("post_attention_layernorm",), (UP,)), *attention)


def no_norm_seams(config: Any) -> str:
    """With residuals taken behind the norm, its output has a reader that cannot take a scale back."""
    if config.apply_residual_connection_post_layernorm:
        return "apply_residual_connection_post_layernorm: the residual reads the norms' outputs"
    return ""


def residual_at(config: Any) -> dict[str, str]:
    """Attention and MLP add to what their norms read, or to what they read themselves."""
    if config.apply_residual_connection_post_layernorm:
        return {DENSE: QKV, "mlp.dense_4h_to_h": UP}
    return {DENSE: "input_layernorm", "mlp.dense_4h_to_h": "post_attention_layernorm"}


def heads(config: Any) -> HeadLayout:
    """Rows [heads, (q, k, v), head_dim]."""
    return fused_heads(QKV, DENSE, config.n_head, 1, config.hidden_size // config.n_head, rope=False)


FAMILY = ModelFamily(
    ("bloom",), "transformer.h", groups, seams, heads, no_norm_seams=no_norm_seams, residual_at=residual_at
)
