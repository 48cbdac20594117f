"""What a config.json says, before anything is built of it: fields that contradict each other, sizes that cannot be, codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.container import CONFIG, GPTQ_CONFIG
from models.unsupported import METHODS
from quant.core.errors import InputError
from quant.core.files import read_json
from quant.core.text import brief

SIZES = (
    "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim",
    "intermediate_size", "ffn_dim", "ffn_hidden_size", "word_embed_proj_dim",
)  # fmt: skip
NEEDED = SIZES[:3]
MOST_BLOCKS, LARGEST_SIZE = 2000, 1 << 24  # where no checkpoint says it: ten times what any published model has
LONGEST_WINDOW = 1 << 31


def check_declared(declared: Mapping[str, Any], where: Path) -> None:
    """Raise InputError for fields of config.json that libraries stumble over, or that contradict each other: rotary settings
    in the forms of transformers 4 and 5, of which readers take one or the other."""
    for key in ("dtype", "torch_dtype"):
        name = declared.get(key)
        if isinstance(name, str) and not isinstance(getattr(torch, name, None), torch.dtype):
            raise InputError(f"{where}: {key} is {brief(repr(name), 40)}, where a name such as bfloat16 belongs")
    if not isinstance(declared.get("quantization_config") or {}, dict):
        raise InputError(f"{where}: quantization_config is no JSON object")
    newer, scaling = declared.get("rope_parameters"), declared.get("rope_scaling")
    if not isinstance(newer, dict):
        return
    older = {key: declared.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    if isinstance(scaling, dict):
        older |= scaling | {"rope_type": scaling.get("rope_type", scaling.get("type"))}
    for key, value in older.items():
        if None not in (value, newer.get(key)) and value != newer[key]:
            raise InputError(
                f"{where} gives {key} twice, {brief(repr(newer[key]), 40)} in rope_parameters and "
                f"{brief(repr(value), 40)} in the form of transformers 4: remove what is wrong"
            )


def check_sizes(config: Any, where: Path, most_blocks: int, largest: int) -> None:
    """Raise InputError for sizes that no such model has, before anything is built in them.

    where: config.json. most_blocks: in the checkpoint. largest: dimension of any of its tensors.
    """
    blocks = config.num_hidden_layers
    if not is_count(blocks, most_blocks):
        raise InputError(f"{where} asks for {brief(repr(blocks), 40)} blocks, where 1 to {most_blocks} can be")
    for name in SIZES:
        value = getattr(config, name, None)
        if (name in NEEDED or value is not None) and not is_count(value, largest):
            raise InputError(f"{where}: {name} is {brief(repr(value), 40)}, where 1 to {largest} can be")
    window = getattr(config, "sliding_window", None)
    unused = window == 0 and getattr(config, "use_sliding_window", True) is False  # as Qwen2-MoE writes it
    if window is not None and not unused and not is_count(window, LONGEST_WINDOW):
        raise InputError(f"{where}: sliding_window is {brief(repr(window), 40)}, where null or 1 and more can be")


def is_count(value: object, most: int) -> bool:
    """Whether a value is a number of things, from 1 to ``most``."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def quantized_by(path: Path, declared: Mapping[str, Any]) -> str:
    """By what a model is quantized, as far as it is known, and what to do."""
    quantization = declared["quantization_config"]
    method = str(quantization.get("quant_method", "")) if isinstance(quantization, dict) else ""
    alone = "quantization_config" not in read_json(path / CONFIG) and (path / GPTQ_CONFIG).exists()
    known = f", {METHODS[method]}" if method in METHODS else ""
    by = f" (by {method}{known})" if method else ""
    return f"{by}; give the full-precision checkpoint" + (f", or remove {GPTQ_CONFIG} if this is it" if alone else "")
