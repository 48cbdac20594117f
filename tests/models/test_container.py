"""The directory of safetensors behind the protocols of reader and writer, and damage in it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.container import INDEX, SINGLE, Reader, SafetensorsReader, SafetensorsWriter, Writer, metadata_of
from models.load import load_model
from quant.core.errors import InputError

TENSORS = {f"layer.{i}.weight": torch.full((4, 8), float(i), dtype=torch.float16) for i in range(5)}
TENSORS["steps"] = torch.tensor(7)


@pytest.mark.parametrize("shard_bytes", [1, 150, 10_000])
def test_what_a_writer_is_given_a_reader_gives(shard_bytes, tmp_path):
    """Values, shapes and dtypes, in one file or in shards that are no larger than asked for, where tensors allow it."""
    writer: Writer = SafetensorsWriter(tmp_path, shard_bytes)
    for name, tensor in TENSORS.items():
        writer.put(name, tensor)
    said = {"model_type": "x", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    writer.finish(said)
    reader: Reader = SafetensorsReader(tmp_path)
    assert set(reader.names()) == set(TENSORS) and "layer.9.weight" not in reader and "steps" in reader
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.read(name), tensor) and reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype_of(name) == tensor.dtype == reader.read(name).dtype
    assert reader.metadata() == said and json.loads((tmp_path / "quantize_config.json").read_text())["bits"] == 4
    count = {1: 6, 150: 3, 10_000: 1}[shard_bytes]
    assert len(reader.files) == count == len(list(tmp_path.glob("*.safetensors")))
    assert (tmp_path / INDEX).exists() == (count > 1) and (tmp_path / SINGLE).exists() == (count == 1)
    if count > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        for file in reader.files:
            inside = load_file(file)
            assert set(inside) == {name for name, where in index["weight_map"].items() if where == file.name}
            assert len(inside) == 1 or sum(t.nbytes for t in inside.values()) <= shard_bytes


DEEP = "[" * 100_000
SURROGATE = '{"weight_map": {"a": "\\ud800.safetensors"}}'
INDICES = {
    "list": ('{"weight_map": []}', "has no weight_map"),
    "string": ('{"weight_map": "x"}', "has no weight_map"),
    "null": ('{"weight_map": null}', "has no weight_map"),
    "number": ('{"weight_map": 1}', "has no weight_map"),
    "missing": ("{}", "has no weight_map"),
    "empty": ('{"weight_map": {}}', "has no weight_map"),
    "a list": ("[]", "holds no JSON object"),
    "numbers": ('{"weight_map": {"a": 1}}', "'a' is said to be in 1, which is not the name of a file"),
    "nested": ('{"weight_map": {"a": {"b": "c"}}}', "which is not the name of a file"),
    "nulls": ('{"weight_map": {"a": null}}', "is said to be in None, which is not the name of a file"),
    "outside": ('{"weight_map": {"a": "../x.safetensors"}}', "which is not the name of a file"),
    "absolute": ('{"weight_map": {"a": "/x.safetensors"}}', "which is not the name of a file"),
    "surrogate": (SURROGATE, "which is not the name of a file"),
    "endless": (json.dumps({"weight_map": {"a": "x" * 5000}}), "which is not the name of a file"),
    "not UTF-8": (b'{"weight_map": {"a": "\xff\xfe"}}', "is truncated or not JSON"),
    "deep": (DEEP, "is truncated or not JSON"),
    "cut": ('{"weight_map": {"a', "is truncated or not JSON"),
    "not there": ('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}', "shard .*model-00001-of-00001.safetensors is missing"),
    "of other tensors": ('{"weight_map": {"a": "elsewhere.safetensors"}}', "hidden_size is 32, where 1 to 8 can be"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("case", INDICES)
def test_damaged_indices_are_one_line(case, kind, model_dir, tmp_path):
    content, message = INDICES[case]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((model_dir("llama") / "config.json").read_bytes())
    save_file(TENSORS, model / "elsewhere.safetensors")
    name = INDEX if kind == "safetensors" else "pytorch_model.bin.index.json"
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        load_model(str(model), dtype=None, cache_dir=tmp_path / "cache")
    assert "\n" not in str(error.value) and "model" in str(error.value) and len(str(error.value)) < 6000


@pytest.mark.parametrize(
    "name", [SINGLE, "model-00001-of-00002.safetensors", "config.json", INDEX, "pytorch_model.bin"]
)
def test_pipes_are_not_opened(name, model_dir, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((model_dir("llama") / "config.json").read_bytes())
    if name.startswith("model-"):
        (model / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(InputError, match=f"{name} is a pipe|holds no config.json"):
        load_model(str(model), dtype=None, cache_dir=tmp_path / "cache")


def test_settings_beside_config_json_are_its_own(tmp_path):
    """quantize_config.json alone, and MLX's entry; config.json's own entry counts where both are there."""
    config, alone = tmp_path / "config.json", tmp_path / "quantize_config.json"
    config.write_text('{"model_type": "llama"}')
    assert metadata_of(tmp_path) == {"model_type": "llama"}
    alone.write_text('{"bits": 4, "group_size": 128}')
    assert metadata_of(tmp_path)["quantization_config"] == {"quant_method": "gptq", "bits": 4, "group_size": 128}
    config.write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert metadata_of(tmp_path)["quantization_config"] == {"quant_method": "awq"}
    for more in ({}, {"quantization_config": {"group_size": 64, "bits": 4}}):
        config.write_text(json.dumps({"quantization": {"group_size": 64, "bits": 4}} | more))
        assert metadata_of(tmp_path)["quantization_config"] == {"quant_method": "mlx"}


def test_tensors_that_the_index_lists_and_no_shard_holds_are_said(tmp_path, caplog):
    writer = SafetensorsWriter(tmp_path, 150)
    for name, tensor in TENSORS.items():
        writer.put(name, tensor)
    writer.finish({"model_type": "x"})
    index = json.loads((tmp_path / INDEX).read_text())
    where = next(iter(index["weight_map"].values()))
    index["weight_map"] |= {f"ghost.{i}.weight": where for i in range(5)}
    (tmp_path / INDEX).write_text(json.dumps(index))
    SafetensorsReader(tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    ghosts = "ghost.0.weight, ghost.1.weight, ghost.2.weight and 2 more"
    assert said == f"{tmp_path}: {INDEX} lists tensors that no shard holds: {ghosts}"
