"""How the architectures of GGUF files lay out the families that are known here: names of tensors, order of their rows, and
facts that transformers' own reader leaves out. What llama.cpp's convert_hf_to_gguf.py did is undone here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.core.errors import InputError
from quant.core.text import brief

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
ROTARY = "rope_freqs.weight"  # factors of the rotary frequencies of Llama 3.1 and later
LLAMA3_LENGTH = 8192  # tokens of Llama 3, from which its successors scale; low and high factor are theirs too
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
GEMMA2_27B_BLOCKS = 46  # the one Gemma 2 whose queries are not scaled by its head's size (llama.cpp: LLM_TYPE_27B)
NO_ARCHITECTURE = "gguf has no architecture for {} models (but for {}): use format bitplane or compressed-tensors"
Json = dict[str, Any]
Undo = Callable[[Tensor, int, int], Tensor]  # of rows [R, ...], by heads of queries and of keys


@dataclass(frozen=True)
class Architecture:
    """outside, inside: modules of the family by their names in the file, outside the blocks and in them; blocks: where these
    are. undo: what to do to the rows of a module inside. offset: what was added to the weights of norms."""

    blocks: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    undo: Mapping[str, Undo]
    offset: float = 0.0

    def place(self, name: str) -> tuple[str, str] | None:
        """The family's name of a tensor, and what the tensor is of; None for one that the architecture does not have."""
        stem, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        if match := BLOCK.fullmatch(stem):
            module = self.inside.get(match[2])
            return None if module is None else (f"{self.blocks}.{int(match[1])}.{module}.{kind}", match[2])
        return (f"{self.outside[stem]}.{kind}", stem) if stem in self.outside else None

    def stored(self, name: str) -> tuple[str, str] | None:
        """The file's name of a tensor of the family, and what the tensor is of; None for one that has no place in it."""
        path, _, kind = name.rpartition(".")
        for own, module in self.outside.items():
            if module == path:
                return f"{own}.{kind}", own
        if not path.startswith(f"{self.blocks}."):
            return None
        index, _, inner = path.removeprefix(f"{self.blocks}.").partition(".")
        for own, module in self.inside.items():
            if module == inner:
                return f"blk.{index}.{own}.{kind}", own
        return None


def stored_rows(rows: Tensor, undo: Undo, heads: int, kv_heads: int) -> Tensor:
    """Rows [R, ...] in the order of the file: the inverse of what reading does to them, which only moves them."""
    return rows[undo(torch.arange(rows.shape[0]), heads, kv_heads).argsort()]


def paired_rows(rows: Tensor, heads: int) -> Tensor:
    """Rotated pairs stand side by side in the file, half a head apart in transformers."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def fused_rows(rows: Tensor, heads: int, kv_heads: int) -> Tensor:
    """All queries, keys, values in the file; [kv heads, (its queries, key, value), head_dim] in BLOOM and Falcon."""
    rest, size = rows.shape[1:], rows.shape[0] // (heads + 2 * kv_heads)
    q, k, v = rows.split([heads * size, kv_heads * size, kv_heads * size])
    grouped = [part.view(kv_heads, -1, size, *rest) for part in (q, k, v)]
    return torch.cat(grouped, 1).reshape(rows.shape)


TIED_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LLAMA_OUTSIDE = TIED_OUTSIDE | {"output": "lm_head"}
LLAMA_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORM_BEFORE_MLP = {"ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FUSED_OUTSIDE = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}
FUSED_INSIDE = {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
ONE_NORM = {"attn_norm": "input_layernorm"}
PAIRS: dict[str, Undo] = {
    "attn_q": lambda rows, heads, kv_heads: paired_rows(rows, heads),
    "attn_k": lambda rows, heads, kv_heads: paired_rows(rows, kv_heads),
}
ARCHITECTURES = {
    "llama": Architecture("model.layers", LLAMA_OUTSIDE, LLAMA_INSIDE | NORM_BEFORE_MLP, PAIRS),
    "qwen2": Architecture("model.layers", LLAMA_OUTSIDE, LLAMA_INSIDE | NORM_BEFORE_MLP, {}),
    "qwen3": Architecture("model.layers", LLAMA_OUTSIDE, LLAMA_INSIDE | NORM_BEFORE_MLP | HEAD_NORMS, {}),
    "gemma2": Architecture("model.layers", TIED_OUTSIDE, LLAMA_INSIDE | FOUR_NORMS, {}, offset=1.0),
    "bloom": Architecture(
        "transformer.h",
        FUSED_OUTSIDE | {"token_embd_norm": "transformer.word_embeddings_layernorm"},
        FUSED_INSIDE | ONE_NORM | NORM_BEFORE_MLP,
        {"attn_qkv": fused_rows},
    ),
    "falcon": Architecture("transformer.h", FUSED_OUTSIDE, FUSED_INSIDE | ONE_NORM, {"attn_qkv": fused_rows}),
    "falcon, two norms": Architecture(
        "transformer.h",
        FUSED_OUTSIDE,
        FUSED_INSIDE | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
        {"attn_qkv": fused_rows},
    ),
}


MODEL_TYPES = {name: name for name in ARCHITECTURES if "," not in name} | {"mistral": "llama"}  # of config.json


def architecture_for(config: Any) -> tuple[str, Architecture]:
    """The name of a model's architecture, and how it is laid out. Raises InputError for one that llama.cpp does not have."""
    if config.model_type not in MODEL_TYPES:
        raise InputError(NO_ARCHITECTURE.format(config.model_type, ", ".join(sorted(MODEL_TYPES))))
    named = MODEL_TYPES[config.model_type]
    norms = getattr(config, "num_ln_in_parallel_attn", None) or 2
    two_norms = named == "falcon" and config.new_decoder_architecture and norms == 2
    return named, ARCHITECTURES["falcon, two norms" if two_norms else named]


def architecture_of(facts: Mapping[str, Any], tensors: Collection[str], path: Path) -> Architecture:
    """How a file is laid out. Raises InputError for an architecture that is not covered, and for a part of a file."""
    named = facts.get("general.architecture")
    known = sorted(name for name in ARCHITECTURES if "," not in name)
    if named not in known:
        raise InputError(
            f"{path}: GGUF files of architecture {brief(repr(named), 40)} are not read (but those of {', '.join(known)}); "
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
    if fact("attention.sliding_window") and named != "gemma2":
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
    return {key: value for key, value in fields.items() if value is not None}


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
