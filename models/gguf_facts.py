"""What a GGUF file says of a model besides its tensors and tokenizer, from its configuration: the keys that llama.cpp's
convert_hf_to_gguf.py writes and its loader reads, and what llama.cpp would compute otherwise than the model does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from models.family import HeadLayout
from models.gguf_layout import GEMMA2_27B_BLOCKS, architecture_for, llama3_factors
from quant.core.errors import InputError

Fact = bool | int | float | str | list[int] | list[float] | list[str]
Facts = dict[str, Fact]
ACTIVATIONS = {
    "llama": "silu",
    "qwen2": "silu",
    "qwen3": "silu",
    "gemma2": "gelu_pytorch_tanh",
    "falcon": "gelu",
}  # that llama.cpp has for an architecture
FALCON_ROWS = "jploski"  # the name of the order of rows in the file


def facts_of(config: Any, layout: HeadLayout, rows: int, length: int) -> Facts:
    """Facts of a model by key, without its architecture's name. rows: of the embedding; length: the longest sequence.
    Raises InputError where llama.cpp would compute something else."""
    named, _ = architecture_for(config)
    check_config(config, layout)
    (heads, head_dim), kv_heads = layout.q[1].shape, layout.k[1].shape[0]
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window:  # which llama.cpp does not have: up to it, all is the same
        length = min(length, window)
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", None)
    facts: Facts = {
        "context_length": length,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": width or 4 * config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "vocab_size": rows,
    }
    if hasattr(config, "rms_norm_eps"):
        facts["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    else:
        facts["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
    if rope := _rope(config):
        facts |= {
            "rope.dimension_count": head_dim,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
        }
        facts["rope.freq_base"] = float(rope["rope_theta"])
        if rope.get("rope_type") == "linear":
            facts |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if named == "falcon":
        facts["tensor_data_layout"] = FALCON_ROWS
    if named == "gemma2":
        facts |= {
            "attention.sliding_window": config.sliding_window,
            "attn_logit_softcapping": float(config.attn_logit_softcapping),
            "final_logit_softcapping": float(config.final_logit_softcapping),
        }
    return {"general.type": "model"} | {f"{named}.{key}": value for key, value in facts.items()}


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

    fields = ("hidden_activation", "hidden_act", "activation")
    activation = next((value for field in fields if (value := getattr(config, field, None))), None)
    yield named in ACTIVATIONS and activation != ACTIVATIONS[named], f"the activation {activation}"
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    yield any(isinstance(value, dict) for value in rope.values()), "positions that differ by layer"
    yield rope.get("partial_rotary_factor") not in (None, 1, 1.0), "heads that are rotated in part"
    yield kind not in ("default", "linear", *(["llama3"] if named == "llama" else [])), f"positions scaled by {kind}"
    yield named in ("qwen2", "qwen3") and has("use_sliding_window"), "sliding windows (use_sliding_window)"
    yield named in ("qwen3", "gemma2") and has("attention_bias"), "attention_bias"
    if named == "falcon":
        yield has("alibi"), "ALiBi"
        yield not config.parallel_attn, "attention and MLP one after the other (parallel_attn false)"
        yield config.bias, "biases"
        yield not config.multi_query and not config.new_decoder_architecture, "one key and value for every head"
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


def _rope(config: Any) -> dict[str, Any]:
    """Rotary settings; empty where positions are not rotated."""
    return {} if config.model_type == "bloom" else dict(getattr(config, "rope_parameters", None) or {})
