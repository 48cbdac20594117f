"""`.bin` files: what they hold is converted as it is, and whatever else is in them is one line."""

import collections
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from models.container import SafetensorsReader
from models.load import load_model
from models.pickles import convert_bin, read_bin
from quant.core.errors import InputError

WEIGHT = torch.arange(6.0).view(2, 3)
DAMAGE = {
    "nested": ({"state_dict": {"a": WEIGHT}}, "'state_dict' is a dict, where a tensor has to be"),
    "list": ([WEIGHT], "holds no tensors by name, but a list"),
    "tensor": (WEIGHT, "holds no tensors by name, but a Tensor"),
    "number": (3, "holds no tensors by name, but a int"),
    "nothing": (None, "holds no tensors by name, but nothing"),
    "empty": ({}, "holds no tensors by name, but nothing"),
    "an entry": ({"a": WEIGHT, "epoch": 3}, "'epoch' is a int, where a tensor has to be"),
    "a list inside": ({"a": [WEIGHT]}, "'a' is a list"),
    "null": ({"a": None}, "'a' is nothing"),
    "integer keys": ({0: WEIGHT}, "0 is no name"),
    "tuple keys": ({("a", "b"): WEIGHT}, "is no name"),
    "surrogate": ({"\ud800": WEIGHT}, "is no name"),
    "escape": ({"a\x1b[31m": WEIGHT}, "is no name"),
    "endless name": ({"x" * 10_000: 1}, "x.* is a int"),
    "sparse": (lambda: {"a": WEIGHT.to_sparse()}, "'a' is a tensor of layout sparse_coo"),
    "compressed": (lambda: {"a": WEIGHT.to_sparse_csr()}, "'a' is a tensor of layout sparse_csr"),
    "meta": ({"a": torch.empty(2, device="meta")}, "'a' is a tensor without values"),
    "quantized": (lambda: {"a": torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)}, "'a' is a tensor of torch.qint8"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "older"])
def test_other_contents_are_one_line(case, zipped, tmp_path):
    content, message = DAMAGE[case]
    file = tmp_path / "pytorch_model.bin"
    torch.save(content() if callable(content) else content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=message) as error:
        read_bin(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value) and len(str(error.value)) < 600


BYTES = {
    "empty": lambda data: b"",
    "text": lambda data: b"not a pickle at all",
    "cut": lambda data: data[: len(data) // 2],
    "cut late": lambda data: data[:-20],
    "other archive": lambda data: b"PK\x05\x06" + bytes(18),
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "flipped": lambda data: bytes(b ^ 0xFF for b in data),
    "html": lambda data: b"<html>404</html>",
}


@pytest.mark.parametrize("case", BYTES)
@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "older"])
def test_damaged_bytes_are_one_line(case, zipped, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": WEIGHT}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(BYTES[case](file.read_bytes()))
    with pytest.raises(InputError, match=r"pytorch_model.bin is not a readable PyTorch weight file") as error:
        read_bin(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "older"])
def test_tensors_come_as_they_are(zipped, tmp_path):
    """Views, parts of one memory, tied and empty tensors, transposed ones, every dtype."""
    base = torch.arange(12.0)
    tensors = collections.OrderedDict(
        whole=base, part=base[:4], later=base[4:], tied=base, turned=base.view(3, 4).t(), nothing=torch.empty(0),
        nothing_more=torch.empty(0, 3), half=base.half(), brain=base.bfloat16(), one=torch.tensor(3.0),
        steps=torch.tensor([1, 2]), mask=torch.tensor([True, False]), parameter=torch.nn.Parameter(base * 2),
    )  # fmt: skip
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    reader = SafetensorsReader(convert_bin(source, tmp_path / "cache"))
    assert set(reader.names()) == set(tensors)
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), name


def test_a_tied_head_stored_twice_serves_an_untied_configuration(model_dir, tmp_path):
    """Both names share one memory in the file: neither is dropped."""
    source = model_dir("llama")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    old = tmp_path / "old"
    old.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, old)
    assert json.loads((old / "config.json").read_text())["tie_word_embeddings"] is False
    torch.save(tensors, old / "pytorch_model.bin")
    model = load_model(str(old), dtype=None, cache_dir=tmp_path / "cache")
    weights = model.outside_weights(torch.device("cpu"))
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
