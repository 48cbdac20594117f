"""The Gram matrix: blocks of a symmetric sum, any dtype, any order of reading and adding."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from quant.core.errors import InputError
from quant.core.gram import BLOCK, CHUNK, GramStats, _by_tensor_cores
from quant.core.types import QuantSpec
from quant.solvers import get_solver, solvers
from tests.references import weights


@pytest.mark.parametrize("n_in", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 70])
def test_gram_is_the_sum_over_tokens(n_in):
    generator = torch.Generator().manual_seed(n_in)
    parts = [torch.randn(2, 9, n_in, generator=generator), torch.randn(CHUNK + 3, n_in, generator=generator)]
    stats = GramStats(n_in)
    for part in parts:
        stats.update(part)
        torch.testing.assert_close(stats.gram, stats.gram.T, rtol=1e-5, atol=1e-3)  # read between two updates
    x = torch.cat([part.reshape(-1, n_in) for part in parts]).double()
    torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-5, atol=1e-2)
    assert stats.n_tokens == len(x) and torch.equal(stats.diagonal, stats.gram.diagonal())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sums_are_float32_whatever_comes_in(dtype):
    x = (300 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).to(dtype)  # squares overflow float16
    stats = GramStats(8)
    stats.update(x)
    torch.testing.assert_close(stats.gram, x.float().T @ x.float(), rtol=1e-5, atol=1e-2)


class Products(TorchDispatchMode):
    """Dtypes of the second factor and of the result of every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.seen.append(tuple(t.dtype for t in (args[-2] if args[-1] is torch.float32 else args[-1], result)))
        return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_take_halves_as_they_are(dtype, monkeypatch):
    """What torch is asked for, on tensors without numbers; where it is done is the next test's matter."""
    monkeypatch.setattr("quant.core.gram._by_tensor_cores", lambda rows: rows.dtype == dtype)
    n_in, halves, floats = BLOCK + 8, (dtype, torch.float32), (torch.float32, torch.float32)
    x, other = (torch.empty(2, CHUNK, n_in, dtype=dtype, device="meta") for _ in range(2))

    def products(*given):
        with Products() as mode:
            GramStats(n_in, "meta").update(*given)
        return mode.seen

    assert products(x) == [halves] * 2 * 2, "two parts of tokens in two blocks of columns"
    assert products(x, other) == [halves] * (2 * 2 + 2)
    assert products(x.float()) == [floats] * 2 * 2
    assert products(x, other.float()) == [halves] * 2 * 2 + [floats] * 2
    assert products(x, None, other.float()) == [halves] * 2 * 2 + [floats] * 2


def test_tensor_cores_are_those_of_a_cuda_device():
    with FakeTensorMode():
        for device, dtype, said in (
            ("cuda", torch.float16, True), ("cuda:1", torch.bfloat16, True), ("cuda", torch.float32, False), ("cpu", torch.float16, False)
        ):  # fmt: skip
            assert _by_tensor_cores(torch.empty(4, 4, dtype=dtype, device=device)) is said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_halves_are_those_of_their_float32_values(dtype, monkeypatch):
    """What tensor cores do, by a product in float64 in their place: parts and blocks come together as others do."""

    def product(left, right, out_dtype):
        assert left.dtype == right.dtype == dtype and out_dtype == torch.float32
        return (left.double() @ right.double()).float()

    x, other = torch.randn(2, CHUNK + 70, BLOCK + 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain, halves = GramStats(x.shape[1]), GramStats(x.shape[1])
    plain.update(x, other)
    monkeypatch.setattr("quant.core.gram._by_tensor_cores", lambda rows: True)
    monkeypatch.setattr(torch, "mm", product)
    halves.update(x, other)
    for ours, expected in ((halves.gram, plain.gram), (halves.cross, plain.cross)):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-2)  # measured 3e-3


def test_a_known_gram_matrix_is_copied():
    gram = torch.eye(3)
    stats = GramStats.from_gram(gram, 5)
    stats.update(torch.ones(1, 3))
    assert torch.equal(stats.gram, torch.eye(3) + 1) and torch.equal(gram, torch.eye(3)) and stats.n_tokens == 6


def test_impossible_gram_matrices_name_the_layer():
    with pytest.raises(InputError, match="block 3 q_proj: the Gram matrix has a negative diagonal"):
        GramStats.from_gram(torch.diag(torch.tensor([1.0, -1.0]))).check("block 3 q_proj")
    with pytest.raises(InputError, match="block 3 q_proj: .*not finite"):
        GramStats.from_gram(torch.diag(torch.tensor([1.0, torch.nan]))).check("block 3 q_proj")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 2), (BLOCK + 4, 1), (BLOCK, BLOCK + 7)], ids=str)
def test_the_whole_gram_matrix_is_checked(place, value):
    gram = torch.eye(BLOCK + 8)
    gram[place] = value
    with pytest.raises(InputError, match="block 3 q_proj: the Gram matrix is not finite off its diagonal"):
        GramStats.from_gram(gram).check("block 3 q_proj")


@pytest.mark.parametrize("method", solvers())
def test_no_solver_takes_a_gram_matrix_with_nan(method):
    gram = torch.eye(8)
    gram[1, 5] = gram[5, 1] = torch.nan
    with pytest.raises(InputError, match="not finite off its diagonal"):
        get_solver(method)(weights(3, 8), GramStats.from_gram(gram), QuantSpec(3))


def test_the_rank_is_that_of_the_tokens_where_they_are_few():
    generator = torch.Generator().manual_seed(0)
    for tokens, rank in ((5, 5), (63, 63), (64, 64), (65, 64), (400, 64)):
        stats = GramStats(64)
        stats.update(torch.randn(tokens, 64, generator=generator))
        assert stats.rank == rank
    assert GramStats.from_gram(torch.eye(64)).rank == 64, "an unknown number of tokens is no small one"


@pytest.mark.parametrize("n_in", [64, 1300])  # more columns than are looked at
def test_a_text_that_repeats_itself_has_a_low_rank(n_in):
    generator = torch.Generator().manual_seed(1)
    scales = torch.logspace(-3, 3, n_in)  # loud channels make no rank
    repeated, all_but_dead = torch.randn(9, n_in, generator=generator), torch.randn(2000, n_in, generator=generator)
    all_but_dead[:, : n_in - 8] = 0
    stats, dead = GramStats(n_in), GramStats(n_in)
    for _ in range(250):
        stats.update(repeated * scales)
    dead.update(all_but_dead)
    assert stats.n_tokens > n_in and stats.rank == 9
    assert dead.rank == n_in, "inputs that are never there are no direction that was missed"
    stats.update(torch.randn(2000, n_in, generator=generator) * scales)
    assert stats.rank == n_in, "it is counted again after an update"


def test_the_cross_term_is_the_sum_over_tokens_of_both_streams():
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(2, CHUNK, 20, generator=generator)  # more tokens than are cast at a time
    x = full + 0.1 * torch.randn(full.shape, generator=generator)
    stats = GramStats(20)
    stats.update(x[:1].half(), full[:1].half())
    stats.update(x[1], full[1])
    rows, originals = (torch.cat([t[:1].half().double(), t[1:].double()]).view(-1, 20) for t in (x, full))
    torch.testing.assert_close(stats.cross.double(), originals.T @ rows, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(stats.gram.double(), rows.T @ rows, rtol=1e-5, atol=1e-2)
    assert not torch.allclose(stats.cross, stats.cross.T), "the original model's inputs are its rows"
    with pytest.raises(ValueError, match="with every update, or with none"):
        stats.update(x)
    alone = GramStats(20)
    alone.update(x)
    with pytest.raises(ValueError, match="with every update, or with none"):
        alone.update(x, full)
    assert alone.cross is None


@pytest.mark.parametrize("n_in", [1, 20, BLOCK + 3])
def test_weighted_sums_are_those_of_a_loop_over_tokens(n_in):
    generator = torch.Generator().manual_seed(n_in)
    tokens = CHUNK + 5 if n_in == 20 else 37  # more than are cast at a time
    x, full = (torch.randn(tokens, n_in, generator=generator) for _ in range(2))
    lacking, s = torch.randn(tokens, 3, generator=generator), torch.rand(tokens, generator=generator) ** 4
    s[::3] = 0
    stats, half = GramStats(n_in), tokens // 2
    for part in (slice(0, half), slice(half, tokens)):
        stats.update(x[part], full[part], lacking[part], s[part])
    gram, cross, residual = torch.zeros(3, max(n_in, 3), n_in, dtype=torch.float64)
    for t in range(tokens):
        gram[:n_in] += s[t].double() * torch.outer(x[t].double(), x[t].double())
        cross[:n_in] += s[t].double() * torch.outer(full[t].double(), x[t].double())
        residual[:3] += s[t].double() * torch.outer(lacking[t].double(), x[t].double())
    torch.testing.assert_close(stats.gram.double(), gram[:n_in], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(stats.cross.double(), cross[:n_in], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(stats.residual.double(), residual[:3], rtol=1e-5, atol=1e-3)
    assert torch.equal(stats.gram, stats.gram.T) and stats.n_tokens == tokens


def test_weights_of_one_change_nothing_and_tokens_without_weight_bring_no_rank():
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(5))
    plain, ones, few = GramStats(24), GramStats(24), GramStats(24)
    plain.update(x)
    ones.update(x, weights=torch.ones(40))
    few.update(x, weights=(torch.arange(40) % 4 == 0).float())
    assert torch.equal(plain.gram, ones.gram) and plain.rank == ones.rank == 24
    assert (few.n_tokens, few.rank) == (40, 10)
    torch.testing.assert_close(few.gram, x[::4].T @ x[::4], rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="39 token weights for 40 tokens"):
        plain.update(x, weights=torch.ones(39))
    with pytest.raises(ValueError, match="all must be 0 or more"):
        plain.update(x, weights=-torch.ones(40))
