"""GPT-2: rows of queries, keys and values in one linear, learned positions; its checkpoints hold weights transposed."""

from __future__ import annotations

from typing import Any

from models.family import Groups, HeadLayout, ModelFamily, Seam, stacked_heads
from models.stored import Layout

QKV, OUTPUT, UP, DOWN = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"


def groups(config: Any) -> Groups:
    """Every linear has an input of its own."""
    return ((QKV,), (OUTPUT,), (UP,), (DOWN,))


def seams(config: Any) -> tuple[Seam, ...]:
    """The GELU between the MLP's linears lets no scale through."""
    return (
        Seam("norm", ("ln_1",), (QKV,)),
        Seam("norm", ("ln_2",), (UP,)),
        Seam("vo", (QKV,), (OUTPUT,)),
        Seam("qk", (QKV,), (QKV,)),
    )


def residual_at(config: Any) -> dict[str, str]:
    """Attention and MLP add to what their norms read."""
    return {OUTPUT: "ln_1", DOWN: "ln_2"}


def heads(config: Any) -> HeadLayout:
    """All rows of queries first, then those of keys, then those of values."""
    n = config.num_attention_heads
    return stacked_heads(QKV, OUTPUT, n, n, config.hidden_size // n, rope=False)


FAMILY = ModelFamily(
    ("gpt2",),
    "transformer.h",
    groups,
    seams,
    heads,
    residual_at=residual_at,
    layout=Layout(transposed=tuple(f"{linear}.weight" for linear in (QKV, OUTPUT, UP, DOWN))),
)
