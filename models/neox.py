"""LayerNorm and rotary embeddings: GPT-NeoX (Pythia), StarCoder 2, StableLM and Cohere 2."""

from __future__ import annotations

from typing import Any

from models import llama
from models.family import Groups, HeadLayout, ModelFamily, Seam, fused_heads, rotated_rows
from models.llama import ATTENTION_INPUTS, KEYS, MLP_INPUTS, UP, VALUES
from models.stored import Layout

QKV, DENSE, NEOX_UP, NEOX_DOWN = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
OUTPUT, DOWN = "self_attn.o_proj", "mlp.down_proj"


def neox_groups(config: Any) -> Groups:
    """Every linear has an input of its own: side by side, attention and MLP have a norm each."""
    return ((QKV,), (DENSE,), (NEOX_UP,), (NEOX_DOWN,))


def neox_seams(config: Any) -> tuple[Seam, ...]:
    """The GELU between the MLP's linears lets no scale through."""
    return (
        Seam("norm", ("input_layernorm",), (QKV,)),
        Seam("norm", ("post_attention_layernorm",), (NEOX_UP,)),
        Seam("vo", (QKV,), (DENSE,)),
        Seam("qk", (QKV,), (QKV,)),
    )


def neox_heads(config: Any) -> HeadLayout:
    """Rows [heads, (q, k, v), head_dim], of which a part is rotated."""
    head_dim = config.hidden_size // config.num_attention_heads
    layout = fused_heads(QKV, DENSE, config.num_attention_heads, 1, head_dim, rope=True)
    return layout.rotating(rotated_rows(config, head_dim))


def neox_residual_at(config: Any) -> dict[str, str]:
    """Attention and MLP add to what their norms read; side by side they add to the same."""
    return {DENSE: "input_layernorm", NEOX_DOWN: "post_attention_layernorm"}


def starcoder_groups(config: Any) -> Groups:
    """An MLP without a gate."""
    return (ATTENTION_INPUTS, (OUTPUT,), ("mlp.c_fc",), ("mlp.c_proj",))


def starcoder_seams(config: Any) -> tuple[Seam, ...]:
    """The GELU between the MLP's linears lets no scale through."""
    return (
        Seam("norm", ("input_layernorm",), ATTENTION_INPUTS),
        Seam("norm", ("post_attention_layernorm",), ("mlp.c_fc",)),
        VALUES,
        KEYS,
    )


def starcoder_residual_at(config: Any) -> dict[str, str]:
    """Attention and MLP add to what their norms read."""
    return {OUTPUT: "input_layernorm", "mlp.c_proj": "post_attention_layernorm"}


def parallel_groups(config: Any) -> Groups:
    """Attention and MLP read one norm."""
    return ((*ATTENTION_INPUTS, *MLP_INPUTS), (OUTPUT,), (DOWN,))


def parallel_seams(config: Any) -> tuple[Seam, ...]:
    """One norm, and what is inside. Cohere 2's global layers, without rotary embeddings, have the seams of the others."""
    return (Seam("norm", ("input_layernorm",), (*ATTENTION_INPUTS, *MLP_INPUTS)), VALUES, UP, KEYS)


def parallel_residual_at(config: Any) -> dict[str, str]:
    """Side by side they add to what the norm reads."""
    return {OUTPUT: "input_layernorm", DOWN: "input_layernorm"}


def stable_groups(config: Any) -> Groups:
    """LLaMA's, or side by side."""
    return parallel_groups(config) if config.use_parallel_residual else llama.groups(config)


def stable_seams(config: Any) -> tuple[Seam, ...]:
    """Norms of queries and keys (StableLM 2 12B) leave nothing to be moved between their rows."""
    seams = parallel_seams(config) if config.use_parallel_residual else llama.seams(config)
    return tuple(seam for seam in seams if seam.kind != "qk" or not config.qk_layernorm)


def stable_residual_at(config: Any) -> dict[str, str]:
    """LLaMA's, or side by side."""
    return parallel_residual_at(config) if config.use_parallel_residual else llama.residual_at(config)


def stable_heads(config: Any) -> HeadLayout:
    """A part of a head is rotated."""
    return llama.heads(config).rotating(rotated_rows(config, llama.sizes(config)[2]))


def cohere_heads(config: Any) -> HeadLayout:
    """Neighbouring rows are rotated against each other."""
    return llama.heads(config).rotating(llama.sizes(config)[2], interleaved=True)


NEOX = ModelFamily(
    ("gpt_neox",),
    "gpt_neox.layers",
    neox_groups,
    neox_seams,
    neox_heads,
    biases={"attention_bias": True},
    residual_at=neox_residual_at,
    layout=Layout(renamed=(("embed_out", "lm_head"),)),
)
STARCODER2 = ModelFamily(
    ("starcoder2",),
    "model.layers",
    starcoder_groups,
    starcoder_seams,
    llama.heads,
    biases={"use_bias": True},
    residual_at=starcoder_residual_at,
)
STABLELM = ModelFamily(
    ("stablelm",),
    "model.layers",
    stable_groups,
    stable_seams,
    stable_heads,
    biases={"use_qkv_bias": True},
    residual_at=stable_residual_at,
)
COHERE2 = ModelFamily(
    ("cohere2",), "model.layers", parallel_groups, parallel_seams, cohere_heads, residual_at=parallel_residual_at
)
