"""Falcon: 7B (multi-query, one norm), 40B and 180B (new decoder architecture, two norms), rw (ALiBi, sequential)."""

from __future__ import annotations

from typing import Any

from models.family import Groups, HeadLayout, ModelFamily, Seam, fused_heads

QKV, DENSE, UP, DOWN = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


def two_norms(config: Any) -> bool:
    """Whether attention and MLP run side by side behind a norm each."""
    return config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)


def groups(config: Any) -> Groups:
    """With parallel attention behind a single norm, attention and MLP read the same input."""
    if config.parallel_attn and not two_norms(config):
        return ((QKV, UP), (DENSE,), (DOWN,))
    return ((QKV,), (DENSE,), (UP,), (DOWN,))


def seams(config: Any) -> tuple[Seam, ...]:
    """The GELU between the MLP's linears lets no scale through."""
    norms: tuple[Seam, ...]
    if two_norms(config):
        norms = (Seam("norm", ("ln_attn",), (QKV,)), Seam("norm", ("ln_mlp",), (UP,)))
    elif config.parallel_attn:
        norms = (Seam("norm", ("input_layernorm",), (QKV, UP)),)
    else:
        norms = (Seam("norm", ("input_layernorm",), (QKV,)), Seam("norm", ("post_attention_layernorm",), (UP,)))
    return (*norms, Seam("vo", (QKV,), (DENSE,)), Seam("qk", (QKV,), (QKV,)))


def residual_at(config: Any) -> dict[str, str]:
    """Attention and MLP add to what their norms read; side by side they add to the same."""
    first = "ln_attn" if two_norms(config) else "input_layernorm"
    second = "ln_mlp" if two_norms(config) else first if config.parallel_attn else "post_attention_layernorm"
    return {DENSE: first, DOWN: second}


def heads(config: Any) -> HeadLayout:
    """One group of query heads for each head of keys and values."""
    kv_heads = config.num_attention_heads
    if config.new_decoder_architecture:
        kv_heads = config.num_kv_heads
    elif config.multi_query:
        kv_heads = 1
    head_dim = config.hidden_size // config.num_attention_heads
    return fused_heads(QKV, DENSE, kv_heads, config.num_attention_heads // kv_heads, head_dim, rope=not config.alibi)


def no_eager(config: Any) -> str:
    """transformers 5.23 puts ALiBi into the mask and then adds it once more under eager attention."""
    return "its eager attention adds ALiBi twice" if config.alibi else ""


FAMILY = ModelFamily(
    ("falcon",),
    "transformer.h",
    groups,
    seams,
    heads,
    no_eager=no_eager,
    biases={"bias": True},
    residual_at=residual_at,
)
