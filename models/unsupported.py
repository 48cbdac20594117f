"""Models in forms that are not read: what each is, and what to do. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

WHOLE = "give the full-precision model that it was made from"
DIRECTORY = "--model takes a model directory or a hub id"
# Endings of a file that somebody gives instead of a directory: what it is, and what to do
FILES = {
    ".gguf": ("a GGUF file", "it is a model to quantize (--model); no codes in it are converted"),
    ".safetensors": ("a safetensors file", "give the directory that holds it with its config.json"),
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"),
                    ("a file of PyTorch", "give the model's directory, with config.json and pytorch_model.bin")),
    ".h5": ("a file of TensorFlow", "give the model's safetensors in their directory"),
    ".onnx": ("an ONNX file", "give the model's safetensors in their directory"),
    ".msgpack": ("a file of JAX", "give the model's safetensors in their directory"),
}  # fmt: skip
# Files of a directory that is no model in the form that is read, the most telling first
DIRECTORIES = (
    ("adapter_config.json", "an adapter", "merge it into its base model first (merge_and_unload of peft)"),
    ("model_index.json", "a pipeline of diffusers", "give a causal language model"),
    ("modules.json", "a sentence encoder", "give a causal language model"),
    ("*.gguf", "GGUF files", "give one of them, and it has to be the whole model"),
    ("consolidated*.pth", "weights in Meta's own form", "convert them first (convert_llama_weights_to_hf.py of transformers)"),
    ("consolidated*.safetensors", "weights in Mistral's own form", "give the model in the form of Hugging Face"),
    ("adapter_model.*", "an adapter", "merge it into its base model first (merge_and_unload of peft)"),
    ("*.pt", "files of PyTorch", "save the model with save_pretrained of transformers"),
    ("*.pth", "files of PyTorch", "save the model with save_pretrained of transformers"),
    ("*.ckpt", "files of PyTorch", "save the model with save_pretrained of transformers"),
    ("*.bin", "files of PyTorch", "name them pytorch_model.bin, or save the model with save_pretrained"),
    ("*.h5", "files of TensorFlow", "give the model's safetensors"),
    ("*.msgpack", "files of JAX", "give the model's safetensors"),
    ("*.onnx", "ONNX files", "give the model's safetensors"),
    ("*.safetensors", "safetensors under another name", "name the file model.safetensors, or give its index"),
)  # fmt: skip
# model_type of config.json: what keeps such models from being read, and what to do
UNREAD = {
    "gpt_oss": "their experts are 4-bit floats (MXFP4) with gates and values interleaved; quantize another mixture of experts",
}
# quant_method of config.json, where the name does not tell what it is
METHODS = {
    "awq": "AutoAWQ's activation-aware codes",
    "bitsandbytes": "NF4 or LLM.int8",
    "fp8": "8-bit floating point",
    "fbgemm_fp8": "8-bit floating point",
    "modelopt": "NVIDIA's 8- or 4-bit floating point",
    "mxfp4": "4-bit floating point",
    "mlx": "codes of Apple's MLX",
    "exl2": "codes of ExLlamaV2",
    "exl3": "codes of ExLlamaV3",
}


def of_file(path: Path) -> str:
    """What a file is that is no model directory, and what to do."""
    what, advice = FILES.get(".gguf" if is_gguf(path) else path.suffix.lower(), ("a file", DIRECTORY))
    return f"{path} is {what}: {advice}"


def is_gguf(path: Path) -> bool:
    """Whether a file says that it is GGUF, by its ending or its first bytes; a pipe or a device is not opened."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def of_directory(path: Path, lacks: str) -> str:
    """Why a directory without ``lacks`` (config.json, or weights) is no model that is read, and what to do."""
    for pattern, what, advice in DIRECTORIES:
        if file := min(path.glob(pattern), default=None):
            return f"{path} holds no {lacks}, but {what} ({file.name}): {advice}"
    return f"{path} holds no {lacks}: {DIRECTORY}"


def is_mlx(declared: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that MLX quantized: it says so in an entry of its own."""
    quantization, usual = declared.get("quantization"), declared.get("quantization_config")
    own = isinstance(quantization, Mapping) and {"group_size", "bits"} <= quantization.keys()
    return own and not (isinstance(usual, Mapping) and "quant_method" in usual)
