"""Products with packed weights against float64: every width, grouping, number of tokens, awkward shapes, both layouts."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quant.blocks.fake_quant import ActSpec, integer_inputs, quantize_activations
from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.grid import fit_grid
from quant.core.types import Outliers, QuantizedWeight, QuantSpec
from quant.kernels.matmul import choice, pack
from quant.kernels.matmul import cpu as packed_cpu
from quant.kernels.matmul import weight as packed
from quant.kernels.matmul.cpu_bytes import ByteTiles, rounded_up_to
from quant.kernels.matmul.cpu_fields import FieldTiles
from quant.kernels.matmul.pack import pack_weight, rounding_layout
from quant.kernels.matmul.weight import Expanded, PackedLinear, pack_small, side_by_side
from quant.solvers.gptq import gptq
from quant.solvers.spqr import spqr
from tests.helpers import ROOT, long, random_weight


def values(weight, sign=-1):
    """Codes to values one at a time in float64; sign=1: the sizes of the two terms of each instead."""
    grid = weight.grid
    if grid.minimum is not None:
        scale, minimum = (t.double()[:, grid.g_idx] for t in (grid.scale, grid.minimum))
        whole = weight.codes.double() * scale + (minimum if sign == -1 else minimum.abs())
        return whole if weight.outliers is None else whole.flatten().index_add(0, weight.outliers.index, weight.outliers.value.double()).view_as(whole)  # fmt: skip
    whole = (weight.codes.double() + sign * grid.zero.double()[:, grid.g_idx]) * grid.scale.double()[:, grid.g_idx]
    if weight.outliers is not None:
        whole.view(-1)[weight.outliers.index] += weight.outliers.value.double()
    return whole


def product(x, weight):
    """What is expected, and the size of its terms, which sets the rounding."""
    return x.double() @ values(weight).T, x.double().abs() @ values(weight, 1).abs().T


def distance(own, expected, size=None):
    return float((own.double() - expected).norm() / (expected if size is None else size).norm().clamp(min=1e-300))


def check(weight, tokens=1, limit=1e-6, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    n_in, own = weight.codes.shape[1], pack_weight(weight, device)
    x = torch.randn(tokens, n_in, generator=generator)
    result = own.matmul(x.to(device)).cpu()
    assert result.shape == (tokens, weight.codes.shape[0]) and result.dtype == torch.float32
    assert distance(result, *product(x, weight)) < limit
    q = torch.randint(-128, 128, (tokens, n_in), generator=generator).to(torch.int8)
    scale, offset = torch.rand(tokens, generator=generator) + 0.1, torch.randint(-9, 200, (tokens,)).float()
    exact = (q.double() + offset.double()[:, None]) * scale.double()[:, None]
    result = own.integer_matmul(q.to(device), scale.to(device), offset.to(device)).cpu()
    assert distance(result, *product(exact, weight)) < limit
    order = slice(None) if own.order is None else own.order.cpu()
    assert torch.equal(own.codes().cpu(), weight.codes[:, order])
    assert distance(own.dequantize().cpu(), values(weight)) < 1e-6  # measured 2e-8
    return own


LAYOUTS = {"fields": FieldTiles, "planes": packed_cpu.BitPlanes, "expanded": Expanded}


@pytest.fixture(params=["fields", *long("planes"), "expanded"])
def layout(request, monkeypatch):
    """The kernels of CPUs, and the plain reference that other devices get."""
    monkeypatch.setattr(pack, "layout_of", lambda device: LAYOUTS[request.param]())


@pytest.mark.parametrize("group", [-1, 12, 32])
def test_planes_in_short(group, monkeypatch):
    """The layout of CPUs with AVX-512; `make test-all` tries all of it anywhere."""
    monkeypatch.setattr(pack, "layout_of", lambda device: packed_cpu.BitPlanes())
    for tokens in (1, 60):
        check(random_weight(40, 96, QuantSpec(3, group)), tokens)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, *long(5, 6, 7)])  # each compiles kernels of its own
def test_every_width(bits, layout):
    for group in (-1, 32, 128):
        check(random_weight(48, 256, QuantSpec(bits, group)))
    check(random_weight(32, 64, QuantSpec(bits, 8)))  # nothing is filled up


@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 20])
@pytest.mark.parametrize("group", [-1, 4, 8, 16, 32, 64, 128])
def test_every_group_and_number_of_tokens(group, tokens, layout):
    check(random_weight(48, 256, QuantSpec(3, group)), tokens)


@pytest.mark.parametrize(("kind", "size"), [("nvfp4", 16), ("mxfp4", 32), ("iq4_nl", 32)])
def test_levels_that_are_not_evenly_spaced_become_codes_that_are(kind, size, layout):
    weight = random_weight(48, 256, QuantSpec(4, size, kind=kind))
    even = pack.in_integers(weight)
    assert torch.equal(even.dequantize(), weight.dequantize()) and even.spec.level_kind is None
    x = torch.randn(3, 256)
    assert torch.equal(pack_weight(weight).matmul(x), check(even, 3).matmul(x))


def test_fp8_is_refused():
    with pytest.raises(InputError, match="leave --real_quant out"):
        pack_weight(random_weight(8, 32, QuantSpec(8, kind="fp8")))


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("group", [-1, 4, 12, 32])
@pytest.mark.parametrize("bits", [2, 3, *long(8)])  # kernels of every width are compiled by the tests above
def test_real_minima(bits, group, tokens, layout):
    weight = random_weight(33, 96, QuantSpec(bits, group, kind="real"))
    own = check(weight, tokens)
    assert own.grid.minimum.dtype == torch.float16 and own.grid.zero == 0
    counted = (weight.storage_bits() - 33 * 96 * bits) / 8  # scales and minima, and the rows that fill up the tiles
    assert sum(t.nbytes for t in own.grid.tensors()) == counted / 33 * 64
    outliers = Outliers(torch.tensor([5, 700]), torch.tensor([1.0, -2.0]).half())
    check(replace(weight, outliers=outliers), tokens)
    check(random_weight(33, 96, QuantSpec(bits, group, kind="real"), 1e-8), tokens)  # minima in float32


def test_many_tokens_are_expanded(layout, monkeypatch):
    monkeypatch.setattr(packed_cpu, "EXPANDED", 96 * packed_cpu.TILE * 3)  # several stretches of tiles, the last short
    check(random_weight(300, 96, QuantSpec(3, 32)), 120)
    check(random_weight(300, 90, QuantSpec(3, -1)), 120)  # columns that fill up


@pytest.mark.parametrize("layout", [FieldTiles, *long(packed_cpu.BitPlanes)])
@pytest.mark.parametrize("group", [-1, 32, 12])
def test_both_ways_are_the_same_sums(group, layout, monkeypatch):
    taken = []
    for way in ("multiplied", "expanded"):
        kept = getattr(layout, way)
        monkeypatch.setattr(layout, way, lambda *given, kept=kept, way=way: taken.append(way) or kept(*given))
    monkeypatch.setattr(pack, "layout_of", lambda device: layout())
    for most, way in ((1024, "multiplied"), (8, "expanded")):
        taken.clear()
        monkeypatch.setattr(choice, "up_to", lambda layout, bits, most=most: most)
        for tokens in (9, 40):
            check(random_weight(40, 96, QuantSpec(3, group)), tokens)
        assert set(taken) == {way}


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (5, 7), (33, 257), (64, 8), (31, 4096)])
@pytest.mark.parametrize("bits", [3])
def test_shapes_that_nothing_divides(bits, shape, layout):
    check(random_weight(*shape, QuantSpec(bits)), 2)


@pytest.mark.parametrize("group", [3, 5, 6, 12, 20])
def test_groups_that_words_do_not_divide(group, layout):
    check(random_weight(40, 60, QuantSpec(3, group)), 3)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4, 1e6])
def test_scales_of_any_size(scale, layout):
    own = check(random_weight(16, 64, QuantSpec(4, 32), scale))
    assert own.grid.scale.dtype == (torch.float32 if scale in (1e-7, 1e6) else torch.float16)


def test_constant_rows_and_columns_without_input(layout):
    weight = torch.randn(8, 64)
    weight[0], weight[1], weight[:, 5] = 0, 0.25, 0
    grid = fit_grid(weight, QuantSpec(4, 32))
    check(QuantizedWeight(grid.quantize(weight), grid, QuantSpec(4, 32)))


def test_symmetric_grids_store_no_zero_point_and_five_levels_take_three_bits(layout):
    own = check(random_weight(16, 64, QuantSpec(4, 32, symmetric=True)))
    assert own.grid.zero == 8
    assert check(random_weight(16, 64, QuantSpec(2, levels=5))).bits == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [False, True])
def test_outliers_are_added(columns, dtype, layout):
    weight = random_weight(16, 64, QuantSpec(3, 32))
    index = torch.tensor([0, 5, 64 * 7 + 3, 16 * 64 - 1])
    if columns:
        index = (torch.arange(16)[:, None] * 64 + torch.tensor([2, 63])).flatten()
    value = torch.randn(index.numel(), generator=torch.Generator().manual_seed(0)).to(dtype)
    if dtype == torch.float32:
        value = value * 1e5  # float16 can hold none of them
    for tokens in (1, 50):
        own = check(replace(weight, outliers=Outliers(index, value, columns)), tokens)
    assert own.outliers.values.dtype == dtype and torch.equal(own.outliers.values.flatten(), value)


OUTLIER_MEMORY = """
import resource, torch
from quant.kernels.matmul.weight import SparseRows
n, tokens = 2048, 1024
index = torch.randperm(n * n, generator=torch.Generator().manual_seed(0))[: n * n // 100].sort().values
rows = torch.nn.functional.pad(torch.bincount(index // n, minlength=n).cumsum(0), (1, 0)).int()
sparse, x = SparseRows(rows, (index % n).short(), torch.ones(index.numel()).half()), torch.randn(tokens, n)
sparse.matmul(x[:1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = sparse.matmul(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - y.nbytes)
"""


def test_memory_of_products_with_outliers_does_not_grow_with_the_tokens():
    """1% of a 2048x2048 weight and 1024 tokens: 172 MB for one copy of all products."""
    command = [sys.executable, "-c", OUTLIER_MEMORY]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 3 * packed.PRODUCTS


@pytest.mark.parametrize("tokens", [1, 3, 7, 8])
def test_products_with_outliers_are_the_same_in_stretches(tokens, monkeypatch):
    index = torch.tensor([0, 5, 64 * 7 + 3, 64 * 7 + 9, 16 * 64 - 1])
    sparse = pack._pack_outliers(Outliers(index, torch.randn(5).half()), 16, 64)
    x = torch.randn(tokens, 64)
    whole = sparse.matmul(x)
    for bytes_held in (1, 4 * 5 * 3):  # one token at a time, three
        monkeypatch.setattr(packed, "PRODUCTS", bytes_held)
        assert torch.equal(sparse.matmul(x), whole)
    assert distance(whole, x.double() @ sparse.add_to(torch.zeros(16, 64)).double().T) < 1e-6  # measured 6e-8


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_library_adds_the_same_outliers(dtype, tokens, monkeypatch, recwarn):
    """What CUDA takes, on a CPU; the last columns, rows without outliers, and no outliers at all."""
    for index in (torch.tensor([3, 9, 64 * 2, 64 * 2 + 63, 64 * 15 + 1]), torch.empty(0, dtype=torch.long)):
        sparse = pack._pack_outliers(Outliers(index, torch.randn(len(index)).to(dtype)), 16, 64)
        x = torch.randn(tokens, 64)
        with monkeypatch.context() as patch:
            own = sparse.matmul(x)
            patch.setattr(packed, "_by_library", lambda x: True)
            patch.setattr(torch, "segment_reduce", None)
            torch.testing.assert_close(sparse.matmul(x), own, rtol=1e-6, atol=1e-6)
    assert not [warning for warning in recwarn if "CSR" in str(warning.message)]


def test_sparse_products_of_the_library_are_for_cuda_without_a_promise_of_order():
    with FakeTensorMode():
        on_cuda, on_cpu = torch.empty(1, 4, device="cuda"), torch.empty(1, 4)
    assert packed._by_library(on_cuda) and not packed._by_library(on_cpu)
    torch.use_deterministic_algorithms(True)
    try:
        assert not packed._by_library(on_cuda)
    finally:
        torch.use_deterministic_algorithms(False)


def test_outliers_behind_column_32767_keep_their_places():
    weight = random_weight(2, 65536, QuantSpec(1))
    weight = replace(
        weight, outliers=Outliers(torch.tensor([40000, 65535, 65536 + 65535]), torch.tensor([30.0, -40, 50]).half())
    )
    check(weight)


def test_act_order(layout):
    stats = GramStats(64)
    stats.update(torch.randn(256, 64) * torch.linspace(0.1, 3, 64))
    weight = gptq(torch.randn(24, 64), stats, QuantSpec(4, 16), act_order=True)
    assert not weight.has_plain_groups()
    check(weight, 2)


@pytest.mark.parametrize("n_out", [16, 40])
def test_scales_in_few_bits_stay_in_few_bits(n_out, layout):
    stats = GramStats(64)
    stats.update(torch.randn(256, 64))
    weight = spqr(torch.randn(n_out, 64), stats, QuantSpec(3, 16), outlier=0.3)
    assert weight.grid.bilevel is not None and weight.outliers is not None
    own = check(weight, 2)
    assert own.grid.codes.width == 4 and own.grid.codes.data.shape == (2, -(-n_out // 32) * 32)


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton's kernels run: on the GPU, or interpreted."""
    pytest.importorskip("triton", reason="requirements-dev.txt brings it")
    if torch.cuda.is_available():
        return "cuda"
    from quant.kernels.matmul.cuda import Fields

    assert os.environ["TRITON_INTERPRET"] == "1"
    monkeypatch.setattr(pack, "layout_of", lambda device: Fields())
    return "cpu"


@pytest.mark.parametrize("bits", range(1, 9))
def test_triton_every_width(bits, triton_device):
    for tokens in (1, 5):
        check(random_weight(40, 128, QuantSpec(bits, 64)), tokens, device=triton_device)


@pytest.mark.parametrize("group", [-1, 4, 128, *long(12, 16)])
def test_triton_every_group(group, triton_device):
    n_in = {4: 16, 12: 48}.get(group, 256)
    for tokens in (1, 2 if group in (4, 12) else 17):
        check(random_weight(70, n_in, QuantSpec(3, group, symmetric=group == 16)), tokens, device=triton_device)


@pytest.mark.parametrize("bits", [3, *long(1, 4, 7, 8)])
def test_triton_one_token_in_shares_of_the_columns(bits, triton_device, monkeypatch):
    """More programs than rows fill: sums of the shares, with several groups a program and with one, words and rows ragged."""
    from quant.kernels.matmul import cuda

    monkeypatch.setattr(cuda, "WORDS", 4)
    for group in (32, -1):
        for symmetric in (False, True):
            check(random_weight(37, 160, QuantSpec(bits, group, symmetric)), device=triton_device)


def test_triton_takes_all_tokens_of_narrow_groups_at_once(triton_device, monkeypatch):
    from quant.kernels.matmul import cuda

    grids, launch = [], type(cuda._narrow_groups).__getitem__
    monkeypatch.setattr(
        type(cuda._narrow_groups), "__getitem__", lambda self, grid: grids.append(grid) or launch(self, grid)
    )
    weight = random_weight(20, 24, QuantSpec(3, 4))
    packed_, x = pack_weight(weight, triton_device), torch.randn(3, 24)
    assert distance(packed_.matmul(x.to(triton_device)).cpu(), *product(x, weight)) < 1e-6
    assert grids == [(2, 3)], "two tiles of rows, three tokens"


def test_triton_outliers_order_and_two_level_scales(triton_device):
    stats = GramStats(64)
    stats.update(torch.randn(256, 64) * torch.linspace(0.1, 3, 64))
    w = torch.randn(24, 64)
    check(gptq(w, stats, QuantSpec(4, 16), act_order=True), 2, device=triton_device)
    check(spqr(w, stats, QuantSpec(3, 16), outlier=0.3), 2, device=triton_device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_takes_half_precision(dtype, triton_device):
    if dtype == torch.bfloat16 and triton_device == "cpu":
        pytest.skip("Triton's interpreter does not compute in bfloat16")
    weight = random_weight(40, 128, QuantSpec(8, 64))
    x = torch.randn(5, 128).to(dtype)
    result = pack_weight(weight, triton_device).matmul(x.to(triton_device)).cpu()
    # Measured 3e-9
    assert distance(result, *product(x, weight)) < 1e-6, "codes less zero points are exact in half precision"


def test_without_triton_a_warning_says_what_is_used(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "quant.kernels.matmul.cuda", None)
    pack.layout_of.cache_clear()
    assert isinstance(pack.layout_of(torch.device("cuda")), Expanded)
    assert "a byte a code" in caplog.text
    pack.layout_of.cache_clear()


@pytest.mark.parametrize("bits", range(1, 9))
def test_small_integers(bits):
    given = torch.randint(0, 2**bits, (5, 32))
    small = pack_small(given, bits)
    assert torch.equal(small.expand().long(), given)
    assert small.data.numel() == -(-5 * small.width // 8) * 32


@pytest.mark.parametrize(("bits", "group"), [(4, -1), (4, 128), (3, 128), (2, 64), (8, -1), (1, 32)])
def test_memory_is_what_is_counted(bits, group):
    weight = random_weight(256, 1024, QuantSpec(bits, group))
    assert pack_weight(weight).nbytes() == pytest.approx(weight.storage_bits() / 8, rel=0.03)


def test_memory_of_outliers_and_two_level_scales():
    stats = GramStats(1024)
    stats.update(torch.randn(2048, 1024))
    weight = spqr(torch.randn(256, 1024), stats, QuantSpec(4, 16), outlier=0.3)
    assert pack_weight(weight).nbytes() == pytest.approx(weight.storage_bits() / 8, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("level", ["avx2", "none"])
def test_every_instruction_set_gives_the_same_products(level, tmp_path):
    """Numba compiles for a lesser CPU in a process of its own; the integer products need AVX-512 and fall back. All other
    tests here are of this CPU's own."""
    levels = ("none", "avx2", "avx512")
    if levels.index(level) >= levels.index(packed_cpu.vector_level()):
        pytest.skip(f"this CPU has {packed_cpu.vector_level()}")
    script = """
import torch
from quant.kernels.matmul import cpu as packed_cpu
from tests.quant.kernels.test_matmul import check
from tests.helpers import random_weight
from quant.core.types import QuantSpec
from quant.kernels.matmul import pack
from quant.kernels.matmul.cpu_fields import FieldTiles
print(packed_cpu.vector_level(), packed_cpu.has_byte_products())
for layout in (packed_cpu.BitPlanes, FieldTiles):
    pack.layout_of = lambda device: layout()
    for tokens in (1, 5, 60):
        check(random_weight(40, 96, QuantSpec(3, 16)), tokens)
"""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    if level == "avx2":
        env |= {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+sse4.2"}
    elif level == "none":
        env |= {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse2"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0] == level


@pytest.mark.parametrize(
    "spec", [ActSpec(8, 16), ActSpec(4, 16), ActSpec(8, 16, symmetric=True), ActSpec(6, 16, "per_tensor")]
)
def test_integer_inputs_are_the_quantized_ones(spec):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 3
    x[2] = 0
    codes, scale, offset = integer_inputs(x, spec)
    expected = quantize_activations(x, spec.bits, whole=spec.method != "per_token", symmetric=spec.symmetric)
    assert codes.dtype == torch.int8
    assert torch.allclose((codes.float() + offset[:, None]) * scale[:, None], expected, rtol=1e-6, atol=1e-7)


def test_a_linear_keeps_shape_and_dtype():
    weight = random_weight(16, 64, QuantSpec(4, 32))
    linear = PackedLinear(pack_weight(weight), torch.arange(16.0))
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    out = linear(x)
    assert out.shape == (2, 3, 16) and out.dtype == torch.bfloat16
    expected = x.view(6, 64).double() @ values(weight).T + torch.arange(16.0)
    assert distance(out.view(6, 16), expected) < 5e-3  # measured 1.5e-3


def rounded_inputs(x):
    """What bytes stand for: a scale for 32 inputs, one at a time in float64."""
    out = x.double().clone()
    for row in out:
        for first in range(0, len(row), 32):
            block = row[first : first + 32]
            scale = float(block.abs().max()) / 127
            block.copy_(torch.tensor([round(float(v) / scale) * scale if scale else 0.0 for v in block]))
    return out


@pytest.mark.parametrize("bits", [2, 4, 8, *long(1, 3, 5, 6, 7)])  # each compiles a kernel of its own
@pytest.mark.parametrize("group", [-1, 32, 64])
def test_products_that_round_inputs_to_bytes(bits, group):
    weight = random_weight(40, 192, QuantSpec(bits, group))
    own = pack_weight(weight, layout=rounding_layout(torch.device("cpu")))
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    x[0, :32], x[1, 32:64], x[2, 5] = 0, -1.0, 1e6  # of zeros, all alike, and one that hides the others
    x = torch.cat([x, torch.randn(6, 192, generator=torch.Generator().manual_seed(2))])
    for n in (1, 2, 3, 4, 9):  # one by one, and four at a time
        expected, size = product(rounded_inputs(x[:n]) if n <= rounded_up_to(bits) else x[:n], weight)
        assert distance(own.matmul(x[:n]), expected, size) < 1e-6
    assert distance(own.matmul(x[:2]), *product(x[:2], weight)) > 1e-5, "not as they are"
    if rounded_up_to(bits) < 1000:
        many = torch.randn(rounded_up_to(bits) + 1, 192)
        assert torch.equal(own.matmul(many), replace(own, layout=FieldTiles()).matmul(many))


@pytest.mark.parametrize("code", ["largest", "smallest"])
def test_sums_of_bytes_fit_where_all_are_largest(code):
    for bits in (4, 8):
        spec = QuantSpec(bits, 32)
        weight = random_weight(32, 64, spec)
        weight = replace(weight, codes=torch.full_like(weight.codes, spec.qmax if code == "largest" else 0))
        own = pack_weight(weight, layout=rounding_layout(torch.device("cpu")))
        for sign in (1.0, -1.0):
            x = torch.full((1, 64), sign)
            assert distance(own.matmul(x), *product(x, weight)) < 1e-6


@pytest.mark.parametrize("kind", ["real", "groups of 12", "two levels of scales"])
def test_bytes_and_other_grids(kind):
    weight = random_weight(33, 96, QuantSpec(2, 12 if kind == "groups of 12" else 32, kind="real" if kind == "real" else "integer"))  # fmt: skip
    if kind == "two levels of scales":
        stats = GramStats(96)
        stats.update(torch.randn(200, 96))
        weight = spqr(torch.randn(33, 96), stats, QuantSpec(2, 32))
    own, x = pack_weight(weight, layout=rounding_layout(torch.device("cpu"))), torch.randn(2, 96)
    expected, size = product(rounded_inputs(x) if kind == "real" else x, weight)
    # The minima are multiplied by inputs as they are.
    assert distance(own.matmul(x), expected, size) < (5e-3 if kind == "real" else 1e-6)


def test_bytes_need_their_instructions(monkeypatch):
    with pytest.raises(InputError, match="--round-inputs"):
        rounding_layout(torch.device("cuda"))
    monkeypatch.setattr(ByteTiles, "runs_here", lambda: False)
    with pytest.raises(InputError, match="AVX2"):
        rounding_layout(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["integer", "real", "symmetric"])
def test_weights_side_by_side_are_one_product(kind, layout, monkeypatch):
    spec = QuantSpec(4, 32, kind == "symmetric", kind="real" if kind == "real" else "integer")
    weights = [pack_weight(random_weight(n, 96, spec, seed=n)) for n in (40, 32, 7)]
    parts, x = side_by_side(weights), torch.randn(1, 2, 96)
    assert [part.n_out for part in parts] == [40, 32, 7]
    whole, calls = parts[0].beside.whole, []
    assert all(part.stored[0].data_ptr() >= whole.stored[0].data_ptr() for part in parts), "no codes twice"
    assert sum(part.nbytes() for part in parts) == sum(weight.nbytes() for weight in weights)
    multiply = type(whole).matmul
    monkeypatch.setattr(type(whole), "matmul", lambda self, x: calls.append(self) or multiply(self, x))
    biases = [None, torch.randn(32), None]
    linears = [PackedLinear(part, bias) for part, bias in zip(parts, biases, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1]):
        calls.clear()
        for i in order:
            assert torch.equal(linears[i](x), PackedLinear(weights[i], biases[i])(x))
        assert sum(call is whole for call in calls) == 1
        assert parts[0].beside.product is None, "kept for nobody"
    other = torch.randn(1, 1, 96)
    first, second = linears[0](x), linears[0](other)  # another tensor comes before all have taken theirs
    assert torch.equal(first, PackedLinear(weights[0])(x)) and torch.equal(second, PackedLinear(weights[0])(other))
    for part, weight in zip(parts, weights, strict=True):
        assert torch.equal(part.dequantize(), weight.dequantize())


def test_weights_that_lie_otherwise_stay_apart():
    base = QuantSpec(4, 32)
    one, outlying = random_weight(32, 64, base), random_weight(32, 64, base)
    outlying = replace(outlying, outliers=Outliers(torch.tensor([3]), torch.tensor([1.0]).half()))
    sorted_ = replace(one, grid=replace(one.grid, g_idx=one.grid.g_idx.flip(0)))
    others = [random_weight(32, 64, QuantSpec(*spec)) for spec in ((3, 32), (4, 64), (4, 32, True))]
    for other in [*others, random_weight(32, 128, base), outlying, sorted_]:
        pair = [pack_weight(one), pack_weight(other)]
        assert all(a is b for a, b in zip(side_by_side(pair), pair, strict=True))
    alone = [pack_weight(one)]
    assert side_by_side(alone)[0] is alone[0]
