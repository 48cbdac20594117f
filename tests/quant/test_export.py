"""Checkpoints: they measure what their run measured, conversions lose nothing, damage and what changes a model are
said in one line."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import main as main_command
import model_quantizer
from benchmarks.loaders import in_float32
from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.blocks.weights import INPUT_RANGE, ONLINE
from quant.cli.terminal import guarded
from quant.core.errors import InputError
from quant.export import FORMATS, PACKED, write
from quant.export.formats import Layers
from quant.export.read import QuantizedCheckpoint, open_checkpoint
from quant.export.runtimes import RUNTIMES
from quant.run.config import RunConfig
from quant.run.convert import convert, same_codes
from quant.run.session import Session

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models/demo/llama"
LAYERS = Layers(["layer"], ["lm_head"], "model.layers", 1)


def demo_config(tmp_path, model, **more):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog again and again " * 400)
    return RunConfig(
        model=str(model), dataset=str(text), nsamples=2, seqlen=32, method="rtn", wbits=4, group_size=32,
        eval_datasets=(str(text),), limit=4, cache_dir=tmp_path / "cache", run_dir=tmp_path / "run", **more,
    )  # fmt: skip


def perplexity(path, tmp_path):
    config = replace(demo_config(tmp_path, path), wbits=16, run_dir=tmp_path / f"eval-{Path(path).name}")
    results = Session(config).run(config)
    return results["perplexity"]["text"]["fp"], results["bits_per_weight"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The demo model in float32: what is measured is then no matter of how written-out weights are rounded."""
    return in_float32("llama", tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, whole):
    """A run of the demo model, saved as gptq_v2."""
    base = tmp_path_factory.mktemp("exported")
    config = demo_config(base, whole, save=base / "saved", format="gptq_v2")
    results = Session(config).run(config)
    for kind in FORMATS:
        convert(base / "run", kind, base / f"as-{kind}")
    return base, results


def test_every_format_measures_what_the_run_measured(exported, whole):
    base, results = exported
    expected = results["perplexity"]["text"]["quantized"]
    for kind in FORMATS:
        found, bits = perplexity(base / f"as-{kind}", base)
        assert found == expected, kind
        assert kind == "dequantized" or bits == pytest.approx(results["bits_per_weight"])
        for file in (base / f"as-{kind}").glob("*.json"):
            assert str(whole.parent) not in file.read_text() and str(base) not in file.read_text(), file.name


def test_conversions_lose_nothing(exported):
    base, _ = exported
    path = base / "saved"
    for number, kind in enumerate(("gptq", "compressed-tensors", "bitplane", "gptq_v2")):
        convert(path, kind, base / f"chain-{number}")
        path = base / f"chain-{number}"
    first, last = (load_file(p / "model.safetensors") for p in (base / "saved", path))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    with pytest.raises(InputError, match="is not empty"):
        convert(path, "gptq", base / "saved")


def damaged(base, tmp_path, change, kind="gptq_v2"):
    target = tmp_path / "damaged"
    shutil.copytree(base / f"as-{kind}", target)
    change(target)
    return target


def edit_tensors(ending, change, hashed=False):
    """Replace the first tensor of that name; change returns None to delete it."""

    def edit(path):
        file = path / "model.safetensors"
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith(ending))
        new = change(tensors.pop(name))
        save_file(tensors | ({} if new is None else {name: new.contiguous()}), file, {"format": "pt"})
        if not hashed:
            (path / "results.json").unlink()

    return edit


def edit_config(hashed=False, **changes):
    """Change entries of the quantization_config, those of compressed-tensors' weights by `weights=`, or of bitplane's
    spec by `spec=`.
    """

    def edit(path):
        config = json.loads((path / "config.json").read_text())
        quantization = config["quantization_config"]
        for name, value in changes.items():
            where = quantization["config_groups"]["group_0"] if name == "weights" else quantization
            where[name] = where[name] | value if name in ("weights", "spec") else value
        (path / "config.json").write_text(json.dumps(config))
        if not hashed:
            (path / "results.json").unlink()

    return edit


def model_entry(hashed=True, **changes):
    """Change entries of config.json itself."""

    def edit(path):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        if not hashed:
            (path / "results.json").unlink()

    return edit


def edit_group(**changes):
    """Change entries of the only group of compressed-tensors' settings."""

    def edit(path):
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"] |= changes
        (path / "config.json").write_text(json.dumps(config))
        (path / "results.json").unlink()

    return edit


def second_group(**changes):
    """Give one linear a group of settings of its own."""

    def edit(path):
        config = json.loads((path / "config.json").read_text())
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"] = groups["group_0"] | {"targets": ["model.layers.0.mlp.up_proj"]} | changes
        (path / "config.json").write_text(json.dumps(config))
        (path / "results.json").unlink()

    return edit


def broken(name, text="{"):
    return lambda path: (path / name).write_text(text)


def set_dtype(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "auto"}))


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def both(version):
    return {"checkpoint_format": version, "format": version}


GPTQ, CT, PLANES = "gptq_v2", "compressed-tensors", "bitplane"
DAMAGE = {
    "gptq, edited": (GPTQ, edit_tensors("qweight", lambda t: t + 1, hashed=True), "its hash differs"),
    "gptq, cut": (GPTQ, cut, "truncated"),
    "gptq, shape": (GPTQ, edit_tensors("qweight", lambda t: t[:-1]), "does not fit"),
    "gptq, one dimension": (GPTQ, edit_tensors("qweight", lambda t: t.flatten()), "does not fit config.json"),
    "gptq, no qweight": (GPTQ, edit_tensors("qweight", lambda t: None), "part of a linear whose other tensors are missing"),
    "gptq, no zeros": (GPTQ, edit_tensors("qzeros", lambda t: None), "does not fit config.json .no '.*qzeros'"),
    "gptq, groups": (GPTQ, edit_config(group_size=64), "but config.json says group_size 64"),
    "gptq, config edited": (GPTQ, edit_config(hashed=True, group_size=64), "quantization_config is not what was written"),
    "gptq, version": (GPTQ, edit_config(hashed=True, **both("gptq")), "quantization_config is not what was written"),
    "gptq, other version": (GPTQ, edit_config(sym=True, **both("gptq")), "says sym and gptq, but the zero points are not 8"),
    "gptq, two versions": (GPTQ, edit_config(checkpoint_format="gptq"), "says checkpoint_format 'gptq' and format 'gptq_v2'"),
    "gptq, sym": (GPTQ, edit_config(sym=True), "says sym and gptq_v2, but the zero points are not 8"),
    "gptq, bits": (GPTQ, edit_config(bits=8), "does not fit 8 bits"),
    "gptq, words": (GPTQ, edit_config(pack_dtype="int64"), "only codes packed in words of int32"),
    "gptq, group 0": (GPTQ, edit_config(group_size=0), "says group_size 0"),
    "gptq, bits null": (GPTQ, edit_config(bits=None), "does not fit config.json"),
    "gptq, group null": (GPTQ, edit_config(group_size=None), "does not fit config.json"),
    "gptq, unknown": (GPTQ, edit_config(quant_method="awq"), "quantized by awq, which is not read; known: gptq"),
    "gptq, planar": (GPTQ, edit_config(**both("gptq_p")), "quantized by gptq .gptq_p., which is not read"),
    "gptq, other": (GPTQ, edit_config(quant_method="bitplane"), "says bitplane, but no tensor is quantized"),
    "gptq, results": (GPTQ, broken("results.json"), "results.json is truncated or not JSON"),
    "gptq, list": (GPTQ, broken("results.json", "[]"), "results.json holds no JSON object"),
    "gptq, dtype": (GPTQ, set_dtype, "auto"),
    "ct, edited": (CT, edit_tensors("weight_packed", lambda t: t + 1, hashed=True), "its hash differs"),
    "ct, cut": (CT, cut, "truncated"),
    "ct, shape": (CT, edit_tensors("weight_packed", lambda t: t[:, :-1]), "which does not fit 4 bits"),
    "ct, one dimension": (CT, edit_tensors("weight_packed", lambda t: t.flatten()), "which does not fit 4 bits"),
    "ct, no codes": (CT, edit_tensors("weight_packed", lambda t: None), "does not fit config.json"),
    "ct, no scales": (CT, edit_tensors("weight_scale", lambda t: None), "part of a linear whose other tensors are missing"),
    "ct, no zeros": (CT, edit_tensors("weight_zero_point", lambda t: None), "but no zero point is stored"),
    "ct, config edited": (CT, edit_config(hashed=True, weights={"symmetric": True}), "quantization_config is not what was"),
    "ct, symmetric": (CT, edit_config(weights={"symmetric": True}), "says symmetric, but a zero point is stored"),
    "ct, group null": (CT, edit_config(weights={"group_size": None, "strategy": "channel"}), "says group_size None"),
    "ct, groups": (CT, edit_config(weights={"group_size": 64}), "says group_size 64"),
    "ct, bits": (CT, edit_config(weights={"num_bits": 8}), "does not fit 8 bits"),
    "ct, bits null": (CT, edit_config(weights={"num_bits": None}), "does not fit config.json"),
    "ct, groups missing": (CT, edit_config(config_groups=None), "is not complete"),
    "ct, format": (CT, edit_config(format="marlin-24"), "quantized by compressed-tensors .marlin-24., which is not read"),
    "bitplane, edited": (PLANES, edit_tensors("planes", lambda t: t + 1, hashed=True), "its hash differs"),
    "bitplane, cut": (PLANES, cut, "truncated"),
    "bitplane, shape": (PLANES, edit_tensors("planes", lambda t: t[:, :-1]), "but config.json asks for"),
    "bitplane, one dimension": (PLANES, edit_tensors("planes", lambda t: t.flatten()), "does not fit config.json"),
    "bitplane, no codes": (PLANES, edit_tensors("planes", lambda t: None), "part of a linear whose other tensors are missing"),
    "bitplane, no scales": (PLANES, edit_tensors("scales", lambda t: None), "does not fit config.json .no 'scales'"),
    "bitplane, no zeros": (PLANES, edit_tensors("zeros", lambda t: None), "no zero points, but config.json says .* asymmetric"),
    "bitplane, config edited": (PLANES, edit_config(hashed=True, spec={"group_size": 64}), "quantization_config is not what"),
    "bitplane, groups": (PLANES, edit_config(spec={"group_size": 64}), "says group_size 64"),
    "bitplane, bits": (PLANES, edit_config(spec={"bits": 3}), "do not fit 3 bits"),
    "bitplane, symmetric": (PLANES, edit_config(spec={"symmetric": True}), "and zero points, but config.json says .* symmetric"),
    "bitplane, version": (PLANES, edit_config(version=99), "bitplane of version 99 is not read, only version 1"),
    "bitplane, unknown entry": (PLANES, edit_config(spec={"colour": 1}), "does not fit config.json"),
    "gptq, order": (GPTQ, edit_tensors("g_idx", lambda t: t.flip(0)), "says desc_act false, but g_idx is not in order"),
    "gptq, method list": (GPTQ, edit_config(quant_method=["gptq"]), "quant_method .'gptq'. with format 'gptq_v2' are no names"),
    "gptq, version list": (GPTQ, edit_config(**both(["gptq"])), "with format .'gptq'. are no names"),
    "gptq, pattern": (GPTQ, edit_config(dynamic={"+:(": {"bits": 4}}), "'.' is no regular expression"),
    "gptq, hashes": (GPTQ, broken("results.json", '{"files_sha256": []}'), "files_sha256 is no JSON object"),
    "gptq, hashes of no file": (GPTQ, lambda p: (p / "quantize_config.json").unlink(), "quantize_config.json is missing, but"),
    "gptq, epsilon": (GPTQ, model_entry(rms_norm_eps=1e-2), "config.json is not what was written"),
    "gptq, fewer blocks": (GPTQ, model_entry(hashed=False, num_hidden_layers=2), "layers.2.* belongs to none of the 2 blocks"),
    "plain, edited": ("dequantized", edit_tensors("up_proj.weight", lambda t: t + 1, hashed=True), "its hash differs"),
    "plain, epsilon": ("dequantized", model_entry(rms_norm_eps=1e-2), "config.json is not what was written"),
    "plain, fewer blocks": ("dequantized", model_entry(hashed=False, num_hidden_layers=2), "belongs to none of the 2 blocks"),
    "ct, pattern": (CT, edit_group(targets=["re:("]), "'.' is no regular expression"),
    "ct, transforms": (CT, edit_config(transform_config={"config_groups": {"R1": {}}}), "quantization_config.transform_config is set"),
    "ct, keys": (CT, edit_config(kv_cache_scheme={"num_bits": 8}), "quantization_config.kv_cache_scheme is set"),
    "ct, sparsity": (CT, edit_config(sparsity_config={"format": "sparse-24-bitmask"}), "quantization_config.sparsity_config is set"),
    "ct, outputs": (CT, edit_group(output_activations={"num_bits": 8}), "config_groups.group_0.output_activations is set"),
    "ct, two inputs": (CT, second_group(input_activations={"num_bits": 8}), "config_groups disagree on input_activations"),
    "ct, inputs": (CT, edit_group(input_activations={"num_bits": 8, "strategy": "token", "dynamic": "local"}), "not integers per token"),
    "ct, input bits": (CT, edit_group(input_activations={"num_bits": 99, "strategy": "token", "dynamic": True}), "of 99 bits"),
    "bitplane, activation bits": (PLANES, edit_config(activations={"bits": "x"}), "are none that a run can have"),
    "bitplane, activation method": (PLANES, edit_config(activations={"bits": 8, "method": "foo"}), "are none that a run can have"),
    "bitplane, activations": (PLANES, edit_config(activations={"bitz": 8}), "is not complete"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(case, exported, tmp_path):
    """Opened and read as the evaluator does, a tensor at a time."""
    kind, change, message = DAMAGE[case]
    path = damaged(exported[0], tmp_path, change, kind)
    with pytest.raises(InputError, match=message) as error:
        model = load_model(str(path), dtype=torch.float32, cache_dir=tmp_path, opener=open_checkpoint)
        for index in range(len(model.blocks)):
            model.block_weights(index, torch.device("cpu"))
    assert "\n" not in str(error.value)


HARMLESS = {
    "empty": edit_config(transform_config={}, kv_cache_scheme=None, sparsity_config={}),
    "dense": edit_config(sparsity_config={"format": "dense", "global_sparsity": 0.1}),
    "two groups alike": second_group(),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_settings_that_change_nothing_are_read(case, exported, tmp_path):
    path = damaged(exported[0], tmp_path, HARMLESS[case], CT)
    read = QuantizedCheckpoint(path)
    name = next(iter(read._weights))
    assert same_codes(read.quantized(name), QuantizedCheckpoint(exported[0] / f"as-{CT}").quantized(name))


def test_checkpoints_of_earlier_versions_are_read(exported, tmp_path):
    """Their results.json has the hash of the quantization_config alone."""

    def older(path):
        results = json.loads((path / "results.json").read_text())
        del results["config_sha256"]
        (path / "results.json").write_text(json.dumps(results))

    path = damaged(exported[0], tmp_path, older)
    assert perplexity(path, tmp_path)[0] == exported[1]["perplexity"]["text"]["quantized"]
    edit_config(hashed=True, group_size=64)(path)
    with pytest.raises(InputError, match="quantization_config is not what was written"):
        QuantizedCheckpoint(path)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_of_zeros_belong_to_no_block_and_do_no_harm(value, exported, tmp_path):
    """As auto-gptq wrote them where a model has none; rotary frequencies are of older files of everybody."""
    more = {"model.layers.0.self_attn.q_proj.bias": torch.full((128,), value),
            "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(16)}  # fmt: skip

    def edit(path):
        file = path / "model.safetensors"
        save_file(load_file(file) | more, file, {"format": "pt"})
        (path / "results.json").unlink()

    path = damaged(exported[0], tmp_path, edit)
    if value:
        with pytest.raises(InputError, match="layers.0.self_attn.q_proj.bias belongs to none of the 4 blocks"):
            perplexity(path, tmp_path)
    else:
        assert perplexity(path, tmp_path)[0] == exported[1]["perplexity"]["text"]["quantized"]


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_broken_file_is_one_line_when_converting(name, exported, tmp_path):
    path = damaged(exported[0], tmp_path, broken(name))
    with pytest.raises(InputError, match=f"{name} is truncated or not JSON"):
        convert(path, "bitplane", tmp_path / "out")


def test_settings_of_single_linears(exported, tmp_path):
    """What `dynamic` of others gives a linear is taken; without it, bits that disagree are refused."""
    every = {r"+:model\.layers\..*": {"bits": 4}}
    path = damaged(exported[0], tmp_path, edit_config(bits=8, dynamic=every))
    read = QuantizedCheckpoint(path)
    name = next(iter(read._weights))
    assert same_codes(read.quantized(name), QuantizedCheckpoint(exported[0] / "as-gptq_v2").quantized(name))


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from quant.cli.terminal import guarded
from quant.run.convert import convert
from models.checkpoint import resolve

source, out = map(Path, sys.argv[1:])
torch.save({"a.weight": torch.randn(200, 200)}, out / "pytorch_model.bin")
(out / "config.json").write_text("{}")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
print(guarded(lambda: convert(source, "gptq_v2", out / "checkpoint")))
print(guarded(lambda: resolve(str(out), out / "cache")))
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(exported, tmp_path):
    """The limit on a file's size is met as a full disk is: inside of the library that writes the tensors."""
    command = [sys.executable, "-c", FULL_DISK, str(exported[0] / "run"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DEMO.parents[2], check=True)
    assert done.stdout.split() == ["1", "1"] and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 and all("File too large: " in line for line in lines)
    left = [file.relative_to(tmp_path).name for file in tmp_path.rglob("*") if file.is_file()]
    assert sorted(left) == ["config.json", "pytorch_model.bin"]


def test_space_is_looked_for_before_work(exported, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    for source in ("run", "saved"):
        with pytest.raises(InputError, match="out needs about 0.00 GB, the disk has 0.00 GB free"):
            convert(exported[0] / source, "bitplane", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_checkpoints_are_overwritten(exported, tmp_path, monkeypatch):
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    (notes / "diary.txt").write_text("mine")
    with pytest.raises(
        InputError, match="holds no checkpoint that this toolkit wrote, and --overwrite replaces nothing else"
    ):
        convert(exported[0] / "saved", "bitplane", notes, overwrite=True)
    assert (notes / "diary.txt").read_text() == "mine"
    with pytest.raises(InputError, match="--out .*saved is the same place as the source"):
        convert(exported[0] / "saved", "bitplane", exported[0] / "saved", overwrite=True)
    convert(exported[0] / "saved", "bitplane", out)
    before = (out / "config.json").read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(write, "write_tensors", full)
        convert(exported[0] / "saved", "gptq_v2", out, overwrite=True)
    assert (out / "config.json").read_text() == before and {p.name for p in tmp_path.iterdir()} == {"notes", "out"}
    convert(exported[0] / "saved", "gptq_v2", out, overwrite=True)
    assert QuantizedCheckpoint(out).format.name == "gptq_v2" and {p.name for p in tmp_path.iterdir()} == {
        "notes",
        "out",
    }
    modes = {file.name: file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "readable as any new file, not by its owner alone"


def test_shards(exported, tmp_path, monkeypatch):
    base, results = exported
    monkeypatch.setattr(write, "SHARD_BYTES", 200_000)
    convert(base / "saved", "gptq_v2", tmp_path / "cut")
    files = sorted(file.name for file in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    whole = load_file(base / "saved/model.safetensors")
    assert index["weight_map"].keys() == whole.keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    found = {k: v for file in files for k, v in load_file(tmp_path / "cut" / file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert all(
        (tmp_path / "cut" / f).stat().st_size < 400_000 for f in files if len(load_file(tmp_path / "cut" / f)) > 1
    )
    assert perplexity(tmp_path / "cut", tmp_path)[0] == results["perplexity"]["text"]["quantized"]
    first = tmp_path / "cut" / files[0]
    save_file({k: v + 1 for k, v in load_file(first).items()}, first, {"format": "pt"})
    with pytest.raises(InputError, match=f"{files[0]} is not what was written"):
        QuantizedCheckpoint(tmp_path / "cut")


def test_shapes_come_from_headers(exported, monkeypatch):
    for kind in PACKED:
        checkpoint = QuantizedCheckpoint(exported[0] / f"as-{kind}")
        shapes = {name: tuple(checkpoint.read(name).shape) for name in checkpoint.names()}
        monkeypatch.setattr(checkpoint, "quantized", None)
        assert {name: checkpoint.shape(name) for name in checkpoint.names()} == shapes


def test_side_files_come_along(exported, tmp_path):
    source = damaged(exported[0], tmp_path, lambda path: None)
    for name in ("added_tokens.json", "chat_template.json", "chat_template.jinja"):
        (source / name).write_text("{}")
    convert(source, "bitplane", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"added_tokens.json", "chat_template.json", "chat_template.jinja", "tokenizer.json"}
    assert "quantize_config.json" not in names


def add_to_blocks(ending, **act):
    """A bitplane checkpoint with tensors that no parameter holds, and activation settings."""

    def edit(path):
        file = path / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.0.input_layernorm" if ending == ONLINE else "model.layers.0.mlp.up_proj"
        tensors[name + ending] = torch.eye(128).half() if ending == ONLINE else torch.tensor([-1.0, 1.0])
        save_file(tensors, file, {"format": "pt"})
        edit_config(activations=act)(path)

    return edit


def test_what_a_plain_checkpoint_cannot_hold_is_not_dropped(exported, tmp_path):
    online = damaged(exported[0], tmp_path, add_to_blocks(ONLINE), "bitplane")
    with pytest.raises(InputError, match="cannot hold matrices behind norms .*: use format bitplane"):
        convert(online, "dequantized", tmp_path / "out")
    (tmp_path / "static").mkdir()
    static = damaged(exported[0], tmp_path / "static", add_to_blocks(INPUT_RANGE, bits=8, method="static"), "bitplane")
    with pytest.raises(InputError, match="activations of 8 bits per token"):
        convert(static, "compressed-tensors", tmp_path / "out")
    convert(static, "dequantized", tmp_path / "out")
    assert not any(name.endswith(INPUT_RANGE) for name in load_file(tmp_path / "out/model.safetensors"))


def test_a_quantized_model_is_not_quantized_again(exported, tmp_path):
    with pytest.raises(InputError, match="is quantized already"):
        Session(demo_config(tmp_path, exported[0] / "saved"))


def test_a_target_that_cannot_load_is_refused_before_work(tmp_path):
    config = demo_config(tmp_path, DEMO, save=tmp_path / "out", format="gptq", target="vllm")
    session = Session(config)
    with pytest.raises(InputError, match="--target vllm: with --format gptq, it takes symmetric grids only"):
        session.run(config)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_activation_quantizers_come_back(tmp_path, whole):
    config = replace(
        demo_config(tmp_path, whole, save=tmp_path / "w8a8", format="compressed-tensors"),
        wbits=8, group_size=-1, symmetric=True, act=ActSpec(8),
    )  # fmt: skip
    expected = Session(config).run(config)["perplexity"]["text"]["quantized"]
    assert perplexity(tmp_path / "w8a8", tmp_path)[0] == expected
    checkpoint = QuantizedCheckpoint(tmp_path / "w8a8")
    assert checkpoint.act == ActSpec(8) and checkpoint.quantization["format"] == "int-quantized"


def test_part_of_a_model(tmp_path, whole):
    """Which linears are left alone is known after any chain of conversions."""
    config = demo_config(tmp_path, whole, num_layers=2, save=tmp_path / "part", format="gptq_v2")
    expected = Session(config).run(config)["perplexity"]["text"]["quantized"]
    assert perplexity(tmp_path / "part", tmp_path)[0] == expected

    def quantization(name):
        return json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]

    written = quantization("part")
    assert written["dynamic"] == {r"-:model\.layers\.(2|3)\..*": {}}
    (modules,) = written["modules_in_block_to_quantize"]
    assert len(modules) == 2 * 7 and "model.layers.1.mlp.up_proj" in modules
    for source, kind in (("run", "compressed-tensors"), ("part", "compressed-tensors"), ("part", "bitplane")):
        convert(tmp_path / source, kind, tmp_path / "ct", overwrite=True)
        ignored = quantization("ct")["ignore"]
        assert "lm_head" in ignored and "model.layers.3.mlp.up_proj" in ignored and len(ignored) == 1 + 2 * 7
    convert(tmp_path / "ct", "gptq_v2", tmp_path / "back")
    assert quantization("back") == written
    assert perplexity(tmp_path / "back", tmp_path)[0] == expected


def test_part_of_a_block(exported, tmp_path):
    """A linear that others left alone, ignored by a pattern."""
    path, name = damaged(exported[0], tmp_path, lambda path: None, CT), "model.layers.1.mlp.up_proj"
    value = QuantizedCheckpoint(path).read(f"{name}.weight")
    tensors = {k: v for k, v in load_file(path / "model.safetensors").items() if not k.startswith(name)}
    save_file(tensors | {f"{name}.weight": value}, path / "model.safetensors", {"format": "pt"})
    edit_config(ignore=["re:.*lm_head", f"re:{name}"])(path)
    convert(path, "gptq_v2", tmp_path / "gptq")
    written = json.loads((tmp_path / "gptq/config.json").read_text())["quantization_config"]
    assert written["dynamic"] == {r"-:model\.layers\.1\.mlp\.up_proj$": {}}
    assert len(written["modules_in_block_to_quantize"][0]) == 4 * 7 - 1 and written["lm_head"] is False
    convert(tmp_path / "gptq", "bitplane", tmp_path / "planes")
    written = json.loads((tmp_path / "planes/config.json").read_text())["quantization_config"]
    assert written["ignore"] == [name, "lm_head"]


CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'llama'\n",
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def test_classes_that_a_model_brings_come_along(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = tmp_path / "model"
    shutil.copytree(DEMO, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    for name, code in CODE.items():
        (source / name).write_text(code)
    asked = demo_config(tmp_path, source, trust_remote_code=True, save=tmp_path / "saved", format="gptq_v2")
    Session(asked).run(asked)
    for start, kind in (("run", "dequantized"), ("saved", "bitplane")):
        convert(tmp_path / start, kind, tmp_path / f"{start}-{kind}", trust_remote_code=True)
    for place in ("saved", "run-dequantized", "saved-bitplane"):
        assert json.loads((tmp_path / place / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert {name: (tmp_path / place / name).read_text() for name in CODE} == CODE
    evaluated = replace(asked, model=str(tmp_path / "saved"), wbits=16, save=None, format="dequantized",
                        run_dir=tmp_path / "again")  # fmt: skip
    session = Session(evaluated)
    assert type(session.model.module).__name__ == "OwnModel"
    assert session.run(evaluated)["perplexity"]["text"]["fp"] > 1


def called(module, monkeypatch, capsys, *words):
    """A command in this process: exit code, standard output, standard error."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["x.py", *map(str, words)])
    code = guarded(module.main)
    return code, *capsys.readouterr()


QUICK = ["--eval-datasets", "demo", "--seqlen", 64, "--nsamples", 2, "--limit", 2, "--no-report"]


def test_convert_as_a_process(exported, tmp_path):
    """What a person types: a table of who loads it, the flags of this command in its messages, exit codes."""

    def convert_command(*words):
        command = [sys.executable, "-m", "quant.export", "convert", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = convert_command(exported[0] / "run", "--to", "compressed-tensors", "--out", tmp_path / "ct")
    assert done.returncode == 0 and "transformers" in done.stdout and "MB" in done.stdout, done.stderr
    assert perplexity(tmp_path / "ct", tmp_path)[0] == exported[1]["perplexity"]["text"]["quantized"]
    again = convert_command(tmp_path / "ct", "--to", "gptq_v2", "--out", tmp_path / "ct")
    assert (
        again.returncode == 2
        and again.stderr
        == f"error: --out {tmp_path / 'ct'} is the same place as the source {tmp_path / 'ct'}, which is read: use another place for --out\n"
    )
    full = convert_command(exported[0] / "run", "--to", "gptq_v2", "--out", tmp_path / "ct")
    assert full.returncode == 2 and "is not empty; use another directory or --overwrite" in full.stderr
    online = damaged(exported[0], tmp_path, add_to_blocks(ONLINE), "bitplane")
    refused = convert_command(online, "--to", "gptq", "--out", tmp_path / "x")
    assert refused.returncode == 2 and "cannot hold matrices behind norms: use format bitplane" in refused.stderr
    for found in (again, full, refused):
        assert not any(flag in found.stderr for flag in ("--save", "--format", "Traceback")), found.stderr


def test_a_plan_shows_who_loads_it_and_refuses_for_a_target(monkeypatch, capsys):
    asked = ["--model", DEMO, "--dataset", "demo", "--wbits", 4, "--group-size", 32, *QUICK, "--dry-run"]
    code, out, _ = called(model_quantizer, monkeypatch, capsys, *asked, "--sym", "--format", "gptq")
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith(RUNTIMES)}
    assert code == 0 and {"transformers", "vllm", "llama.cpp", "auto-gptq"} <= rows.keys()
    assert " yes " in rows["transformers"] and " yes " in rows["auto-gptq"]
    code, _, err = called(model_quantizer, monkeypatch, capsys, *asked, "--format", "gptq", "--target", "vllm")
    assert (
        code == 2
        and "--target vllm: with --format gptq, it takes symmetric grids only" in err
        and "Traceback" not in err
    )
    for flags, expected in (([], "gptq_v2"), (["--sym"], "gptq"), (["--outlier", 0.01], "bitplane")):
        code, out, _ = called(model_quantizer, monkeypatch, capsys, *asked, *flags, "--real_quant")
        assert code == 0 and f"will a {expected} checkpoint of this load?" in out


@pytest.mark.parametrize(
    ("flags", "expected"), [((), "gptq_v2"), (("--sym",), "gptq"), (("--outlier", 0.01), "bitplane")]
)
def test_real_quant_saves_packed(flags, expected, monkeypatch, capsys, tmp_path):
    """model_quantizer.py, as its help says."""
    words = ["--model", DEMO, "--dataset", "demo", "--wbits", 4, "--group-size", 32, "--num-iter", 2, *QUICK, *flags,
             "--cache-dir", tmp_path / "cache", "--run-dir", tmp_path / "run", "--real_quant", "--save", tmp_path / "out"]  # fmt: skip
    code, _, err = called(model_quantizer, monkeypatch, capsys, *words)
    assert code == 0, err
    assert QuantizedCheckpoint(tmp_path / "out").format.name == expected
    assert model_quantizer.config_from([*map(str, words), "--format", "dequantized"]).format == "dequantized"
    assert model_quantizer.config_from([*map(str, words), "--wbits", "16"]).format == "dequantized"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("--wbits 4 --symmetric", "gptq"), ("--wbits 4", "gptq_v2"), ("--wbits 3 --solver spqr", "bitplane"),
     ("--wbits 4 --abits 8", "bitplane")],
)  # fmt: skip
def test_real_quant_of_learned_methods_saves_packed(flags, expected, model_dir, text, monkeypatch, capsys, tmp_path):
    words = ["--model", model_dir("llama"), "--calib_dataset", text, "--eval_ppl", "--eval-datasets", text, "--seqlen", 32,
             "--nsamples", 4, "--limit", 4, "--epochs", 0, "--no-report", *flags.split(), "--cache-dir", tmp_path / "cache",
             "--run-dir", tmp_path / "run", "--real_quant", "--save_dir", tmp_path / "out"]  # fmt: skip
    code, _, err = called(main_command, monkeypatch, capsys, *words)
    assert code == 0, err
    assert QuantizedCheckpoint(tmp_path / "out").format.name == expected
    results = json.loads((tmp_path / "run/results.json").read_text())["perplexity"]["words"]["quantized"]
    assert read_back(tmp_path / "out", text, tmp_path) == pytest.approx(results, rel=1e-5)
    code, _, err = called(
        main_command, monkeypatch, capsys, *words, "--limit", 2, "--overwrite", "--save_dir", DEMO.parent
    )
    assert code == 2 and "holds no checkpoint" in err and "--save " not in err


def read_back(path, text, tmp_path, **more):
    config = RunConfig(model=str(path), eval_datasets=(str(text),), seqlen=32, limit=4, cache_dir=tmp_path / "cache",
                       run_dir=tmp_path / f"eval-{path.name}", **more)  # fmt: skip
    return Session(config).run(config)["perplexity"]["words"]["fp"]


LEARNED = {
    "folded": ("--let --lwc --wbits 4 --abits 16", ("gptq_v2", "compressed-tensors", "bitplane", "dequantized")),
    "matrix": (
        "--let --lwc --use_matrix --wbits 4 --abits 16",
        ("gptq_v2", "compressed-tensors", "bitplane", "dequantized"),
    ),
    "matrix behind norms": ("--let --use_matrix --use_ln_matrix --wbits 4 --abits 16", ("bitplane",)),
}


@pytest.mark.parametrize("case", LEARNED)
def test_learned_models_are_what_was_measured_in_every_format(case, model_dir, text, tmp_path):
    flags, kinds = LEARNED[case]
    words = ["--model", model_dir("llama"), "--calib_dataset", text, "--eval_ppl", "--eval-datasets", text, "--seqlen", 32,
             "--nsamples", 4, "--limit", 4, "--epochs", 2, *flags.split(), "--cache-dir", tmp_path / "cache",
             "--run-dir", tmp_path / "run"]  # fmt: skip
    config = main_command.config_from(list(map(str, words)))
    results = Session(config).run(config)["perplexity"]["words"]
    assert results["quantized"] != results["fp"]
    for kind in kinds:
        convert(tmp_path / "run", kind, tmp_path / kind)
        assert read_back(tmp_path / kind, text, tmp_path) == pytest.approx(results["quantized"], rel=1e-6), kind
    for kind in set(FORMATS) - {*kinds, "gptq"}:
        with pytest.raises(InputError, match="use format bitplane"):
            convert(tmp_path / "run", kind, tmp_path / kind)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_gptqs_config_tells_what_the_run_did(sequential, static, tmp_path):
    config = demo_config(tmp_path, DEMO, true_sequential=sequential, options={"static_groups": static, "act_order": static},
                         num_layers=1, save=tmp_path / "out", format="gptq_v2")  # fmt: skip
    config = replace(config, method="gptq", eval_datasets=())
    Session(config).run(config)
    convert(tmp_path / "out", "gptq", tmp_path / "converted")
    for name in ("out", "converted"):
        written = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert (written["true_sequential"], written["static_groups"], written["desc_act"]) == (
            sequential,
            static,
            False,
        )
