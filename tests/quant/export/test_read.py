"""Checkpoints that are read: damage and what changes a model are said in one line, what changes nothing is taken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.load import load_config, load_model
from quant.core.errors import InputError
from quant.export import PACKED
from quant.export.read import QuantizedCheckpoint, open_checkpoint
from quant.run.convert import convert
from tests.damage import (
    both,
    broken,
    cut,
    damaged,
    edit_config,
    edit_group,
    edit_tensors,
    model_entry,
    second_group,
    set_dtype,
)
from tests.helpers import perplexity, same_codes

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
    "gptq, bits 0": (GPTQ, edit_config(bits=0), "does not fit config.json"),
    "gptq, bits -1": (GPTQ, edit_config(bits=-1), "does not fit"),
    "gptq, bits huge": (GPTQ, edit_config(bits=10**30), "does not fit"),
    "gptq, bits inf": (GPTQ, edit_config(bits=float("inf")), "does not fit config.json"),
    "gptq, bits list": (GPTQ, edit_config(bits=[4]), "does not fit config.json"),
    "gptq, dynamic list": (GPTQ, edit_config(dynamic=[1]), "does not fit config.json"),
    "gptq, group huge": (GPTQ, edit_config(group_size=10**30), "does not fit|groups of"),
    "gptq, bits null": (GPTQ, edit_config(bits=None), "does not fit config.json"),
    "gptq, group null": (GPTQ, edit_config(group_size=None), "does not fit config.json"),
    "gptq, unknown": (GPTQ, edit_config(quant_method="awq"), "quantized by awq, which is not read; known: gptq"),
    "gptq, planar": (GPTQ, edit_config(**both("gptq_p")), "quantized by gptq .gptq_p., which is not read"),
    "gptq, version of others": (GPTQ, edit_config(**both("bitplane")), "quantized by gptq .bitplane., which is not read"),
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
    "ct, bits 0": (CT, edit_config(weights={"num_bits": 0}), "does not fit|zero|0 bits"),
    "ct, bits huge": (CT, edit_config(weights={"num_bits": 10**6}), "does not fit"),
    "ct, targets": (CT, edit_group(targets=None), "does not fit config.json"),
    "ct, groups list": (CT, edit_config(config_groups=[1]), "is not complete"),
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
    "bitplane, bits 0": (PLANES, edit_config(spec={"bits": 0}), "does not fit|do not fit"),
    "bitplane, group 0": (PLANES, edit_config(spec={"group_size": 0}), "does not fit config.json"),
    "bitplane, spec": (PLANES, edit_config(activations=None), "is not complete"),
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
    "ct, inputs": (CT, edit_group(input_activations={"num_bits": 8, "strategy": "token", "dynamic": "local"}), "not integers or fp8 per token"),
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
        with pytest.raises(InputError, match="layers.0.self_attn.q_proj.bias has no place in the model"):
            perplexity(path, tmp_path)
    else:
        assert perplexity(path, tmp_path)[0] == exported[1]["perplexity"]["text"]["quantized"]


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-32g.safetensors"])
def test_gptq_with_quantize_config_alone_is_read(name, exported, tmp_path):
    """As auto-gptq saved in 2023: no entry in config.json, weights under a name of their own."""
    base, results = exported

    def older(path):
        config = json.loads((path / "config.json").read_text())
        alone = config.pop("quantization_config")
        (path / "config.json").write_text(json.dumps(config))
        for key in ("quant_method", "format", "pack_dtype", "meta", "lm_head"):
            alone.pop(key)
        (path / "quantize_config.json").write_text(json.dumps(alone))
        (path / "results.json").unlink()
        (path / "model.safetensors").rename(path / name)

    path = damaged(base, tmp_path, older)
    assert perplexity(path, tmp_path)[0] == results["perplexity"]["text"]["quantized"]
    convert(path, "bitplane", tmp_path / "planes")
    assert perplexity(tmp_path / "planes", tmp_path)[0] == results["perplexity"]["text"]["quantized"]
    with pytest.raises(InputError, match="is quantized already .by gptq"):
        load_config(str(path), tmp_path / "cache", with_weights=False)


def test_settings_of_single_linears(exported, tmp_path):
    """What `dynamic` of others gives a linear is taken; without it, bits that disagree are refused."""
    every = {r"+:model\.layers\..*": {"bits": 4}}
    path = damaged(exported[0], tmp_path, edit_config(bits=8, dynamic=every))
    read = QuantizedCheckpoint(path)
    name = next(iter(read._weights))
    assert same_codes(read.quantized(name), QuantizedCheckpoint(exported[0] / "as-gptq_v2").quantized(name))


def test_shapes_come_from_headers(exported, monkeypatch):
    for kind in PACKED:
        checkpoint = QuantizedCheckpoint(exported[0] / f"as-{kind}")
        shapes = {name: tuple(checkpoint.read(name).shape) for name in checkpoint.names()}
        monkeypatch.setattr(checkpoint, "quantized", None)
        assert {name: checkpoint.shape(name) for name in checkpoint.names()} == shapes
