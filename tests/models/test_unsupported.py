"""Models in forms that are not read: one line that says what it is and what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.load import load_config, load_model
from models.names import check_name
from models.unsupported import METHODS
from quant.core.errors import InputError
from quant.export.read import open_checkpoint
from quant.run.convert import convert

FILES = {
    "model.safetensors": (b"", "is a safetensors file: give the directory that holds it"),
    "weights.pt": (b"PK", "is a file of PyTorch: give the model's directory"),
    "consolidated.00.pth": (b"PK", "is a file of PyTorch"),
    "pytorch_model.bin": (b"PK", "is a file of PyTorch"),
    "model.onnx": (b"", "is an ONNX file"),
    "tf_model.h5": (b"", "is a file of TensorFlow"),
    "flax_model.msgpack": (b"", "is a file of JAX"),
    "notes.txt": (b"", "is a file: --model takes a model directory or a hub id"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_are_named(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_name(str(tmp_path / name))
    said = "is neither a run directory .* nor a checkpoint" if "--model" in message else message
    with pytest.raises(InputError, match=said):
        convert(tmp_path / name, "gptq", tmp_path / "out", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["model.gguf", "model.Q4_K_M"])
def test_gguf_files_are_models_and_not_converted(name, tmp_path):
    """By the ending or the first bytes (tests/models/test_gguf.py reads them)."""
    (tmp_path / name).write_bytes(b"GGUF\x03")
    check_name(str(tmp_path / name))
    with pytest.raises(InputError, match="is a GGUF file: it is a model to quantize"):
        convert(tmp_path / name, "gptq", tmp_path / "out", cache_dir=tmp_path / "cache")


DIRECTORIES = {
    "gguf": (["model-q4.gguf", "model-q8.gguf"], "but GGUF files .model-q4.gguf.: give one of them"),
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "but an adapter .* merge it into its base model"),
    "meta": (["params.json", "consolidated.00.pth", "tokenizer.model"], "weights in Meta's own form .* convert them"),
    "mistral": (["params.json", "consolidated.safetensors"], "weights in Mistral's own form"),
    "diffusers": (["model_index.json"], "a pipeline of diffusers"),
    "pt": (["model.pt"], "files of PyTorch .model.pt.: save the model with save_pretrained"),
    "bin": (["weights.bin"], "name them pytorch_model.bin"),
    "tensorflow": (["tf_model.h5"], "files of TensorFlow"),
    "jax": (["flax_model.msgpack"], "files of JAX"),
    "onnx": (["model.onnx"], "ONNX files"),
    "another name": (["model.fp16.safetensors"], "safetensors under another name .model.fp16.safetensors."),
    "nothing": ([], "--model takes a model directory"),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_directories_are_named(case, model_dir, tmp_path):
    """Without a config.json, and with one but without weights that are read."""
    files, message = DIRECTORIES[case]
    model = tmp_path / "model"
    model.mkdir()
    for name in files:
        (model / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"holds no config.json.*{message}"):
        check_name(str(model))
    shutil.copy(model_dir("llama") / "config.json", model)
    with pytest.raises(InputError, match=f"holds no weights .*{message}"):
        load_model(str(model), dtype=None, cache_dir=tmp_path / "cache")


def settings(**entries):
    return {"quantization_config": entries}


QUANTIZED = {
    "awq": (settings(quant_method="awq", bits=4, group_size=128, zero_point=True, version="gemm"), "awq"),
    "bitsandbytes": (settings(quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes"),
    "fp8": (settings(quant_method="fp8", weight_block_size=[128, 128]), "fp8"),
    "mxfp4": (settings(quant_method="mxfp4"), "mxfp4"),
    "unknown": (settings(quant_method="something-new"), "something-new"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    "mlx, twice": ({"quantization": {"group_size": 64, "bits": 4}} | settings(group_size=64, bits=4), "mlx"),
    "marlin": (settings(quant_method="gptq", checkpoint_format="marlin", bits=4), "gptq .marlin."),
    "floats": (settings(quant_method="compressed-tensors", format="mxfp6-pack-quantized"), "compressed-tensors .mxfp6-pack-quantized."),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_models_are_named(case, model_dir, tmp_path):
    """To be evaluated or converted, and to be quantized, with the weights and without them (a plan)."""
    entries, message = QUANTIZED[case]
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | entries))
    known = METHODS.get(message, "")
    said = (
        f"{model}: quantized by {message}, which is not read; known: gptq, .*{known}.*: give the full-precision model"
    )
    with pytest.raises(InputError, match=said):
        load_model(str(model), dtype=None, cache_dir=tmp_path / "cache", opener=open_checkpoint)
    with pytest.raises(InputError, match=said):
        convert(model, "bitplane", tmp_path / "out")
    method = message.split(" ")[0]
    with pytest.raises(InputError, match=f"is quantized already .by {method}.*give the full-precision checkpoint"):
        load_model(str(model), dtype=None, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="is quantized already"):
        load_config(str(model), tmp_path / "cache", with_weights=False)


def test_a_stray_quantize_config_is_said(model_dir, tmp_path):
    """Beside a model in full precision: whether it is to be quantized or evaluated, it says what to remove."""
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    (model / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    with pytest.raises(
        InputError,
        match="quantized already .by gptq.; give the full-precision checkpoint, or remove quantize_config.json",
    ):
        load_model(str(model), dtype=None, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match="says gptq, but no tensor is quantized"):
        load_model(str(model), dtype=None, cache_dir=tmp_path / "cache", opener=open_checkpoint)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_numbers_that_are_no_weights_are_named(dtype, model_dir, tmp_path):
    """Every tensor of a model in a type that is not read: one line."""
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match=r"in floating-point numbers|where floating-point numbers") as error:
        load_model(str(model), dtype=None, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value)
