"""Small GGUF files of transformers' models, as llama.cpp's convert_hf_to_gguf.py writes them, and the models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from models.gguf_architectures import MODEL_TYPES, READ
from models.load import LazyModel
from tests.conftest import CONFIGS, MIXTURES, VOCABULARY

ROTATED_IN_PAIRS = ("llama", "mistral", "mixtral")


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """`permute` of the converter."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def split(rows: torch.Tensor, kv_heads: int, heads: int) -> torch.Tensor:
    """`transform` of the converter for BLOOM and Falcon: one group after the other, sorted into q, k, v."""
    size = rows.shape[0] // (heads + 2 * kv_heads)
    each, parts = heads // kv_heads + 2, ([], [], [])
    for group in range(kv_heads):
        for row in range(each):
            start = (group * each + row) * size
            parts[0 if row < each - 2 else row - each + 3].append(rows[start : start + size])
    return torch.cat([row for part in parts for row in part])


def as_stored(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor as the converter changes it, by its name in transformers."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "gpt_neox" and ".query_key_value." in name:  # `modify_tensors` of the converter
        parts = tensor.reshape(heads, 3, -1, *tensor.shape[1:])
        return torch.cat([parts[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)])
    if config.model_type in ROTATED_IN_PAIRS and ".q_proj." in name:
        return permuted(tensor, heads)
    if config.model_type in ROTATED_IN_PAIRS and ".k_proj." in name:
        return permuted(tensor, kv_heads)
    if config.model_type in ("gemma2", "gemma3_text") and name.endswith("norm.weight"):
        return tensor + 1
    if ".query_key_value." in name:
        if config.model_type == "falcon":
            kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
        return split(tensor, kv_heads, heads)
    return tensor


def add_facts(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        kv_heads = config.num_kv_heads if config.new_decoder_architecture else 1
    writer.add_context_length(getattr(config, "max_position_embeddings", 64))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    if "rope_theta" in parameters:
        writer.add_rope_freq_base(parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None)
    if head_dim and config.model_type != "bloom":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(head_dim)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """A token for every byte, one merge, and names for the rest."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "th", "<|endoftext|>", *(f"<unused{i}>" for i in range(size - len(letters) - 2))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] + [5] * (size - 258))
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(10)


def write_gguf(
    model: Any,
    path: Path,
    type_of: Callable[[str, torch.Tensor], Type] = lambda name, tensor: Type.F32,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> dict[str, tuple[str, Type, np.ndarray]]:
    """Write a model. type_of: of a tensor, by its name in the file; matrices alone are asked for. more: further entries.
    Returns name in the file, type and stored bytes by name in transformers."""
    config = model.config
    named = MODEL_TYPES[config.model_type]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == named)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, named)
    add_facts(writer, config)
    add_tokenizer(writer, config.vocab_size)
    more(writer)
    written = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        base, _, kind = name.rpartition(".")
        stored = names.get_name(base) or names.get_name(base.removeprefix("transformer."))
        assert stored, name
        own = f"{stored}.{kind}"
        values = np.ascontiguousarray(as_stored(name, tensor.float(), config).numpy())
        type_ = type_of(own, tensor) if tensor.dim() > 1 else Type.F32
        data = gguf.quantize(values, type_) if type_ in CAN else blocks(values.shape, type_)
        writer.add_tensor(own, data, raw_dtype=None if type_ in (Type.F32, Type.F16) else type_)
        written[name] = (own, type_, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


CAN = (Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0)  # that the package also writes


def blocks(shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """Random codes of a type that the package only reads, with scales (float16) that are small: uint8 [..., bytes]."""
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // per_block
    data = np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)
    scales = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}[kind]
    for start in scales:
        data[:, start : start + 2] = np.full((count, 1), 2.0**-12, np.float16).view(np.uint8)
    return data.reshape(*shape[:-1], -1)


# llama.cpp writes ALiBi in another form than "falcon rw" has, and computes no attention without biases in GPT-NeoX
NAMES = [name for name, (kind, _) in CONFIGS.items() if MODEL_TYPES.get(kind) in READ and name != "falcon rw"]
WRITTEN = ["phi3", "gpt neox", "gpt2", "starcoder2", "mixtral", "qwen3_moe"]  # architectures whose files are no source
AS_LLAMA_CPP = {  # what llama.cpp takes such models to be
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "num_hidden_layers": 6},
    "qwen3_moe": {"norm_topk_prob": True},
}


def built(name: str) -> Any:
    """A random model of the tests' configurations, as llama.cpp takes it to be."""
    kind, options = (CONFIGS | MIXTURES)[name]
    return made(kind, **options | AS_LLAMA_CPP.get(name, {}))


def made(model_type: str, **options: Any) -> Any:
    """A random model with norms that differ from ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.3))
    return model


def module_of(lazy: LazyModel) -> Any:
    """The model of a loader, with all its weights in memory."""
    cpu = torch.device("cpu")
    weights = lazy.outside_weights(cpu)
    for index in range(len(lazy.blocks)):
        prefix = f"{lazy.family.blocks}.{index}."
        weights |= {prefix + name: tensor for name, tensor in lazy.block_weights(index, cpu).items()}
    module = AutoModelForCausalLM.from_config(lazy.config).eval()
    missing = module.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if lazy.config.tie_word_embeddings else set()
    assert set(missing.missing_keys) <= tied
    return module


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    computed: torch.Tensor = module(ids).logits
    return computed
