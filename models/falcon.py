"""Falcon: 7B (multi-query, one norm), 40B and 180B (new decoder architecture, two norms), rw (ALiBi, sequential)."""

from __future__ import annotations

from typing import Any

from models.family import Groups, ModelFamily


def groups(config: Any) -> Groups:
    """With parallel attention behind a single norm, attention and MLP read the same input."""
    qkv, dense = "self_attention.query_key_value", "self_attention.dense"
    up, down = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
    two_norms = config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)
    if config.parallel_attn and not two_norms:
        return ((qkv, up), (dense,), (down,))
    return ((qkv,), (dense,), (up,), (down,))


FAMILY = ModelFamily(model_types=("falcon",), blocks="transformer.h", groups=groups)
