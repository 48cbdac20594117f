"""Checkpoint formats: what is written is what the solver said, what is read back is the same, and what cannot be held
is refused before work begins."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quant.core.actquant import ActSpec
from quant.core.errors import InputError
from quant.core.grid import fit_grid
from quant.core.run import RunConfig, Session
from quant.core.stats import LayerStats
from quant.core.types import Outliers, QuantizedWeight, QuantSpec
from quant.export import FORMATS, PACKED, write
from quant.export.convert import convert, same_codes
from quant.export.formats import Content, Layers
from quant.export.loadable import RUNTIMES, loadability, nearest, objections
from quant.export.packing import pack, pack_planes, unpack, unpack_planes
from quant.export.read import QuantizedCheckpoint
from quant.gptq import gptq
from quant.quantease import quantease
from quant.spqr import spqr

LAYERS = Layers(["layer"], ["lm_head"], "model.layers", 1)


def reference_words(row, bits):
    """A row as one big integer, cut into 32-bit words."""
    whole = sum(int(code) << (k * bits) for k, code in enumerate(row))
    count = -(-len(row) * bits // 32)
    return np.array([(whole >> (32 * w)) & 0xFFFFFFFF for w in range(count)], dtype=np.uint32).view(np.int32)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 96, 100])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_one_little_endian_stream(bits, n):
    codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8)
    words = pack(codes, bits)
    assert np.array_equal(words.numpy(), np.stack([reference_words(row, bits) for row in codes.tolist()]))
    assert torch.equal(unpack(words, bits, n), codes)
    assert torch.equal(unpack_planes(pack_planes(codes, bits), n), codes)


def random_weight(n_out, n_in, spec, scale=0.02):
    weight = torch.randn(n_out, n_in) * scale
    grid = fit_grid(weight, spec)
    return QuantizedWeight(grid.quantize(weight), grid, spec)


def content_for(weight, **more):
    n_out, n_in = weight.codes.shape
    return Content(weight.spec, {"layer": (n_out, n_in)}, reordered=not weight.has_plain_groups(),
                   outliers=weight.outliers is not None or weight.grid.bilevel is not None, **more)  # fmt: skip


def round_trip(kind, weight, **more):
    content = content_for(weight, **more)
    assert PACKED[kind].refuses(content) is None
    tensors = {f"layer.{part}": t for part, t in PACKED[kind].encode(weight, content).items()}
    config = json.loads(json.dumps(PACKED[kind].config(content, LAYERS)))
    assert PACKED[kind].linears(tensors, config) == ["layer"]
    return PACKED[kind].decode("layer", tensors.__getitem__, tensors, config).check(), tensors


@pytest.mark.parametrize("group", [-1, 32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", PACKED)
def test_round_trip_is_exact(kind, bits, symmetric, group):
    if symmetric and bits == 1:
        pytest.skip("a symmetric grid of one bit does not exist")
    weight = random_weight(96, 128, QuantSpec(bits, group, symmetric))
    if PACKED[kind].refuses(content_for(weight)):
        assert kind.startswith("gptq") and bits not in (2, 3, 4, 8)
        return
    back, _ = round_trip(kind, weight)
    assert same_codes(weight, back)
    assert torch.equal(weight.dequantize(), back.dequantize())
    assert (back.spec.bits, back.spec.group_size, back.spec.symmetric) == (bits, group, symmetric)
    assert back.storage_bits() == weight.storage_bits()


@pytest.mark.parametrize("shape", [(1, 32), (33, 100), (7, 1)])
@pytest.mark.parametrize("kind", ["compressed-tensors", "bitplane"])
def test_shapes_that_no_word_divides(kind, shape):
    weight = random_weight(*shape, QuantSpec(3))
    back, _ = round_trip(kind, weight)
    assert same_codes(weight, back)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_scales_that_float16_cannot_hold(scale):
    weight = random_weight(32, 64, QuantSpec(4), scale)
    back, _ = round_trip("bitplane", weight)
    assert same_codes(weight, back)
    if weight.grid.scale_bits == 32:
        for kind in ("gptq", "compressed-tensors"):
            with pytest.raises(InputError, match="float16 and cannot hold these exactly: use --format bitplane"):
                PACKED[kind].encode(weight, content_for(weight))


def test_constant_rows_and_zero_rows():
    rows = torch.cat([torch.zeros(16, 64), torch.full((8, 64), 0.3), torch.full((8, 64), -0.3)])
    grid = fit_grid(rows, QuantSpec(4, 32))
    weight = QuantizedWeight(grid.quantize(rows), grid, QuantSpec(4, 32))
    for kind in PACKED:
        assert same_codes(weight, round_trip(kind, weight)[0])


def test_known_words_of_gptq():
    """From files of the software that made the format: symmetric zero points of 4, 3, 2 and 8 bits."""
    words = {
        4: (0x77777777, 0x88888888),
        3: (0xDB6DB6DB, None),
        2: (0x55555555, 0xAAAAAAAA),
        8: (0x7F7F7F7F, 0x80808080),
    }
    for bits, expected in words.items():
        weight = random_weight(32, 32, QuantSpec(bits, symmetric=True))
        for kind, word in zip(("gptq", "gptq_v2"), expected, strict=True):
            zeros = PACKED[kind].encode(weight, content_for(weight))["qzeros"]
            assert word is None or int(zeros[0, 0]) & 0xFFFFFFFF == word


def test_gptq_is_compressed_tensors_transposed():
    weight = random_weight(64, 128, QuantSpec(3, 32, symmetric=True))
    theirs = PACKED["compressed-tensors"].encode(weight, content_for(weight))
    ours = PACKED["gptq"].encode(weight, content_for(weight))
    assert torch.equal(ours["qweight"].t(), theirs["weight_packed"])
    assert "weight_zero_point" not in theirs, "must be absent where the grid is symmetric"


def test_a_zero_point_of_zero_is_refused_by_version_one():
    weight = random_weight(32, 64, QuantSpec(4))
    weight.grid.zero[3, 0] = 0
    with pytest.raises(InputError, match="cannot hold 0: use --format gptq_v2"):
        PACKED["gptq"].encode(weight, content_for(weight))
    assert same_codes(weight, round_trip("gptq_v2", weight)[0])


def solved(solver, spec, **options):
    torch.manual_seed(0)
    x = torch.randn(256, 64) * torch.linspace(0.2, 3, 64)
    stats = LayerStats(64, torch.device("cpu"))
    stats.update(x)
    return solver(torch.randn(48, 64), stats, spec, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: solved(quantease, QuantSpec(3, 16), outlier=0.02),
        lambda: solved(quantease, QuantSpec(3), outlier=0.05, structure_outlier=True),
        lambda: solved(spqr, QuantSpec(3, 16)),
        lambda: solved(gptq, QuantSpec(4, 16), act_order=True),
        lambda: solved(gptq, QuantSpec(2, levels=5)),
    ],
    ids=["outliers", "outlier columns", "spqr", "act-order", "five levels"],
)
def test_bitplane_holds_what_others_cannot(make):
    weight = make()
    back, tensors = round_trip("bitplane", weight)
    assert same_codes(weight, back)
    assert torch.equal(weight.dequantize(), back.dequantize())
    stored = sum(t.numel() * t.itemsize * 8 for t in tensors.values())
    assert stored <= weight.storage_bits() * 1.2 + 4096, "the file holds little more than what is counted"


def test_act_order_is_held_by_gptq_too():
    weight = solved(gptq, QuantSpec(4, 16), act_order=True)
    wide = replace(
        weight,
        codes=weight.codes.repeat(2, 1),
        grid=replace(weight.grid, scale=weight.grid.scale.repeat(2, 1), zero=weight.grid.zero.repeat(2, 1)),
    )
    back, _ = round_trip("gptq", wide)
    assert same_codes(wide, back)
    assert PACKED["gptq"].config(content_for(wide), LAYERS)["desc_act"] is True


def test_five_levels_are_three_bits():
    weight = random_weight(32, 64, QuantSpec(2, levels=5))
    content = content_for(weight)
    assert PACKED["gptq"].config(content, LAYERS)["bits"] == 3
    back, _ = round_trip("compressed-tensors", weight)
    assert torch.equal(weight.dequantize(), back.dequantize())


def test_w8a8_is_int_quantized():
    weight = random_weight(32, 64, QuantSpec(8, symmetric=True))
    back, tensors = round_trip("compressed-tensors", weight, act=ActSpec(8))
    assert tensors["layer.weight"].dtype == torch.int8 and tensors["layer.weight_scale"].shape == (32, 1)
    assert torch.equal(weight.dequantize(), back.dequantize())


REFUSED = {
    "gptq, one bit": ("gptq", {"spec": QuantSpec(1)}, "holds 2, 3, 4 or 8 bits, not 1: use --format compressed-tensors"),
    "gptq, shapes": ("gptq", {"shapes": {"a": (32, 100)}}, "multiples of 32, a is 32x100: use --format compressed-tensors"),
    "gptq, outliers": ("gptq", {"outliers": True}, "cannot hold sparse outliers: use --format bitplane"),
    "gptq, activations": ("gptq_v2", {"act": ActSpec(8)}, "weight-only"),
    "ct, act-order": ("compressed-tensors", {"reordered": True}, "use --format gptq, or --group-aware"),
    "ct, W4A4": ("compressed-tensors", {"act": ActSpec(4)}, "symmetric 8-bit weights per row only: use --format bitplane"),
    "ct, matrices": ("compressed-tensors", {"online": True}, "cannot hold matrices behind norms: use --format bitplane"),
    "bitplane, W16": ("bitplane", {"spec": None}, "use --format dequantized"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_a_format_that_can(case):
    kind, changes, message = REFUSED[case]
    content = replace(Content(QuantSpec(4, 32), {"a": (64, 128)}), **changes)
    refusal = PACKED[kind].refuses(content)
    assert refusal is not None and message in refusal
    named = refusal.split("--format ")[1].split()[0].strip(",")
    assert named in FORMATS and (named == "dequantized" or PACKED[named].refuses(content) is None)


def test_loadability_and_the_nearest_choice():
    content = Content(QuantSpec(3, 128), {"a": (256, 256)})
    assert {runtime for runtime, _, _ in loadability("gptq_v2", content)} == set(RUNTIMES)
    (against,) = objections("vllm", "gptq_v2", content)
    assert against == "does not read gptq_v2"
    assert "symmetric" in " ".join(objections("gptqmodel", "gptq", content))
    for runtime in RUNTIMES:
        for kind in FORMATS:
            near = nearest(runtime, kind, content)
            words = near.split()
            flags = dict(zip(words, words[1:], strict=False))
            asked = replace(
                content, spec=QuantSpec(int(flags["--wbits"]), int(flags["--group-size"]), "--sym" in words)
            )
            assert objections(runtime, flags["--format"], asked) == []


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
def exported(tmp_path_factory):
    """A run of the demo model, saved as gptq_v2."""
    base = tmp_path_factory.mktemp("exported")
    config = demo_config(base, Path(__file__).parents[2] / "models/demo/llama", save=base / "saved", format="gptq_v2")
    results = Session(config).run(config)
    return base, results


def test_every_format_measures_what_the_run_measured(exported):
    base, results = exported
    expected = results["perplexity"]["text"]["quantized"]
    for kind in FORMATS:
        convert(base / "run", kind, base / f"as-{kind}")
        found, bits = perplexity(base / f"as-{kind}", base)
        assert found == expected, kind
        assert kind == "dequantized" or bits == pytest.approx(results["bits_per_weight"])
        config = (base / f"as-{kind}" / "config.json").read_text()
        assert str(base) not in config and "/tmp" not in config


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


def damaged(base, tmp_path, change):
    import shutil

    target = tmp_path / "damaged"
    shutil.copytree(base / "saved", target)
    change(target)
    return target


def edit_tensor(path, keep_hash=False):
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("qweight"))
    tensors[name] = tensors[name][:-1].contiguous() if keep_hash else tensors[name] + 1
    save_file(tensors, file, {"format": "pt"})
    if keep_hash:
        (path / "results.json").unlink()


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE = {
    "edited": (edit_tensor, "its hash differs"),
    "cut": (cut, "truncated"),
    "shape": (lambda p: edit_tensor(p, keep_hash=True), "does not fit"),
    "bits": (lambda p: edit_config(p, group_size=64), "but config.json says group_size 64"),
    "unknown": (lambda p: edit_config(p, quant_method="awq"), "quantized by awq, which is not read; known: gptq"),
    "planar": (lambda p: edit_config(p, checkpoint_format="gptq_p"), "quantized by gptq .gptq_p., which is not read"),
    "other": (lambda p: edit_config(p, quant_method="bitplane"), "says bitplane, but no tensor is quantized"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(case, exported, tmp_path):
    change, message = DAMAGE[case]
    path = damaged(exported[0], tmp_path, change)
    with pytest.raises(InputError, match=message) as error:
        perplexity(path, tmp_path)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_nothing(exported, tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        convert(exported[0] / "run", "gptq", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_is_not_quantized_again(exported, tmp_path):
    with pytest.raises(InputError, match="is quantized already"):
        Session(demo_config(tmp_path, exported[0] / "saved"))


def test_a_target_that_cannot_load_is_refused_before_work(tmp_path):
    model = Path(__file__).parents[2] / "models/demo/llama"
    config = demo_config(tmp_path, model, save=tmp_path / "out", format="gptq", target="vllm")
    session = Session(config)
    with pytest.raises(InputError, match="--target vllm: with --format gptq, it takes symmetric grids only"):
        session.run(config)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_activation_quantizers_come_back(tmp_path):
    model = Path(__file__).parents[2] / "models/demo/llama"
    config = replace(
        demo_config(tmp_path, model, save=tmp_path / "w8a8", format="compressed-tensors"),
        wbits=8, group_size=-1, symmetric=True, act=ActSpec(8),
    )  # fmt: skip
    expected = Session(config).run(config)["perplexity"]["text"]["quantized"]
    assert perplexity(tmp_path / "w8a8", tmp_path)[0] == expected
    checkpoint = QuantizedCheckpoint(tmp_path / "w8a8")
    assert checkpoint.act == ActSpec(8) and checkpoint.quantization["format"] == "int-quantized"


def test_part_of_a_model(tmp_path):
    model = Path(__file__).parents[2] / "models/demo/llama"
    config = demo_config(tmp_path, model, num_layers=2, save=tmp_path / "part", format="gptq_v2")
    expected = Session(config).run(config)["perplexity"]["text"]["quantized"]
    assert perplexity(tmp_path / "part", tmp_path)[0] == expected
    quantization = json.loads((tmp_path / "part/config.json").read_text())["quantization_config"]
    assert quantization["dynamic"] == {r"-:model\.layers\.(2|3)\..*": {}}
    convert(tmp_path / "run", "compressed-tensors", tmp_path / "ct")
    ignored = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored and "model.layers.3.mlp.up_proj" in ignored and len(ignored) == 1 + 2 * 7


def test_rows_without_outliers():
    """Outliers alone, no grid trouble: a weight whose rows hold none at all."""
    weight = random_weight(8, 32, QuantSpec(2))
    weight = replace(weight, outliers=Outliers(torch.tensor([5, 40]), torch.tensor([1.0, -2.0]).half()))

    assert same_codes(weight, round_trip("bitplane", weight)[0])
