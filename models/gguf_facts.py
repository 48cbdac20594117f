"""What a GGUF file says of a model besides its tensors and tokenizer, from its configuration: the keys that llama.cpp's
convert_hf_to_gguf.py writes and its loader reads, and what llama.cpp would compute otherwise than the model does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from models.family import HeadLayout
from models.gguf_architectures import architecture_for
from models.gguf_layout import (
    GEMMA2_27B_BLOCKS,
    GEMMA3_27B_BLOCKS,
    GEMMA3_LOCAL_BASE,
    gemma3_layers,
    llama3_factors,
)
from models.mixtures import expert_count
from quant.core.errors import InputError

Fact = bool | int | float | str | list[int] | list[float] | list[str]
Facts = dict[str, Fact]
ACTIVATIONS = {
    "llama": "silu",
    "qwen2": "silu",
    "qwen3": "silu",
    "gemma2": "gelu_pytorch_tanh",
    "gemma3": "gelu_pytorch_tanh",
    "falcon": "gelu",
    "phi3": "silu",
    "gptneox": "gelu",
    "gpt2": "gelu_new",
    "starcoder2": "gelu_pytorch_tanh",
    "qwen3moe": "silu",
}  # that llama.cpp has for an architecture
WITHOUT_WINDOWS = ("mistral", "phi3", "starcoder2")  # in llama.cpp
FALCON_ROWS = "jploski"  # the name of the order of rows in the file


def facts_of(config: Any, layout: HeadLayout, rows: int, length: int) -> Facts:
    """Facts of a model by key, without its architecture's name. rows: of the embedding; length: the longest sequence.
    Raises InputError where llama.cpp would compute something else."""
    named, _ = architecture_for(config)
    check_config(config, layout)
    (heads, head_dim), kv_heads = layout.q[1].shape, layout.k[1].shape[0]
    window = getattr(config, "sliding_window", None)
    if config.model_type in WITHOUT_WINDOWS and window:  # which llama.cpp does not have: up to it, all is the same
        length = min(length, window)
    fields = ("intermediate_size", "ffn_hidden_size", "n_inner")
    width = next((value for field in fields if (value := getattr(config, field, None))), None)
    facts: Facts = {
        "context_length": length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": width or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "vocab_size": rows,
    }
    facts |= _norms(config) | _rotated(config, head_dim) | _of_architecture(config, named)
    return {"general.type": "model"} | {f"{named}.{key}": value for key, value in facts.items()}


def _norms(config: Any) -> Facts:
    """What is added to a variance."""
    if hasattr(config, "rms_norm_eps"):
        return {"attention.layer_norm_rms_epsilon": float(config.rms_norm_eps)}
    fields = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
    return {
        "attention.layer_norm_epsilon": float(
            next(getattr(config, field) for field in fields if hasattr(config, field))
        )
    }


def _rotated(config: Any, head_dim: int) -> Facts:
    """How heads are rotated, of models in which they are."""
    rope = _rope(config)
    if not rope:
        return {}
    facts: Facts = {
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope.get("rope_type") == "linear":
        facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return facts


def _of_architecture(config: Any, named: str) -> Facts:
    """What one architecture alone has."""
    if named == "falcon":
        return {"tensor_data_layout": FALCON_ROWS}
    if named == "gptneox":
        return {"use_parallel_residual": bool(config.use_parallel_residual)}
    if config.model_type in ("qwen3_moe", "mixtral"):
        counts: Facts = {
            "expert_count": expert_count(config),
            "expert_used_count": config.num_experts_per_tok,
        }
        return counts | ({"expert_feed_forward_length": config.moe_intermediate_size} if named == "qwen3moe" else {})
    facts: Facts = {}
    if named in ("gemma2", "gemma3"):
        facts["attention.sliding_window"] = config.sliding_window
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        facts |= {cap: float(value) for cap in caps if (value := getattr(config, cap, None))}
    if named == "phi3":
        facts |= {"rope.scaling.original_context_length": config.max_position_embeddings, "attention.sliding_window": 0}
    return facts


def rotary_factors(config: Any, layout: HeadLayout) -> Tensor | None:
    """By what rotary frequencies are divided, float32 [head_dim / 2], where a file holds them as a tensor; else None."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    scaled = (rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"])
    return llama3_factors(rope["rope_theta"], layout.q[1].shape[1] // 2, rope["factor"], *scaled).float()


def check_config(config: Any, layout: HeadLayout) -> None:
    """Raise InputError where llama.cpp has no such model, or would compute it otherwise."""
    named, _ = architecture_for(config)
    for differs, what in _differences(config, named, layout):
        if differs:
            raise InputError(
                f"gguf: llama.cpp computes no {config.model_type} model with {what}: use format bitplane or "
                "compressed-tensors"
            )


def _differences(config: Any, named: str, layout: HeadLayout) -> Iterator[tuple[bool, str]]:
    """Whether a model is otherwise than llama.cpp takes it to be, and what it has."""

    def has(field: str) -> bool:
        return bool(getattr(config, field, None))

    fields = ("hidden_activation", "hidden_act", "activation", "activation_function")
    activation = next((value for field in fields if (value := getattr(config, field, None))), None)
    yield named in ACTIVATIONS and activation != ACTIVATIONS[named], f"the activation {activation}"
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    yield any(isinstance(value, dict) for value in rope.values()), "positions that differ by layer"
    if named not in ("phi3", "gptneox"):
        yield rope.get("partial_rotary_factor") not in (None, 1, 1.0), "heads that are rotated in part"
    yield kind not in ("default", "linear", *(["llama3"] if named == "llama" else [])), f"positions scaled by {kind}"
    yield named in ("qwen2", "qwen3", "qwen3moe") and has("use_sliding_window"), "sliding windows (use_sliding_window)"
    yield named in ("qwen3", "qwen3moe", "gemma2", "gemma3") and has("attention_bias"), "attention_bias"
    if named == "falcon":
        yield has("alibi"), "ALiBi"
        yield not config.parallel_attn, "attention and MLP one after the other (parallel_attn false)"
        yield config.bias, "biases"
        yield not config.multi_query and not config.new_decoder_architecture, "one key and value for every head"
    if config.model_type in ("qwen3_moe", "mixtral"):
        yield has("mlp_only_layers") or getattr(config, "decoder_sparse_step", 1) != 1, "blocks without experts"
        yield (
            named == "qwen3moe" and not config.norm_topk_prob,
            "weights of experts as the router gives them (norm_topk_prob)",
        )
    if named == "gpt2":
        yield not config.scale_attn_weights or has("scale_attn_by_inverse_layer_idx"), "other scales of the attention"
        yield has("add_cross_attention"), "cross attention"
    if named == "starcoder2":
        yield not config.use_bias, "no biases"
    if named == "gptneox":
        yield not config.attention_bias, "no biases of the attention"
    if named == "gemma3":
        yield from _gemma3(config, layout)
    yield named == "bloom" and has("apply_residual_connection_post_layernorm"), "residuals from behind the norms"
    if named == "gemma2":
        head_dim = layout.q[1].shape[1]
        if config.num_hidden_layers == GEMMA2_27B_BLOCKS:
            head_dim = config.hidden_size // config.num_attention_heads
        scalar = config.query_pre_attn_scalar
        yield scalar != head_dim, f"queries divided by the root of {scalar} (query_pre_attn_scalar)"
        turns = ["full_attention" if index % 2 else "sliding_attention" for index in range(config.num_hidden_layers)]
        yield list(config.layer_types) != turns, "other layers than every second with a sliding window"
        yield not (has("attn_logit_softcapping") and has("final_logit_softcapping")), "uncapped logits"


def _gemma3(config: Any, layout: HeadLayout) -> Iterator[tuple[bool, str]]:
    """Gemma 3, of which llama.cpp knows some by itself."""
    head_dim = layout.q[1].shape[1]
    if config.num_hidden_layers == GEMMA3_27B_BLOCKS:
        head_dim = config.hidden_size // config.num_attention_heads
    scalar, local = config.query_pre_attn_scalar, config.rope_parameters.get("sliding_attention") or {}
    yield scalar != head_dim, f"queries divided by the root of {scalar} (query_pre_attn_scalar)"
    yield list(config.layer_types) != gemma3_layers(config.num_hidden_layers), "other than every sixth layer seeing all"
    plain = (local.get("rope_type", "default"), local.get("rope_theta")) == ("default", GEMMA3_LOCAL_BASE)
    yield not plain, f"other rotary frequencies of local layers than base {GEMMA3_LOCAL_BASE:g} gives"
    yield bool(config.attn_logit_softcapping), "capped attention"
    yield bool(getattr(config, "use_bidirectional_attention", False)), "attention in both directions"


def _rope(config: Any) -> dict[str, Any]:
    """Rotary settings, where they differ by layer those of layers that see all; empty where positions are not rotated."""
    if config.model_type in ("bloom", "gpt2"):
        return {}
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    return parameters.get("full_attention", parameters) if config.model_type == "gemma3_text" else parameters
