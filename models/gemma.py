"""Gemma 2 and 3, OLMo 2 and GLM-4: LLaMA's attention and MLP with norms behind them."""

from __future__ import annotations

from typing import Any

from models.family import Groups, HeadLayout, ModelFamily, Seam, rotated_rows
from models.llama import ATTENTION_INPUTS, FUSED_MLP, FUSED_UP, KEYS, MLP_INPUTS, UP, VALUES, groups, heads, sizes


def normed_seams(config: Any) -> tuple[Seam, ...]:
    """The post-norms write to the residual and stay as they are; the gate's GELU leaves ``up`` free. Gemma 3 norms queries
    and keys, so nothing can be moved between their rows."""
    return (
        Seam("norm", ("input_layernorm",), ATTENTION_INPUTS),
        Seam("norm", ("pre_feedforward_layernorm",), MLP_INPUTS),
        VALUES,
        UP,
    )


def seams(config: Any) -> tuple[Seam, ...]:
    """Those of Gemma 2, whose queries and keys have no norms."""
    return (*normed_seams(config), KEYS)


def inner_seams(config: Any) -> tuple[Seam, ...]:
    """OLMo 2 has no norms in front, and norms queries and keys."""
    return (VALUES, UP)


def no_norm_seams(config: Any) -> str:
    """What attention and MLP read is the stream itself."""
    return "they stand behind the attention and the MLP, and the stream reads them"


def glm_groups(config: Any) -> Groups:
    """Separate queries, keys and values; gate and up are one linear."""
    return (ATTENTION_INPUTS, ("self_attn.o_proj",), (FUSED_MLP,), ("mlp.down_proj",))


def glm_seams(config: Any) -> tuple[Seam, ...]:
    """The norms in front; those behind write to the residual."""
    return (
        Seam("norm", ("input_layernorm",), ATTENTION_INPUTS),
        Seam("norm", ("post_attention_layernorm",), (FUSED_MLP,)),
        VALUES,
        FUSED_UP,
        KEYS,
    )


def glm_heads(config: Any) -> HeadLayout:
    """Neighbouring rows of the first part of a head are rotated against each other."""
    return heads(config).rotating(rotated_rows(config, sizes(config)[2]), interleaved=True)


def residual(config: Any) -> str:
    """What attention and MLP write passes a norm with weights first."""
    return "norms with weights stand between the attention, the MLP and the stream"


GEMMA2 = ModelFamily(("gemma2",), "model.layers", groups, seams, heads, norm_offset=1.0, residual=residual)
GEMMA3 = ModelFamily(("gemma3_text",), "model.layers", groups, normed_seams, heads, norm_offset=1.0, residual=residual)
OLMO2 = ModelFamily(
    ("olmo2",), "model.layers", groups, inner_seams, heads, no_norm_seams=no_norm_seams, residual=residual
)
GLM4 = ModelFamily(("glm4",), "model.layers", glm_groups, glm_seams, glm_heads, residual=residual)
