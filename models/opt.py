"""OPT, with norms before (most sizes) or after (350M) the attention and the MLP."""

from __future__ import annotations

from typing import Any

from models.family import Groups, ModelFamily


def groups(config: Any) -> Groups:
    """The MLP's linears sit directly on the block."""
    return (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    )


FAMILY = ModelFamily(model_types=("opt",), blocks="model.decoder.layers", groups=groups)
