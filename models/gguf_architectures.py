"""How the architectures of GGUF files lay out the families that are known here: names of tensors, and order of their rows.
What llama.cpp's convert_hf_to_gguf.py did is undone here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.mixtures import EXPERTS
from quant.core.errors import InputError

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
NO_ARCHITECTURE = "gguf has no architecture for {} models (but for {}): use format bitplane or compressed-tensors"
Undo = Callable[[Tensor, int, int], Tensor]  # of rows [R, ...], by heads of queries and of keys


@dataclass(frozen=True)
class Architecture:
    """outside, inside: modules of the family by their names in the file, outside the blocks and in them; blocks: where these
    are. undo: what to do to the rows of a module inside. offset: what was added to the weights of norms. experts: of a
    mixture, tensors that hold a linear of every expert of a block, and the linear; they are in ``EXPERTS`` of the block."""

    blocks: str
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    undo: Mapping[str, Undo]
    offset: float = 0.0
    experts: Mapping[str, str] = field(default_factory=dict)

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

    def stacked(self, name: str) -> str | None:
        """The file's name of the tensor that holds all experts' tensors of this name; None for one that is no expert's."""
        match = re.fullmatch(rf"{re.escape(self.blocks)}\.(\d+)\.{re.escape(EXPERTS)}\.\d+\.(\w+)\.weight", name)
        found = (own for own, linear in self.experts.items() if match and match[2] == linear)
        return next((f"blk.{match[1]}.{own}.weight" for own in found if match), None)


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


STACKED = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
ALWAYS_FLOAT32 = ("ffn_gate_inp", "position_embd")  # as llama.cpp's converter keeps routers and learned positions
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
ROUTED = {"ffn_gate_inp": "mlp.gate"}
NO_MLP = ("ffn_gate", "ffn_up", "ffn_down")
LLAMA_ATTENTION = {own: module for own, module in LLAMA_INSIDE.items() if own not in NO_MLP}
NEOX_INSIDE = {
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
PAIRS: dict[str, Undo] = {
    "attn_q": lambda rows, heads, kv_heads: paired_rows(rows, heads),
    "attn_k": lambda rows, heads, kv_heads: paired_rows(rows, kv_heads),
}
ARCHITECTURES = {
    "llama": Architecture("model.layers", LLAMA_OUTSIDE, LLAMA_INSIDE | NORM_BEFORE_MLP, PAIRS),
    "qwen2": Architecture("model.layers", LLAMA_OUTSIDE, LLAMA_INSIDE | NORM_BEFORE_MLP, {}),
    "qwen3": Architecture("model.layers", LLAMA_OUTSIDE, LLAMA_INSIDE | NORM_BEFORE_MLP | HEAD_NORMS, {}),
    "gemma2": Architecture("model.layers", TIED_OUTSIDE, LLAMA_INSIDE | FOUR_NORMS, {}, offset=1.0),
    "gemma3": Architecture("model.layers", LLAMA_OUTSIDE, LLAMA_INSIDE | FOUR_NORMS | HEAD_NORMS, {}, offset=1.0),
    "phi3": Architecture(
        "model.layers",
        LLAMA_OUTSIDE,
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        }
        | NORM_BEFORE_MLP,
        {},
    ),
    "gptneox": Architecture(
        "gpt_neox.layers",
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head"},
        NEOX_INSIDE | ONE_NORM | NORM_BEFORE_MLP,
        {"attn_qkv": fused_rows},
    ),
    "gpt2": Architecture(
        "transformer.h",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        {},
    ),
    "starcoder2": Architecture(
        "model.layers",
        LLAMA_OUTSIDE,
        LLAMA_ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"} | NORM_BEFORE_MLP,
        {},
    ),
    "qwen3moe": Architecture(
        "model.layers",
        LLAMA_OUTSIDE,
        LLAMA_ATTENTION | NORM_BEFORE_MLP | HEAD_NORMS | ROUTED,
        {},
        experts=STACKED,
    ),
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


ARCHITECTURES["llama, experts"] = replace(
    ARCHITECTURES["llama"], inside=LLAMA_ATTENTION | NORM_BEFORE_MLP | ROUTED, experts=STACKED
)
OTHER_NAMES = {"gemma3": "gemma3_text", "gptneox": "gpt_neox", "qwen3moe": "qwen3_moe"}  # of config.json
MODEL_TYPES = {OTHER_NAMES.get(name, name): name for name in ARCHITECTURES if "," not in name}
MODEL_TYPES |= {"mistral": "llama", "mixtral": "llama"}
READ = ("bloom", "falcon", "gemma2", "gemma3", "llama", "qwen2", "qwen3")  # whose files are a source, too


def architecture_for(config: Any) -> tuple[str, Architecture]:
    """The name of a model's architecture, and how it is laid out. Raises InputError for one that llama.cpp does not have."""
    if config.model_type not in MODEL_TYPES:
        raise InputError(NO_ARCHITECTURE.format(config.model_type, ", ".join(sorted(MODEL_TYPES))))
    named = MODEL_TYPES[config.model_type]
    norms = getattr(config, "num_ln_in_parallel_attn", None) or 2
    if named == "falcon" and config.new_decoder_architecture and norms == 2:
        return named, ARCHITECTURES["falcon, two norms"]
    return named, ARCHITECTURES["llama, experts" if config.model_type == "mixtral" else named]
