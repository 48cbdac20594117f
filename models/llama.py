"""LLaMA and the families that kept its block: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any

from models.family import Groups, HeadLayout, ModelFamily, Outside, ResidualStream, Seam, separate_heads

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
HEAD = Outside("lm_head")
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")


def groups(config: Any) -> Groups:
    """q, k, v read the first norm; gate and up read the second."""
    return (ATTENTION_INPUTS, ("self_attn.o_proj",), MLP_INPUTS, ("mlp.down_proj",))


def inner_seams(config: Any) -> tuple[Seam, ...]:
    """Inside attention and MLP. Qwen3 norms queries and keys, so nothing can be moved between their rows."""
    inner = (
        Seam("vo", ("self_attn.v_proj",), ("self_attn.o_proj",)),
        Seam("mul", ("mlp.up_proj",), ("mlp.down_proj",)),
    )
    if config.model_type == "qwen3":
        return inner
    return (*inner, Seam("qk", ("self_attn.q_proj",), ("self_attn.k_proj",)))


def seams(config: Any) -> tuple[Seam, ...]:
    """Two norms, and what is inside."""
    return (
        Seam("norm", ("input_layernorm",), ATTENTION_INPUTS),
        Seam("norm", ("post_attention_layernorm",), MLP_INPUTS),
        *inner_seams(config),
    )


def residual(config: Any) -> ResidualStream:
    """The embedding, the attention and the MLP write it; what stands behind a norm reads it."""
    norms = tuple(seam for seam in seams(config) if seam.kind == "norm")
    readers = (*ATTENTION_INPUTS, *MLP_INPUTS, HEAD)
    writers = (Outside("model.embed_tokens"), "self_attn.o_proj", "mlp.down_proj")
    last = Seam("norm", (Outside("model.norm"),), (HEAD,))
    return ResidualStream(Seam("residual", writers, readers), (*norms, last))


def residual_at(config: Any) -> dict[str, str]:
    """Attention and MLP add to what their norms read."""
    return {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


def heads(config: Any) -> HeadLayout:
    """Separate projections, rotated halves."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return separate_heads(
        "self_attn", "o_proj", heads, getattr(config, "num_key_value_heads", None) or heads, head_dim, rope=True
    )


FAMILY = ModelFamily(
    ("llama", "mistral", "qwen2", "qwen3"),
    "model.layers",
    groups,
    seams,
    heads,
    residual=residual,
    residual_at=residual_at,
)
