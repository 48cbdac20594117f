"""What reading a GGUF file takes beside the names of its tensors: which architecture it has, and facts that transformers' own
reader leaves out."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.gguf_architectures import ARCHITECTURES, READ, Architecture
from quant.core.errors import InputError
from quant.core.text import brief

ROTARY = "rope_freqs.weight"  # factors of the rotary frequencies of Llama 3.1 and later
LLAMA3_LENGTH = 8192  # tokens of Llama 3, from which its successors scale; low and high factor are theirs too
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
GEMMA2_27B_BLOCKS = 46  # the one Gemma 2 whose queries are not scaled by its head's size (llama.cpp: LLM_TYPE_27B)
GEMMA3_27B_BLOCKS = 62  # and the one Gemma 3
GEMMA3_TURN, GEMMA3_LOCAL_BASE = 6, 10_000.0  # every sixth layer sees all; the base of rotary frequencies of the others
Json = dict[str, Any]


def architecture_of(facts: Mapping[str, Any], tensors: Collection[str], path: Path) -> Architecture:
    """How a file is laid out. Raises InputError for an architecture that is not covered, and for a part of a file."""
    named = facts.get("general.architecture")
    if named not in READ:
        raise InputError(
            f"{path}: GGUF files of architecture {brief(repr(named), 40)} are not read (but those of {', '.join(READ)}); "
            "give the model as safetensors"
        )
    if parts := facts.get("split.count", 0):
        raise InputError(f"{path} is one of {parts} parts: put them together first (llama-gguf-split --merge)")
    if experts := facts.get(f"{named}.expert_count", 0):
        raise InputError(f"{path} is a mixture of {experts} experts, which is not read; give a dense model")
    two_norms = named == "falcon" and "blk.0.attn_norm_2.weight" in tensors
    return ARCHITECTURES["falcon, two norms" if two_norms else named]


def heads_of(facts: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Heads of queries, and of keys and values. Raises InputError where they are no numbers, or differ by block."""
    named = facts["general.architecture"]
    heads = facts.get(f"{named}.attention.head_count")
    kv_heads = facts.get(f"{named}.attention.head_count_kv", heads)
    for key, count in (("head_count", heads), ("head_count_kv", kv_heads)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise InputError(
                f"{path}: {named}.attention.{key} is {brief(repr(count), 40)}, where a number of heads belongs"
            )
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    if heads % kv_heads:
        raise InputError(f"{path}: {heads} heads of queries cannot share {kv_heads} heads of keys and values")
    return heads, kv_heads


def corrections(facts: Mapping[str, Any], tensors: Collection[str], path: Path) -> Json:
    """Fields of config.json that transformers' reader of GGUF files leaves at their defaults. Raises InputError for what
    would change the numbers and cannot be said in config.json."""
    named = str(facts["general.architecture"])

    def fact(key: str) -> Any:
        return facts.get(f"{named}.{key}")

    heads, kv_heads = heads_of(facts, path)
    fields: Json = {}
    if fact("attention.sliding_window") and named not in ("gemma2", "gemma3"):
        raise InputError(f"{path}: {named} with attention.sliding_window is not read; give the model as safetensors")
    if named in ("llama", "qwen3") and fact("attention.key_length"):
        fields["head_dim"] = fact("attention.key_length")
    if named == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if named == "falcon":
        fields |= {
            "num_kv_heads": kv_heads,
            "multi_query": kv_heads == 1,
            "new_decoder_architecture": kv_heads > 1,
            "num_ln_in_parallel_attn": 2 if "blk.0.attn_norm_2.weight" in tensors else None if kv_heads == 1 else 1,
            "parallel_attn": True,
            "bias": "blk.0.attn_qkv.bias" in tensors,
            "ffn_hidden_size": fact("feed_forward_length"),
            "layer_norm_epsilon": fact("attention.layer_norm_epsilon"),
        }
    if named == "gemma2":
        scaled = facts.get("gemma2.block_count") == GEMMA2_27B_BLOCKS
        width = fact("embedding_length")
        fields |= {
            "attn_logit_softcapping": fact("attn_logit_softcapping"),
            "final_logit_softcapping": fact("final_logit_softcapping"),
            "query_pre_attn_scalar": width // heads
            if scaled and isinstance(width, int)
            else fact("attention.key_length"),
        }
    if named == "gemma3":
        fields |= _gemma3(facts, heads, path)
    return {key: value for key, value in fields.items() if value is not None}


def _gemma3(facts: Mapping[str, Any], heads: int, path: Path) -> Json:
    """What llama.cpp knows of Gemma 3 by itself. Raises InputError where the file says otherwise."""
    count, width = facts.get("gemma3.block_count"), facts.get("gemma3.embedding_length")
    if not isinstance(count, int) or not isinstance(width, int):
        raise InputError(f"{path}: gemma3.block_count and gemma3.embedding_length are no numbers; download it again")
    base = float(facts.get("gemma3.rope.freq_base") or GEMMA3_LOCAL_BASE)
    local = float(facts.get("gemma3.rope.freq_base_swa") or GEMMA3_LOCAL_BASE)
    turns = {"full_attention": base, "sliding_attention": local}
    return {
        "query_pre_attn_scalar": width // heads
        if count == GEMMA3_27B_BLOCKS
        else facts.get("gemma3.attention.key_length"),
        "layer_types": gemma3_layers(count),
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in turns.items()},
        "final_logit_softcapping": facts.get("gemma3.final_logit_softcapping"),
    }


def gemma3_layers(count: int) -> list[str]:
    """What the layers of Gemma 3 see."""
    return ["sliding_attention" if (i + 1) % GEMMA3_TURN else "full_attention" for i in range(count)]


def rotary_scaling(facts: Mapping[str, Any], factors: Tensor | None, path: Path) -> Json:
    """How positions are scaled, as entries of ``rope_parameters``. Raises InputError where it is none of the ways that are known.

    factors: of the rotary frequencies, float32 [head_dim / 2], where the file has them.
    """
    named = facts["general.architecture"]
    kind = facts.get(f"{named}.rope.scaling.type")
    factor = facts.get(f"{named}.rope.scaling.factor") or facts.get(f"{named}.rope.scale_linear")
    if factors is not None:
        return _llama3(factors, float(facts.get(f"{named}.rope.freq_base") or 10_000.0), path)
    if kind in (None, "none") and factor in (None, 0, 1):
        return {}
    if kind in (None, "linear") and isinstance(factor, float | int):
        return {"rope_type": "linear", "factor": float(factor)}
    raise InputError(f"{path}: positions scaled by {brief(repr(kind), 40)} are not read; give the model as safetensors")


def scaled(parameters: Json, scaling: Json) -> Json:
    """``rope_parameters`` with a scaling: where they differ by layer, of the layers that see all."""
    if "full_attention" in parameters:
        return parameters | {"full_attention": parameters["full_attention"] | scaling}
    return parameters | scaling


def llama3_factors(
    base: float,
    count: int,
    factor: float,
    length: float = LLAMA3_LENGTH,
    low: float = LLAMA3_LOW,
    high: float = LLAMA3_HIGH,
) -> Tensor:
    """By what the frequency of each of ``count`` rotated pairs is divided (float64), in the successors of Llama 3
    (transformers, modeling_rope_utils.py, _compute_llama3_parameters)."""
    wavelength = 2 * math.pi * base ** (torch.arange(count, dtype=torch.float64) / count)
    smooth = (length / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    scaled = torch.where(wavelength > length / low, factor, between)
    return torch.where(wavelength < length / high, 1.0, scaled)


def _llama3(factors: Tensor, base: float, path: Path) -> Json:
    largest = float(factors.max())
    if not torch.allclose(factors.double(), llama3_factors(base, len(factors), largest), rtol=1e-4, atol=0.0):
        raise InputError(
            f"{path}: {ROTARY} holds factors that are not those of Llama 3.1; give the model as safetensors"
        )
    return {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": LLAMA3_LOW,
        "high_freq_factor": LLAMA3_HIGH,
        "original_max_position_embeddings": LLAMA3_LENGTH,
    }
