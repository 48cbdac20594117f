"""LLaMA and the families that kept its block: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from typing import Any

from models.family import Groups, ModelFamily


def groups(config: Any) -> Groups:
    """q, k, v read the first norm; gate and up read the second."""
    return (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )


FAMILY = ModelFamily(model_types=("llama", "mistral", "qwen2", "qwen3"), blocks="model.layers", groups=groups)
