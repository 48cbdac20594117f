"""BLOOM: fused query_key_value, ALiBi."""

from __future__ import annotations

from typing import Any

from models.family import Groups, ModelFamily


def groups(config: Any) -> Groups:
    """Every linear has an input of its own."""
    return (
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    )


FAMILY = ModelFamily(model_types=("bloom",), blocks="transformer.h", groups=groups)
