"""OPT, with norms before (most sizes) or after (350M) the attention and the MLP."""

from __future__ import annotations

from typing import Any

from models.family import Groups, HeadLayout, ModelFamily, Seam, separate_heads

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def groups(config: Any) -> Groups:
    """The MLP's linears sit directly on the block."""
    return (ATTENTION_INPUTS, ("self_attn.out_proj",), ("fc1",), ("fc2",))


def seams(config: Any) -> tuple[Seam, ...]:
    """ReLU lets positive scales through."""
    after_attention: tuple[Seam, ...] = (
        Seam("vo", ("self_attn.v_proj",), ("self_attn.out_proj",)),
        Seam("qk", ("self_attn.q_proj",), ("self_attn.k_proj",)),
    )
    if not no_norm_seams(config):
        norms = (
            Seam("norm", ("self_attn_layer_norm",), ATTENTION_INPUTS),
            Seam("norm", ("final_layer_norm",), ("fc1",)),
        )
        after_attention = (*norms, *after_attention)
    return (
        (*after_attention, Seam("mul", ("fc1",), ("fc2",))) if config.activation_function == "relu" else after_attention
    )


def no_norm_seams(config: Any) -> str:
    """Behind a post-norm the residual reads the norm's output too, and cannot take a scale back."""
    if not config.do_layer_norm_before:
        return "do_layer_norm_before is false: the residual reads the norms' outputs"
    return "" if config.layer_norm_elementwise_affine else "the norms have no weights (layer_norm_elementwise_affine)"


def residual_at(config: Any) -> dict[str, str]:
    """Attention and MLP add to what their norms read; behind post-norms, to what they read themselves."""
    if config.do_layer_norm_before:
        return {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"}
    return {"self_attn.out_proj": "self_attn.q_proj", "fc2": "fc1"}


def heads(config: Any) -> HeadLayout:
    """Separate projections, learned positions."""
    n = config.num_attention_heads
    return separate_heads("self_attn", "out_proj", n, n, config.hidden_size // n, rope=False)


FAMILY = ModelFamily(
    ("opt",),
    "model.decoder.layers",
    groups,
    seams,
    heads,
    no_norm_seams=no_norm_seams,
    biases={"enable_bias": True},
    residual_at=residual_at,
)
