"""Linears as MLX packs them: a slow reading of the format gives the solver's values, and what cannot be held is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models.load import load_model
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.core.types import Outliers, QuantSpec
from quant.export import refusal
from quant.export.formats import Content, OutsideMatrix
from quant.export.mlx import Mlx, group_of, mlx_tensors
from quant.run.convert import convert
from tests.helpers import config_for, perform, random_weight


def slow_values(tensors, group, bits):
    """float64 [out, in]: of every row one big integer, of which code k is the bits from k·bits on; scale·q + bias."""
    words = tensors["weight"].view(torch.int32).numpy().view(np.uint32)
    n_in = tensors["scales"].shape[1] * group
    rows = []
    for row, scales, biases in zip(words.tolist(), tensors["scales"].tolist(), tensors["biases"].tolist(), strict=True):
        whole = sum(word << (32 * place) for place, word in enumerate(row))
        codes = [(whole >> (k * bits)) & (2**bits - 1) for k in range(n_in)]
        rows.append([scales[k // group] * code + biases[k // group] for k, code in enumerate(codes)])
    return torch.tensor(rows, dtype=torch.float64)


def exact_values(weight):
    scale, base = (t.double() for t in weight.grid.expand())
    return weight.codes * scale + base if weight.grid.minimum is not None else (weight.codes - base) * scale


CASES = [  # bits, group, symmetric, kind, inputs, bits and group of the file
    *((bits, group, symmetric, kind, 256, {7: 8, 1: 2}.get(bits, bits), {-1: 128, 256: 128}.get(group, group))
      for bits in range(1, 9) for group in (32, 64, 128, 256, -1)
      for symmetric, kind in ((False, "integer"), (True, "integer"), (False, "real"), (False, "fractional"))
      if not (symmetric and bits == 1)),
    (3, -1, False, "integer", 96, 3, 32), (4, 96, True, "integer", 192, 4, 32), (4, 192, True, "integer", 192, 4, 64),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_are_exact(case):
    bits, group, symmetric, kind, n_in, file_bits, file_group = case
    weight = random_weight(3, n_in, QuantSpec(bits, group, symmetric, kind=kind))
    tensors, entry = Mlx().encode(weight)
    assert entry == {"group_size": file_group, "bits": file_bits}
    assert tensors["weight"].dtype == torch.uint32 and tensors["weight"].shape == (3, n_in * file_bits // 32)
    assert tensors["scales"].dtype == tensors["biases"].dtype
    if symmetric or kind == "real":
        assert tensors["scales"].dtype == torch.float16
    assert torch.equal(slow_values(tensors, file_group, file_bits), exact_values(weight))


def test_scales_are_float32_where_a_product_is_no_float16_number():
    weight = random_weight(4, 64, QuantSpec(4, 32))
    assert Mlx().encode(weight)[0]["biases"].dtype == torch.float32
    short = replace(weight, grid=replace(weight.grid, scale=torch.full_like(weight.grid.scale, 3 * 2.0**-9)))
    assert Mlx().encode(short)[0]["biases"].dtype == torch.float16
    tiny = random_weight(4, 64, QuantSpec(4, 32, True), scale=1e-9)
    tensors, entry = Mlx().encode(tiny)
    assert tensors["scales"].dtype == torch.float32
    assert torch.equal(slow_values(tensors, entry["group_size"], 4), exact_values(tiny))


@pytest.mark.parametrize("widths", [None, 3.5])
def test_a_run_becomes_a_checkpoint_of_mlx(widths, model_dir, text, tmp_path):
    """Everything is under the model's own names; config.json names bits and groups, also of linears that differ."""
    more = {"avg_bits": 4.4} if widths else {}
    config = config_for(model_dir("llama"), text, tmp_path, solver="rtn", wbits=4, group_size=32, symmetric=True, options={},
                        save=tmp_path / "saved", format="mlx", num_layers=2, **more)  # fmt: skip
    perform(config)
    declared = json.loads((tmp_path / "saved" / "config.json").read_text())
    settings, tensors = declared["quantization"], load_file(tmp_path / "saved" / "model.safetensors")
    assert "quantization_config" not in declared and settings["group_size"] == 32
    convert(tmp_path / "run", "bitplane", tmp_path / "planes", cache_dir=tmp_path / "cache")
    from quant.export.read import open_checkpoint

    planes = open_checkpoint(tmp_path / "planes")
    named = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    assert named == set(planes.linears)
    for linear in named:
        entry = settings.get(linear, settings)
        parts = {part: tensors[f"{linear}.{part}"] for part in ("weight", "scales", "biases")}
        values = slow_values(parts, entry["group_size"], entry["bits"])
        assert torch.equal(values, exact_values(planes.quantized(f"{linear}.weight")))
    assert (len({settings.get(linear, settings)["bits"] for linear in named}) > 1) == bool(widths)
    rest = {name for name in tensors if name.rpartition(".")[0] not in named}
    assert rest == {name for name, _ in load_model(str(model_dir("llama")), dtype=None, cache_dir=tmp_path / "cache").module.named_parameters()} - {f"{linear}.weight" for linear in named}  # fmt: skip
    with pytest.raises(InputError, match="MLX"):
        load_model(str(tmp_path / "saved"), dtype=None, cache_dir=tmp_path / "cache")
    convert(tmp_path / "planes", "mlx", tmp_path / "again", cache_dir=tmp_path / "cache")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in again)  # fmt: skip


REFUSED = {
    "small groups": ({"spec": QuantSpec(4, 16)}, "groups of 32, 64 or 128 columns"),
    "odd inputs": ({"shapes": {"a": (64, 100)}, "spec": QuantSpec(4)}, "on 100 inputs of a"),
    "order": ({"reordered": True}, "cannot hold groups in act-order"),
    "outliers": ({"outliers": True}, "sparse outliers"),
    "activations": ({"act": ActSpec(8)}, "weight-only"),
    "model": ({"model_type": "opt"}, "not opt"),
    "super-blocks, narrow, with a head": (
        {
            "spec": QuantSpec(3, 16, kind="q3_k"),
            "shapes": {"a": (64, 96)},
            "outside": {"h": OutsideMatrix((9, 96), 3, True, True)},
        },
        "cannot hold the super-blocks of --grid q3_k: use format gguf",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_hold_is_refused_before_work(case):
    changes, message = REFUSED[case]
    content = Content(QuantSpec(4, 32), {"a": (64, 128)}, model_type="llama")
    assert refusal("mlx", content) is None and refusal("mlx", replace(content, mixed=True)) is None
    against = refusal("mlx", replace(content, **changes))
    assert against is not None and message in against and "\n" not in against
    assert group_of(QuantSpec(4, 16), 128) is None and group_of(QuantSpec(4), 192) == 64


def test_an_answer_with_more_than_codes_in_order_is_refused():
    weight = random_weight(4, 64, QuantSpec(4, 32))
    sparse = replace(weight, outliers=Outliers(torch.tensor([5]), torch.tensor([1.0]).half()))
    turned = replace(weight, grid=replace(weight.grid, g_idx=weight.grid.g_idx.flip(0)))
    for answer in (sparse, turned):
        with pytest.raises(InputError, match="holds codes in order"):
            Mlx().encode(answer)


@pytest.mark.parametrize(("model_type", "prefix"), [("qwen3_moe", "mlp"), ("mixtral", "block_sparse_moe")])
def test_experts_of_a_block_are_one_tensor(model_type, prefix):
    base, solved = "model.layers.0.mlp", {}
    for expert in range(3):
        for proj in ("gate_proj", "up_proj"):
            solved[f"{base}.experts.{expert}.{proj}"] = random_weight(8, 64, QuantSpec(4, 32))
    shapes = {name.removeprefix("model.layers.0."): (8, 64) for name in solved}
    content = Content(QuantSpec(4, 32), shapes, model_type=model_type)
    router = torch.randn(3, 64)
    stream = [(f"{name}.weight", weight) for name, weight in solved.items()] + [(f"{base}.gate.weight", router)]
    settings = {}
    tensors = dict(mlx_tensors(stream, content, settings, experts=3))
    assert settings == {"group_size": 32, "bits": 4}
    assert torch.equal(tensors.pop(f"model.layers.0.{prefix}.gate.weight"), router)
    stacks = [f"model.layers.0.{prefix}.switch_mlp.{proj}" for proj in ("gate_proj", "up_proj")]
    assert tensors.keys() == {f"{stack}.{part}" for stack in stacks for part in ("weight", "scales", "biases")}
    for proj, stack in zip(("gate_proj", "up_proj"), stacks, strict=True):
        for expert in range(3):
            own, _ = Mlx().encode(solved[f"{base}.experts.{expert}.{proj}"])
            for part, tensor in own.items():
                there = tensors[f"{stack}.{part}"][expert]
                assert torch.equal(there.view(torch.int32) if part == "weight" else there.float(),
                                   tensor.view(torch.int32) if part == "weight" else tensor.float())  # fmt: skip


def test_experts_of_several_widths_are_refused():
    base = "model.layers.0.mlp.experts"
    stream = [
        (f"{base}.{e}.up_proj.weight", random_weight(8, 64, QuantSpec(bits, 32))) for e, bits in enumerate((4, 8))
    ]
    content = Content(QuantSpec(4, 32), {f"mlp.experts.{e}.up_proj": (8, 64) for e in range(2)}, model_type="olmoe")
    with pytest.raises(InputError, match="experts of one number of bits"):
        list(mlx_tensors(stream, content, {}, experts=2))
