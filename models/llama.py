"""LLaMA and the families that kept its block: Mistral, Ministral, Qwen2, SmolLM3, Granite; Qwen3 with norms of queries and
keys; Phi-3 with fused rows."""

from __future__ import annotations

from typing import Any

from models.family import (
    Groups,
    HeadLayout,
    ModelFamily,
    Outside,
    ResidualStream,
    Seam,
    rotated_rows,
    separate_heads,
    stacked_heads,
)

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
HEAD = Outside("lm_head")
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
FUSED_QKV, FUSED_MLP = "self_attn.qkv_proj", "mlp.gate_up_proj"
VALUES = Seam("vo", ("self_attn.v_proj",), ("self_attn.o_proj",))
KEYS = Seam("qk", ("self_attn.q_proj",), ("self_attn.k_proj",))
UP = Seam("mul", ("mlp.up_proj",), ("mlp.down_proj",))
FUSED_UP = Seam("mul", (FUSED_MLP,), ("mlp.down_proj",), second_half=True)


def groups(config: Any) -> Groups:
    """q, k, v read the first norm; gate and up read the second."""
    return (ATTENTION_INPUTS, ("self_attn.o_proj",), MLP_INPUTS, ("mlp.down_proj",))


def fused_groups(config: Any) -> Groups:
    """Every linear has an input of its own."""
    return ((FUSED_QKV,), ("self_attn.o_proj",), (FUSED_MLP,), ("mlp.down_proj",))


def normed_seams(config: Any) -> tuple[Seam, ...]:
    """Two norms, and what is inside of attention and MLP but queries and keys: norms of their own hold those."""
    return (
        Seam("norm", ("input_layernorm",), ATTENTION_INPUTS),
        Seam("norm", ("post_attention_layernorm",), MLP_INPUTS),
        VALUES,
        UP,
    )


def seams(config: Any) -> tuple[Seam, ...]:
    """Two norms, and what is inside. Layers without rotary embeddings (SmolLM3) have the seams of those with them."""
    return (*normed_seams(config), KEYS)


def fused_seams(config: Any) -> tuple[Seam, ...]:
    """Two norms, and rows of the fused linears."""
    return (
        Seam("norm", ("input_layernorm",), (FUSED_QKV,)),
        Seam("norm", ("post_attention_layernorm",), (FUSED_MLP,)),
        Seam("vo", (FUSED_QKV,), ("self_attn.o_proj",)),
        FUSED_UP,
        Seam("qk", (FUSED_QKV,), (FUSED_QKV,)),
    )


def stream_between(norms: tuple[Seam, ...]) -> ResidualStream:
    """The embedding, the attention and the MLP write it; what stands behind a norm reads it. Factors of all that is written
    (Granite's) are the same for every channel, and so for a rotated stream."""
    readers = tuple(reader for seam in norms for reader in seam.consumers)
    writers = (Outside("model.embed_tokens"), "self_attn.o_proj", "mlp.down_proj")
    last = Seam("norm", (Outside("model.norm"),), (HEAD,))
    return ResidualStream(Seam("residual", writers, (*readers, HEAD)), (*norms, last))


def residual(config: Any) -> ResidualStream:
    """The stream between separate linears."""
    return stream_between(normed_seams(config)[:2])


def fused_residual(config: Any) -> ResidualStream:
    """The stream between fused linears."""
    return stream_between(fused_seams(config)[:2])


def residual_at(config: Any) -> dict[str, str]:
    """Attention and MLP add to what their norms read, where no factor comes between."""
    if getattr(config, "residual_multiplier", 1.0) != 1.0:
        return {}
    return {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


def sizes(config: Any) -> tuple[int, int, int]:
    """Heads of queries, heads of keys and values, and the size of one."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def heads(config: Any) -> HeadLayout:
    """Separate projections, rotated halves."""
    return separate_heads("self_attn", "o_proj", *sizes(config), rope=True)


def stacked(config: Any) -> HeadLayout:
    """Rows of queries, keys and values one behind the other; a part of a head is rotated."""
    layout = stacked_heads(FUSED_QKV, "self_attn.o_proj", *sizes(config), rope=True)
    return layout.rotating(rotated_rows(config, sizes(config)[2]))


FAMILY = ModelFamily(
    ("llama", "mistral", "ministral", "ministral3", "qwen2", "smollm3", "granite"),
    "model.layers",
    groups,
    seams,
    heads,
    residual=residual,
    residual_at=residual_at,
)
QWEN3 = ModelFamily(("qwen3",), "model.layers", groups, normed_seams, heads, residual=residual, residual_at=residual_at)
PHI3 = ModelFamily(
    ("phi3",), "model.layers", fused_groups, fused_seams, stacked, residual=fused_residual, residual_at=residual_at
)
