"""Mixtures of experts: every expert a module of plain linears, against the library's fused one; what checkpoints hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from models import family_of
from models.experts import Expert, Experts, routed, separated
from models.load import load_model
from models.stored import Layout, Stack
from quant.core.errors import InputError
from tests.conftest import MIXTURES, build

CPU = torch.device("cpu")
EXPERTS = "mlp.experts"


def opened(path: Path, cache: Path, dtype=torch.float32):
    return load_model(str(path), dtype=dtype, cache_dir=cache)


def tensors_of(model):
    """All parameters and buffers of a lazy model by their full names."""
    weights = dict(model.outside_weights(CPU))
    for index in range(len(model.blocks)):
        own = model.block_weights(index, CPU)
        weights |= {f"{model.family.blocks}.{index}.{name}": tensor for name, tensor in own.items()}
    return weights


def edited(source: Path, target: Path, change) -> Path:
    """A copy of a model whose tensors went through ``change``."""
    shutil.copytree(source, target)
    save_file(change(load_file(target / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", MIXTURES)
def test_separate_experts_are_the_librarys_in_float64(name, model_dir, tmp_path):
    """Logits of every position, from the files, against the fused model that they were saved from."""
    reference = build(name, torch.float64)
    reference.save_pretrained(tmp_path / "model")
    model = opened(tmp_path / "model", tmp_path, torch.float64)
    ids = torch.arange(48).view(2, 24) % 250
    with torch.no_grad():
        expected = reference(ids).logits
        logits = functional_call(model.module, tensors_of(model), (ids,), {"use_cache": False}).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_answer_as_the_fused_module_for_any_routing(name):
    """Also where some experts get nothing, one gets all, and tokens are few."""
    model = build(name, torch.float64)
    fused = model.get_submodule(f"model.layers.1.{EXPERTS}")
    experts = separated(fused)
    gate_up, down = fused.gate_up_proj.data, fused.down_proj.data
    weights = {}
    for e in range(4):
        gate, up = gate_up[e].chunk(2)
        weights |= {f"{e}.gate_proj.weight": gate, f"{e}.up_proj.weight": up, f"{e}.down_proj.weight": down[e]}
    for index in ([[0, 1], [1, 0], [3, 1]], [[2, 3]], [[1, 2]] * 5):
        index = torch.tensor(index)
        x = torch.randn(len(index), 32, dtype=torch.float64)
        share = torch.rand(len(index), 2, dtype=torch.float64)
        with torch.no_grad():
            answer, expected = functional_call(experts, weights, (x, index, share)), fused(x, index, share)
        torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-12)


def test_routed_names_every_pair_of_token_and_expert_once():
    index = torch.tensor([[3, 0], [0, 2], [3, 2], [5, 0]])  # 5: padding of some libraries, no expert
    found = {(e, int(t), int(k)) for e, tokens, places in routed(index, 4) for t, k in zip(tokens, places, strict=True)}
    assert found == {(int(index[t, k]), t, k) for t in range(4) for k in range(2) if index[t, k] < 4}
    assert [e for e, _, _ in routed(index, 4)] == [0, 2, 3]
    assert all((tokens.diff() > 0).all() for _, tokens, _ in routed(index, 4))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixtures_linears_are_named_in_order_and_gates_are_none(name, model_dir, tmp_path):
    """What is declared is what runs, in order of execution, with one input a group."""
    model = opened(model_dir(name), tmp_path)
    for index, block in enumerate(model.blocks):
        declared = [linear for group in model.groups_at(index) for linear in group]
        linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        assert sorted(linears) == sorted(declared) == sorted(model.linear_shapes(index))
        assert not any(linear in model.family.gates for linear in declared)
    inputs: dict[str, torch.Tensor] = {}

    def hook(linear):
        return lambda module, args: inputs.update({linear: args[0]})

    for linear in model.linear_shapes(len(model.blocks) - 1):
        model.blocks[-1].get_submodule(linear).register_forward_pre_hook(hook(linear))
    weights, ids = tensors_of(model), torch.arange(60).view(1, 60)
    with torch.no_grad():
        functional_call(model.module, weights, (ids,), {"use_cache": False})
    groups = model.groups_at(len(model.blocks) - 1)
    assert len(inputs) == sum(map(len, groups)), "60 tokens reach every expert"
    assert all(torch.equal(inputs[group[0]], inputs[linear]) for group in groups for linear in group)
    assert model.family.experts == EXPERTS and isinstance(model.blocks[-1].get_submodule(EXPERTS), Experts)
    assert isinstance(model.blocks[-1].get_submodule(f"{EXPERTS}.3"), Expert)


def test_a_mixture_is_read_as_the_hub_and_as_the_library_name_it(model_dir, tmp_path):
    """Mixtral's files have names of their own; files with stacked experts hold the same model."""
    source = model_dir("mixtral")
    stored = load_file(source / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in stored
    assert "model.layers.0.block_sparse_moe.gate.weight" in stored
    expected = tensors_of(opened(source, tmp_path))

    def stacked(tensors, name="block_sparse_moe", gate="w1", up="w3", down="w2"):
        inside = [key for key in tensors if ".experts." in key]
        kept = {key.replace(f".{name}.", ".mlp."): value for key, value in tensors.items() if key not in inside}
        for i in range(2):

            def all_of(part, i=i):
                return torch.stack([tensors[f"model.layers.{i}.{name}.experts.{e}.{part}.weight"] for e in range(4)])

            kept[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.cat([all_of(gate), all_of(up)], 1)
            kept[f"model.layers.{i}.mlp.experts.down_proj"] = all_of(down)
        return kept

    fused = opened(edited(source, tmp_path / "stacked", stacked), tmp_path)
    assert {n: t.shape for n, t in build("mixtral").state_dict().items()} == {
        n: t.shape for n, t in load_file(tmp_path / "stacked" / "model.safetensors").items()
    }
    read = tensors_of(fused)
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)

    def others(tensors):
        return stacked(tensors, "mlp", "gate_proj", "up_proj", "down_proj")

    qwen = opened(edited(model_dir("qwen3_moe"), tmp_path / "qwen", others), tmp_path)
    read, expected = tensors_of(qwen), tensors_of(opened(model_dir("qwen3_moe"), tmp_path))
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)


def test_a_layout_names_both_ways_and_turns():
    layout = family_of("mixtral").layout
    pairs = {
        "model.layers.7.block_sparse_moe.experts.12.w2.weight_packed": "model.layers.7.mlp.experts.12.down_proj.weight_packed",
        "model.layers.7.block_sparse_moe.gate.weight": "model.layers.7.mlp.gate.weight",
        "model.layers.7.self_attn.q_proj.weight": "model.layers.7.self_attn.q_proj.weight",
    }
    assert {stored: layout.in_module(stored) for stored in pairs} == pairs
    assert {stored: layout.on_disk(name) for stored, name in pairs.items()} == {stored: stored for stored in pairs}
    turned = Layout(transposed=("c_attn.weight",))
    name, value = turned.written("h.0.c_attn.weight", torch.arange(6).view(2, 3))
    assert name == "h.0.c_attn.weight" and torch.equal(value, torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert turned.written("h.0.c_attn.bias", torch.arange(3))[1].tolist() == [0, 1, 2]
    assert Layout().is_plain and not turned.is_plain and not Layout(stacked=(Stack("a", ("b",)),)).is_plain


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def test_what_is_wrong_with_a_mixture_is_said_in_one_line(model_dir, tmp_path):
    lacking = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    with pytest.raises(InputError, match=rf"lacks the tensor {lacking}; the checkpoint does not fit its config.json$"):
        opened(edited(model_dir("mixtral"), tmp_path / "lacking", without(lacking)), tmp_path)

    def more(tensors):
        copy = {k.replace(".experts.3.", ".experts.4."): v.clone() for k, v in tensors.items() if ".experts.3." in k}
        return tensors | copy

    with pytest.raises(InputError, match=r"experts\.4\.down_proj\.weight has no place in the model"):
        opened(edited(model_dir("qwen3_moe"), tmp_path / "more", more), tmp_path)

    def router(tensors):
        name = "model.layers.0.mlp.gate.weight"
        return tensors | {name: torch.cat([tensors[name], tensors[name][:1]])}

    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate\.weight has shape \(5, 32\) .*asks for \(4, 32\)$"):
        opened(edited(model_dir("qwen3_moe"), tmp_path / "router", router), tmp_path)
    other = shutil.copytree(model_dir("qwen3_moe"), tmp_path / "gpt_oss")
    declared = json.loads((other / "config.json").read_text()) | {"model_type": "gpt_oss"}
    (other / "config.json").write_text(json.dumps(declared))
    with pytest.raises(InputError, match=r"^gpt_oss models are not read: .*MXFP4.*another mixture of experts$"):
        opened(other, tmp_path)
