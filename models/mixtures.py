"""Mixtures of experts: Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE on LLaMA's attention, DeepSeek-V3 on its own.

Experts are linears of their own here (`models/experts.py`). Routers and the gates of shared experts stay as they are.
"""

from __future__ import annotations

from typing import Any

from models.family import Groups, HeadLayout, ModelFamily, Seam
from models.llama import ATTENTION_INPUTS, heads
from models.stored import Layout, Stack

EXPERTS, GATES = "mlp.experts", ("mlp.gate", "mlp.shared_expert_gate")
STACKED = (
    Stack("mlp.experts.gate_up_proj", ("mlp.experts.#.gate_proj", "mlp.experts.#.up_proj")),
    Stack("mlp.experts.down_proj", ("mlp.experts.#.down_proj",)),
)
MIXTRAL = tuple(
    (f"block_sparse_moe.experts.#.{old}", f"mlp.experts.#.{new}")
    for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
)


def mlp(*prefixes: str) -> Groups:
    """The linears of MLPs that run side by side: what reads their input, then what reads their inner values."""
    inputs = tuple((f"{prefix}.gate_proj", f"{prefix}.up_proj") for prefix in prefixes)
    return (*inputs, *((f"{prefix}.down_proj",) for prefix in prefixes))


def experts(config: Any) -> tuple[str, ...]:
    """Prefixes of the experts' linears."""
    return tuple(f"{EXPERTS}.{number}" for number in range(expert_count(config)))


def expert_count(config: Any) -> int:
    """How many experts a block has."""
    return int(getattr(config, "num_experts", None) or config.num_local_experts)


def groups_at(config: Any, index: int) -> Groups:
    """Attention, then an MLP or the experts with those that all tokens share."""
    attention = (ATTENTION_INPUTS, ("self_attn.o_proj",))
    dense = index in (getattr(config, "mlp_only_layers", None) or ()) or (index + 1) % getattr(
        config, "decoder_sparse_step", 1
    )
    if dense:
        return (*attention, *mlp("mlp"))
    shared = ("mlp.shared_expert",) if config.model_type == "qwen2_moe" else ()
    return (*attention, *mlp(*shared, *experts(config)))


def latent_groups_at(config: Any, index: int) -> Groups:
    """DeepSeek's attention through latent vectors; the first blocks have an MLP."""
    queries = "q_proj" if config.q_lora_rank is None else "q_a_proj"
    inner = () if config.q_lora_rank is None else (("self_attn.q_b_proj",),)
    attention = (
        (f"self_attn.{queries}", "self_attn.kv_a_proj_with_mqa"),
        *inner,
        ("self_attn.kv_b_proj",),
        ("self_attn.o_proj",),
    )
    if index < config.first_k_dense_replace:
        return (*attention, *mlp("mlp"))
    return (*attention, *mlp("mlp.shared_experts", *experts(config)))


def latent_heads(config: Any) -> HeadLayout:
    """Keys and values are rows [heads, (key, value), size] of one linear; the rotated part of a key is all heads' own."""
    import torch

    heads, key, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    queries = torch.arange(heads * (key + config.qk_rope_head_dim)).view(heads, -1)
    rows = torch.arange(heads * (key + value)).view(heads, -1)
    linear = "self_attn.q_proj" if config.q_lora_rank is None else "self_attn.q_b_proj"
    return HeadLayout(
        (linear, queries), ("self_attn.kv_b_proj", rows[:, :key]), ("self_attn.kv_b_proj", rows[:, key:]),
        "self_attn.o_proj", rope=False,
    )  # fmt: skip


def no_seams(config: Any) -> tuple[Seam, ...]:
    """What is learned of seams would have to know of routers, which read the norms too."""
    return ()


def not_rotated(config: Any) -> str:
    """Why the stream between the blocks is left as it is."""
    return "its routers read it, and stay as they are"


def residual_at(config: Any) -> dict[str, str]:
    """The attention alone adds its linear's outputs as they are; those of experts are weighted first."""
    return {"self_attn.o_proj": "input_layernorm"}


def _family(model_types: tuple[str, ...], layout: Layout, **other: Any) -> ModelFamily:
    kinds = {"groups_at": groups_at, "heads": heads} | other
    return ModelFamily(
        model_types, "model.layers", groups=lambda config: kinds["groups_at"](config, config.num_hidden_layers - 1),
        seams=no_seams, layout=layout, experts=EXPERTS, gates=GATES, residual=not_rotated, residual_at=residual_at, **kinds,
    )  # fmt: skip


FAMILIES = (
    _family(("mixtral",), Layout((*MIXTRAL, ("block_sparse_moe", "mlp")), STACKED)),
    _family(("qwen2_moe", "qwen3_moe", "olmoe"), Layout(stacked=STACKED)),
    _family(("deepseek_v3",), Layout(stacked=STACKED), groups_at=latent_groups_at, heads=latent_heads),
)
