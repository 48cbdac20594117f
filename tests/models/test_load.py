import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from models import FAMILIES, family_of
from models.checkpoint import Checkpoint, resolve
from models.load import load_config, load_model, load_tokenizer
from quant.core.errors import InputError
from tests.conftest import CONFIGS, build, save_tokenizer

CPU = torch.device("cpu")


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def opened(path: Path, cache: Path):
    return load_model(str(path), dtype=torch.float32, cache_dir=cache)


@pytest.mark.parametrize("name", CONFIGS)
def test_families_name_every_linear_once_and_in_order_of_execution(name, model_dir, tmp_path):
    model = opened(model_dir(name), tmp_path)
    declared = [linear for group in model.groups for linear in group]
    reference = build(name)
    order: list[str] = []
    block = reference.get_submodule(model.family.blocks)[0]
    inputs: dict[str, torch.Tensor] = {}
    for linear, module in block.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):

            def hook(m, args, linear=linear):
                order.append(linear)
                inputs[linear] = args[0]

            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        reference(torch.ones(1, 6, dtype=torch.long))
    assert sorted(order) == sorted(declared)
    for group in model.groups:
        assert all(torch.equal(inputs[group[0]], inputs[linear]) for linear in group)
    # A group is solved before anything that reads its outputs runs.
    first = [min(order.index(linear) for linear in group) for group in model.groups]
    assert first == sorted(first)


def test_every_model_type_belongs_to_one_family():
    known = [name for family in FAMILIES for name in family.model_types]
    assert len(known) == len(set(known)) and {"opt", "bloom", "falcon", "llama", "mistral"} <= set(known)
    with pytest.raises(InputError, match=r"unknown model family 'ctrl'; known: bloom, .*adding-a-family"):
        family_of("ctrl")


def test_sharded_equals_single_file(model_dir, tmp_path):
    sharded = tmp_path / "sharded"
    build("llama").save_pretrained(sharded, max_shard_size="40KB")
    save_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = opened(model_dir("llama"), tmp_path), opened(sharded, tmp_path)
    for index in range(3):
        a, b = one.block_weights(index, CPU), many.block_weights(index, CPU)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    (sorted(sharded.glob("*.safetensors"))[1]).unlink()
    with pytest.raises(InputError, match=r"shard model-00002.* is missing"):
        opened(sharded, tmp_path)


def test_bin_checkpoints_are_converted_once(model_dir, tmp_path):
    source = model_dir("opt")
    old = tmp_path / "old"
    old.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, old)
    tensors = load_file(source / "model.safetensors")
    # As OPT's files on the hub: no "model." prefix, the tied head stored too.
    tensors = {k.removeprefix("model."): v for k, v in tensors.items()}
    tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"]
    names = sorted(tensors)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({k: tensors[k] for k in part}, old / file)
    weight_map = {k: file for file, part in halves.items() for k in part}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    cache = tmp_path / "cache"
    model, reference = opened(old, cache), opened(source, cache)
    for index in range(3):
        a, b = model.block_weights(index, CPU), reference.block_weights(index, CPU)
        assert all(torch.equal(a[k], b[k]) for k in b)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.outside_weights(CPU).values(), reference.outside_weights(CPU).values(), strict=True)
    )
    stamps = {f: f.stat().st_mtime_ns for f in cache.rglob("*.safetensors")}
    assert len(stamps) == 2
    opened(old, cache)
    assert stamps == {f: f.stat().st_mtime_ns for f in cache.rglob("*.safetensors")}, "converted again"
    assert load_tokenizer(model.checkpoint.path) is not None


def test_a_pickle_with_code_is_refused(tmp_path, model_dir):
    evil = tmp_path / "evil"
    evil.mkdir()
    shutil.copy(model_dir("opt") / "config.json", evil)
    torch.save({"x": Path("/")}, evil / "pytorch_model.bin")
    with pytest.raises(InputError, match="weights only"):
        opened(evil, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_weights_keep_the_precision_of_the_checkpoint(tmp_path):
    build("llama", torch.float16).save_pretrained(tmp_path / "half")
    model = opened(tmp_path / "half", tmp_path)
    assert model.storage_dtype == torch.float16 and model.dtype == torch.float32
    assert load_model(str(tmp_path / "half"), dtype=None, cache_dir=tmp_path).dtype == torch.float16


def break_truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def break_garbage(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"not tensors at all, and long enough to be read as a header")


def break_missing_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def break_shape(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


def break_family(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "ctrl"}))


def break_json(path: Path) -> None:
    (path / "config.json").write_text("{ not json")


def break_config(path: Path) -> None:
    (path / "config.json").unlink()


def break_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def break_quantized(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


BROKEN = {
    break_truncated: "truncated or not a safetensors file",
    break_garbage: "truncated or not a safetensors file",
    break_missing_tensor: "lacks the tensor model.layers.1.mlp.up_proj.weight",
    break_shape: r"has shape \(64, 32\) .* asks for \(128, 32\)",
    break_family: "unknown model family 'ctrl'",
    break_json: "config.json is truncated or not JSON",
    break_config: "holds no config.json",
    break_weights: "holds no weights",
    break_quantized: "quantized already",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_damaged_models_are_named_in_one_line(damage, model_dir, tmp_path):
    path = copy(model_dir("llama"), tmp_path / "model")
    damage(path)
    with pytest.raises(InputError, match=BROKEN[damage]) as error:
        opened(path, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_nan_weights_are_named(model_dir, tmp_path):
    path = copy(model_dir("llama"), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 4] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    model = opened(path, tmp_path)
    model.block_weights(1, CPU)
    with pytest.raises(InputError, match=r"model.layers.2.self_attn.k_proj.weight holds NaN"):
        model.block_weights(2, CPU)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/model", "no such model directory"),
        ("./nothing/here", "no such model directory"),
        ("models/demo/nothing", "no such model directory"),
        ("nobody/no-such-model", "neither a local directory nor a model that the hub gives"),
    ],
)
def test_models_that_are_not_there(model, message, tmp_path):
    with pytest.raises(InputError, match=message):
        resolve(model, tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_hub_ids_take_safetensors_and_fall_back_to_bin(kind, model_dir, tmp_path, monkeypatch):
    """The hub's client is replaced by one that copies the files a pattern asks for."""
    from fnmatch import fnmatch

    from models import checkpoint

    remote, local = tmp_path / "remote", tmp_path / "snapshot"
    remote.mkdir(), local.mkdir()
    for file in model_dir("opt").iterdir():
        shutil.copy(file, remote)
    if kind == "bin":
        torch.save(load_file(remote / "model.safetensors"), remote / "pytorch_model.bin")
        (remote / "model.safetensors").unlink()
    asked: list[str] = []

    def download(model: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        for file in remote.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    model = load_model("facebook/opt-tiny", dtype=torch.float32, cache_dir=tmp_path / "cache")
    reference = opened(model_dir("opt"), tmp_path)
    a, b = model.block_weights(2, CPU), reference.block_weights(2, CPU)
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert ("pytorch_model*.bin" in asked) == (kind == "bin")
    asked.clear()
    load_config("facebook/opt-tiny", tmp_path / "cache", with_weights=False)
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in asked)


def test_a_missing_tokenizer_is_named(model_dir, tmp_path):
    path = copy(model_dir("llama"), tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(path)


def test_hash_depends_on_every_weight(model_dir, tmp_path):
    path = copy(model_dir("llama"), tmp_path / "model")
    before = Checkpoint(path).sha256()
    assert before == Checkpoint(model_dir("llama")).sha256()
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert Checkpoint(path).sha256() != before


def test_a_name_that_looks_like_a_hash_is_no_hash(model_dir, tmp_path):
    """Only the hub's cache names its files by what is in them."""
    path, right = copy(model_dir("llama"), tmp_path / "model"), Checkpoint(model_dir("llama")).sha256()
    for folder, taken in (("elsewhere", False), ("models--a--b/blobs", True)):
        file = tmp_path / folder / ("0" * 64)
        file.parent.mkdir(parents=True)
        shutil.copy(model_dir("llama") / "model.safetensors", file)
        (path / "model.safetensors").unlink()
        (path / "model.safetensors").symlink_to(file)
        assert (Checkpoint(path).sha256() == right) != taken


def test_configuration_alone_is_enough_for_a_plan(tmp_path):
    config, _ = load_config("benchmarks/configs/falcon-180b", tmp_path, with_weights=False)
    assert config.hidden_size == 14848


LINEAR = {"type": "linear", "factor": 2.0}
CONTRADICTIONS = {
    "theta": {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "type": {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "factor": {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "part": {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
}  # fmt: skip
AGREEING = {
    "numbers alike": {"rope_theta": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "old type": {"rope_theta": 1e4, "rope_scaling": LINEAR,
                 "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "nulls": {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "null parameters": {"rope_theta": 5e5, "rope_parameters": None},
}  # fmt: skip


@pytest.mark.parametrize("case", [*CONTRADICTIONS, *AGREEING])
def test_rotary_settings_in_two_forms_must_agree(case, model_dir, tmp_path):
    """Readers of transformers 4 take one form, those of 5 the other: such a model has two meanings."""
    path = copy(model_dir("llama"), tmp_path / "model")
    declared = json.loads((path / "config.json").read_text())
    declared.pop("rope_parameters", None)
    form = (CONTRADICTIONS | AGREEING)[case]
    (path / "config.json").write_text(json.dumps(declared | form))
    if case in AGREEING:
        opened(path, tmp_path)
        return
    with pytest.raises(InputError, match=r"config.json gives \w+ twice, .* in rope_parameters and .* transformers 4"):
        opened(path, tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "torch.float16"}, "dtype is 'torch.float16', where a name such as bfloat16 belongs"),
        ({"dtype": None, "torch_dtype": "auto"}, "torch_dtype is 'auto', where a name such as bfloat16 belongs"),
        ({"quantization_config": [1]}, "quantization_config is no JSON object"),
    ],
)
def test_entries_of_config_json_that_libraries_stumble_over_are_named(entry, message, model_dir, tmp_path):
    path = copy(model_dir("llama"), tmp_path / "model")
    declared = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(declared | entry))
    with pytest.raises(InputError, match=f"config.json: {message}"):
        opened(path, tmp_path)
