"""Gemma 2: LLaMA's linears between pre- and post-norms, sliding-window attention in every other block."""

from __future__ import annotations

from typing import Any

from models.family import ModelFamily, Seam
from models.llama import ATTENTION_INPUTS, MLP_INPUTS, groups, heads, inner_seams


def seams(config: Any) -> tuple[Seam, ...]:
    """The post-norms write to the residual and stay as they are; the gate's GELU leaves ``up`` free."""
    return (
        Seam("norm", ("input_layernorm",), ATTENTION_INPUTS),
        Seam("norm", ("pre_feedforward_layernorm",), MLP_INPUTS),
        *inner_seams(config),
    )


def residual(config: Any) -> str:
    """What attention and MLP write passes a norm with weights first."""
    return "norms with weights stand between the attention, the MLP and the stream"


FAMILY = ModelFamily(("gemma2",), "model.layers", groups, seams, heads, norm_offset=1.0, residual=residual)
