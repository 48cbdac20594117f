"""Formats, linear by linear: what is written is what the solver said, what is read back is the same, and what cannot be
held is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from models.stored import Layout
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.grid import fit_grid, in_float16
from quant.core.names import FORMATS, LEVEL_GRIDS
from quant.core.types import Outliers, QuantizedWeight, QuantSpec, group_index
from quant.export import PACKED, refusal, write
from quant.export.float_tensors import FLOAT_FORMATS
from quant.export.formats import Content, Layers, StoredLinear
from quant.export.packing import pack, pack_planes, unpack, unpack_planes
from quant.solvers.gptq import gptq
from quant.solvers.quantease import quantease
from quant.solvers.rtn import rtn
from quant.solvers.spqr import spqr
from tests.helpers import random_weight, same_codes

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


def content_for(weight, **more):
    n_out, n_in = weight.codes.shape
    return Content(weight.spec, {"layer": (n_out, n_in)}, reordered=not weight.has_plain_groups(),
                   outliers=weight.outliers is not None or weight.grid.bilevel is not None, **more)  # fmt: skip


class Tensors(dict):
    """A container of tensors in memory."""

    def read(self, name):
        return self[name]

    def shape(self, name):
        return tuple(self[name].shape)


def round_trip(kind, weight, **more):
    content = content_for(weight, **more)
    assert PACKED[kind].refuses(content) is None
    tensors = {f"layer.{part}": t for part, t in PACKED[kind].encode(weight, content).items()}
    config = json.loads(json.dumps(PACKED[kind].config(content, LAYERS)))
    assert f"layer.{PACKED[kind].parts[0]}" in tensors
    linear = StoredLinear("layer", Tensors(tensors), config)
    assert PACKED[kind].shape(linear) == tuple(weight.codes.shape)
    return PACKED[kind].decode(linear).check(), tensors


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


LEVELS = [(kind, size) for kind in FLOAT_FORMATS for size in LEVEL_GRIDS[kind].groups]


@pytest.mark.parametrize("scale", [0.05, 1e-7, 300.0])
@pytest.mark.parametrize(("kind", "size"), LEVELS)
def test_floats_come_back_bit_for_bit_and_are_what_compressed_tensors_decodes(kind, size, scale):
    spec = QuantSpec(LEVEL_GRIDS[kind].bits, size, kind=kind)
    matrix = torch.randn(130, 256, generator=torch.Generator().manual_seed(0)) * scale
    weight = in_float16(rtn(matrix, None, spec), matrix).check()
    back, tensors = round_trip("compressed-tensors", weight)
    assert same_codes(weight, back) and torch.equal(weight.dequantize(), back.dequantize())
    assert back.spec == weight.spec and back.storage_bits() == weight.storage_bits()
    assert 8 * sum(t.nbytes for t in tensors.values()) == weight.storage_bits()
    config = PACKED["compressed-tensors"].config(content_for(weight), LAYERS)["config_groups"]["group_0"]
    scheme = QuantizationScheme.model_validate({k: v for k, v in config.items() if k != "format"})
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    state = {name.removeprefix("layer."): tensor for name, tensor in tensors.items()}
    theirs = compressor.decompress(state, scheme)["weight"].float()
    ours = weight.dequantize()
    assert torch.equal(
        theirs, ours
    )  # also of four bits, which it unpacks into bfloat16: a level and a scale have 6 digits


def test_other_units_are_not_rounded_again_and_tiny_weights_keep_legal_exponents():
    spec = QuantSpec(4, 16, kind="nvfp4")
    matrix = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight = in_float16(rtn(matrix, None, spec), matrix)
    foreign = replace(weight, grid=replace(weight.grid, scale=weight.grid.scale / 3))
    with pytest.raises(InputError, match="no power of two"):
        PACKED["compressed-tensors"].encode(foreign, content_for(foreign))
    tiny = in_float16(rtn(matrix * 1e-41, None, QuantSpec(4, 32, kind="mxfp4")), matrix * 1e-41).check()
    back, tensors = round_trip("compressed-tensors", tiny)
    assert same_codes(tiny, back) and bool((tensors["layer.weight_scale"] == 1).all())


@pytest.mark.parametrize("spoil", ["codes", "scales", "unit", "settings", "exponents"])
def test_damaged_floats_are_one_line(spoil):
    spec = QuantSpec(4, 32, kind="mxfp4") if spoil == "exponents" else QuantSpec(4, 16, kind="nvfp4")
    matrix = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight = in_float16(rtn(matrix, None, spec), matrix)
    content, form = content_for(weight), PACKED["compressed-tensors"]
    tensors = {f"layer.{part}": t for part, t in form.encode(weight, content).items()}
    config = form.config(content, LAYERS)
    if spoil == "codes":
        tensors["layer.weight_packed"] = tensors["layer.weight_packed"].int()
    elif spoil in ("scales", "exponents"):
        scale = tensors["layer.weight_scale"]
        tensors["layer.weight_scale"] = scale[:, :1] if spoil == "scales" else scale.float()
    elif spoil == "unit":
        tensors["layer.weight_global_scale"] = torch.zeros(1)
    else:
        config["config_groups"]["group_0"]["weights"]["group_size"] = 48
    with pytest.raises(InputError, match="layer") as caught:
        form.decode(StoredLinear("layer", Tensors(tensors), config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale", [0.05, 1e-8])
def test_real_minima_come_back_bit_for_bit(bits, group, scale):
    weight = random_weight(33, 96, QuantSpec(bits, group, kind="real"), scale)
    weight = replace(weight, outliers=Outliers(torch.tensor([5, 40]), torch.tensor([1.0, -2.0]).half()))
    back, tensors = round_trip("bitplane", weight)
    assert same_codes(weight, back) and torch.equal(weight.dequantize(), back.dequantize())
    assert back.spec == weight.spec and back.storage_bits() == weight.storage_bits()
    assert tensors["layer.minima"].dtype == (torch.float16 if scale == 0.05 else torch.float32)
    assert "layer.zeros" not in tensors
    for kind in ("gptq", "gptq_v2", "compressed-tensors"):
        with pytest.raises(InputError, match="of kind integer, and this linear has real|cannot hold these exactly"):
            PACKED[kind].encode(replace(weight, outliers=None), replace(content_for(weight), spec=replace(weight.spec, kind="integer")))  # fmt: skip


def test_a_checkpoint_whose_config_names_the_other_kind_is_refused():
    for written, named in (("real", "integer"), ("integer", "real")):
        weight = random_weight(8, 32, QuantSpec(3, kind=written))
        content = content_for(weight)
        tensors = {f"layer.{part}": t for part, t in PACKED["bitplane"].encode(weight, content).items()}
        config = PACKED["bitplane"].config(replace(content, spec=replace(weight.spec, kind=named)), LAYERS)
        with pytest.raises(InputError, match=f"asymmetric, of {named} kind"):
            PACKED["bitplane"].decode(StoredLinear("layer", Tensors(tensors), config))


@pytest.mark.parametrize("group", [-1, 32, 8])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("scale", [0.05, 1e-12, 1e9])
def test_fractional_zero_points_come_back_bit_for_bit(bits, group, scale):
    weight = random_weight(33, 96, QuantSpec(bits, group, kind="fractional"), scale)
    back, tensors = round_trip("bitplane", weight)
    assert same_codes(weight, back) and torch.equal(weight.dequantize(), back.dequantize())
    assert back.spec == weight.spec and back.storage_bits() == weight.storage_bits()
    short = scale == 0.05  # the others are out of float16's range
    assert ("layer.scale_zeros" in tensors) == short and ("layer.minima" in tensors) != short
    groups = 33 * (1 if group == -1 else 96 // group)
    assert weight.storage_bits() == 33 * 96 * bits + groups * (16 + bits if short else 64)
    stored = sum(t.numel() * t.element_size() * 8 for t in tensors.values())
    assert 0 <= stored - weight.storage_bits() < 32
    for kind in ("gptq", "gptq_v2", "compressed-tensors"):
        with pytest.raises(InputError, match="cannot hold these exactly|of kind integer"):
            PACKED[kind].encode(weight, replace(content_for(weight), spec=replace(weight.spec, kind="integer")))


def test_short_scales_that_are_cut_are_refused():
    weight = random_weight(33, 96, QuantSpec(2, kind="fractional"))
    content = content_for(weight)
    tensors = {f"layer.{part}": t for part, t in PACKED["bitplane"].encode(weight, content).items()}
    tensors["layer.scale_zeros"] = tensors["layer.scale_zeros"][:, :-1]
    with pytest.raises(InputError, match="layer: scale_zeros .* do not hold 33 numbers of 18 bits"):
        PACKED["bitplane"].decode(StoredLinear("layer", Tensors(tensors), PACKED["bitplane"].config(content, LAYERS)))


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
            with pytest.raises(InputError, match="float16 and cannot hold these exactly: use format bitplane"):
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


def test_same_codes_are_on_the_same_grid():
    weight = random_weight(32, 64, QuantSpec(4, 32))
    for other in (
        replace(weight, spec=QuantSpec(4, 32, symmetric=True)),
        replace(weight, spec=QuantSpec(5, 32)),
        replace(weight, spec=QuantSpec(4, 64)),
        replace(weight, grid=replace(weight.grid, qmax=14)),
    ):
        assert not same_codes(weight, other)
    assert same_codes(weight, replace(weight, spec=replace(weight.spec, range="mse"))), "no checkpoint tells the search"


def test_a_quantized_head_belongs_to_no_block():
    """In a checkpoint of a part of the blocks: named as quantized, and in no list of the blocks' linears."""
    layers = Layers(["model.layers.0.a", "lm_head"], ["model.layers.1.a"], "model.layers", 2)
    content = Content(QuantSpec(4, 32, True), {"a": (64, 64)}, whole=False)
    written = PACKED["gptq"].config(content, layers)
    assert written["lm_head"] is True and written["dynamic"] == {r"-:model\.layers\.(1)\..*": {}}
    assert written["modules_in_block_to_quantize"] == [["model.layers.0.a"]]


def test_a_zero_point_of_zero_is_refused_by_version_one():
    weight = random_weight(32, 64, QuantSpec(4))
    weight.grid.zero[3, 0] = 0
    with pytest.raises(InputError, match="cannot hold 0: use format gptq_v2"):
        PACKED["gptq"].encode(weight, content_for(weight))
    assert same_codes(weight, round_trip("gptq_v2", weight)[0])


def solved(solver, spec, factor=1.0, **options):
    torch.manual_seed(0)
    x = torch.randn(256, 64) * torch.linspace(0.2, 3, 64)
    stats = GramStats(64, torch.device("cpu"))
    stats.update(x)
    return solver(torch.randn(48, 64) * factor, stats, spec, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: solved(quantease, QuantSpec(3, 16), outlier=0.02),
        lambda: solved(quantease, QuantSpec(3), outlier=0.05, structure_outlier=True),
        lambda: solved(quantease, QuantSpec(8, 16), factor=1e-6, outlier=0.02),
        lambda: solved(quantease, QuantSpec(3), factor=1e6, outlier=0.05, structure_outlier=True),
        lambda: solved(spqr, QuantSpec(3, 16), factor=1e30, outlier=0.3),
        lambda: solved(spqr, QuantSpec(3, 16)),
        lambda: solved(gptq, QuantSpec(4, 16), act_order=True),
        lambda: solved(gptq, QuantSpec(2, levels=5)),
    ],
    ids=[
        "outliers",
        "outlier columns",
        "tiny outliers",
        "huge outlier columns",
        "huge spqr",
        "spqr",
        "act-order",
        "five levels",
    ],
)
def test_bitplane_holds_what_others_cannot(make):
    weight = make()
    back, tensors = round_trip("bitplane", weight)
    assert same_codes(weight, back)
    assert torch.equal(weight.dequantize(), back.dequantize())
    assert weight.outliers is None or back.outliers.value.dtype == weight.outliers.value.dtype
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
    "gptq, one bit": ("gptq", {"spec": QuantSpec(1)}, "holds 2, 3, 4 or 8 bits, not 1: use format compressed-tensors"),
    "gptq, shapes": ("gptq", {"shapes": {"a": (32, 100)}, "spec": QuantSpec(4)}, "multiples of 32, a is 32x100: use format compressed-tensors"),
    "gptq, outliers": ("gptq", {"outliers": True}, "cannot hold sparse outliers: use format bitplane"),
    "gptq, activations": ("gptq_v2", {"act": ActSpec(8)}, "weight-only"),
    "ct, act-order": ("compressed-tensors", {"reordered": True}, "use format gptq, or --group-aware"),
    "ct, W4A4": ("compressed-tensors", {"act": ActSpec(4)}, "symmetric 8-bit weights per row only"),
    "ct, keys": ("compressed-tensors", {"act": ActSpec(8, 8), "spec": QuantSpec(8, symmetric=True)}, "use --kvbits 16, or format bitplane"),
    "ct, groups": ("compressed-tensors", {"spec": QuantSpec(4, 96)}, "groups that divide the inputs, a has 128: use format gptq_v2"),
    "plain, matrices": ("dequantized", {"online": ("--use_ln_matrix",)}, "plain checkpoint cannot hold matrices behind norms"),
    "ct, matrices": ("compressed-tensors", {"online": ("--use_ln_matrix",)}, "cannot hold matrices behind norms or in front of linears: use format bitplane"),
    "gptq, real minima": ("gptq_v2", {"spec": QuantSpec(4, 32, kind="real")}, "cannot hold real minima (--grid real): use format bitplane"),
    "ct, fractional": ("compressed-tensors", {"spec": QuantSpec(4, kind="fractional")}, "cannot hold fractional ones (--grid fractional): use format bitplane"),
    "gptq, levels": ("gptq", {"spec": QuantSpec(4, 16, kind="nvfp4")}, "cannot hold the levels of --grid nvfp4: use format compressed-tensors"),
    "planes, levels": ("bitplane", {"spec": QuantSpec(8, kind="fp8")}, "cannot hold the levels of --grid fp8: use format compressed-tensors"),
    "ct, iq4_nl": ("compressed-tensors", {"spec": QuantSpec(4, 32, kind="iq4_nl")}, "cannot hold the levels of --grid iq4_nl: use format gguf"),
    "ct, nvfp4 inputs": ("compressed-tensors", {"spec": QuantSpec(4, 16, kind="nvfp4"), "act": ActSpec.on("nvfp4")}, "use format dequantized"),
    "ct, real minima": ("compressed-tensors", {"spec": QuantSpec(4, kind="real")}, "cannot hold real minima (--grid real): use format bitplane"),
    "bitplane, W16": ("bitplane", {"spec": None}, "use format dequantized"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_a_format_that_can(case):
    kind, changes, message = REFUSED[case]
    content = replace(Content(QuantSpec(4, 32), {"a": (64, 128)}), **changes)
    against = refusal(kind, content)
    assert against is not None and message in against
    named = against.split(" format ")[1].split()[0].strip(",")
    assert named in FORMATS and refusal(named, content) is None


def test_what_no_option_announced_is_refused_where_it_is_written():
    """A solver's answer that holds more than its options said."""
    plain, ordered = random_weight(64, 128, QuantSpec(4, 32)), solved(gptq, QuantSpec(4, 16), act_order=True)
    sparse = replace(plain, outliers=Outliers(torch.tensor([5]), torch.tensor([1.0]).half()))
    content, middle = Content(plain.spec, {}), replace(plain, spec=QuantSpec(4, 32, symmetric=True))
    for kind in ("gptq", "gptq_v2", "compressed-tensors"):
        for weight, said, asked in (
            (sparse, "cannot hold sparse outliers: use format bitplane", content),
            (ordered, "use format bitplane", replace(content, spec=ordered.spec)),
            (middle, "zero points of a symmetric grid must be 8", replace(content, spec=middle.spec)),
            (random_weight(64, 128, QuantSpec(3, 32)), "holds one number of bits, 4, and this linear has 3", content),
        ):
            with pytest.raises(InputError, match=said):
                PACKED[kind].encode(weight, asked)


@pytest.mark.parametrize("kind", PACKED)
def test_a_block_of_another_run_is_refused_where_it_is_written(kind):
    """Answers with legal hashes that are not what the manifest asked for."""
    content = Content(QuantSpec(4, 32), {"layer": (64, 128)})
    few = random_weight(64, 128, QuantSpec(4, 32))
    for weight, said in (
        (random_weight(64, 128, QuantSpec(4, 64)), "holds one grid, of group_size 32, and this linear has 64"),
        (replace(few, grid=replace(few.grid, qmax=9)), "of largest code 15, and this linear has 9"),
        (random_weight(64, 128, QuantSpec(4, 32, symmetric=True)), "of symmetric False, and this linear has True"),
        (
            random_weight(32, 128, QuantSpec(4, 32)),
            r"a.layer has codes of .32, 128., but the model's linear is .64, 128.",
        ),
    ):
        with pytest.raises(InputError, match=said):
            list(
                write.packed_entries([("a.layer.weight", weight)], kind, content, lambda name: torch.float16, Layout())
            )
    with pytest.raises(InputError, match="but the model's linear is None"):
        list(write.packed_entries([("a.other.weight", few)], kind, content, lambda name: torch.float16, Layout()))


def test_groups_that_do_not_divide_are_those_of_their_size():
    """96 inputs in groups of 64: 64 and 32, not twice 48."""
    assert group_index(96, 64).tolist() == [0] * 64 + [1] * 32
    weight = random_weight(32, 96, QuantSpec(4, 32))
    two = replace(weight.grid, scale=weight.grid.scale[:, :2].contiguous(), zero=weight.grid.zero[:, :2].contiguous(),
                  g_idx=group_index(96, 64))  # fmt: skip
    weight = replace(weight, grid=two, spec=QuantSpec(4, 64))
    content = Content(weight.spec, {"layer": (32, 96)})
    tensors = {f"layer.{part}": t for part, t in PACKED["gptq_v2"].encode(weight, content).items()}
    del tensors["layer.g_idx"]
    config = PACKED["gptq_v2"].config(content, LAYERS)
    assert same_codes(weight, PACKED["gptq_v2"].decode(StoredLinear("layer", Tensors(tensors), config)))


def test_rows_without_outliers():
    """Outliers alone, no grid trouble: a weight whose rows hold none at all."""
    weight = random_weight(8, 32, QuantSpec(2))
    weight = replace(weight, outliers=Outliers(torch.tensor([5, 40]), torch.tensor([1.0, -2.0]).half()))

    assert same_codes(weight, round_trip("bitplane", weight)[0])
