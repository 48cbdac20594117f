"""Fake quantization and spans: compiled loops and torch's operations against autograd through the plain formula in float64."""

from __future__ import annotations

import numba
import pytest
import torch
from torch import Tensor

from quant.kernels.rounding import FakeQuantize, Span, cpu, reference

LEVELS = 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awkward() -> dict[str, Tensor]:
    """Rows of one number, of no whole register, that lie transposed or with holes, that are all equal, halves between two codes."""
    base = 3 * random(6, 10, 40)
    return {
        "rows": base[0],
        "heads": base[:, :, :13],
        "transposed": base.transpose(0, 2),
        "holes": base[1:5:2, :, ::3],
        "one number": base[:, :, :1],
        "one row": base.reshape(1, -1),
        "long": 3 * random(2, 3 * 4096 + 12, seed=6),
        "long, of a prime number": 3 * random(1, 8209, seed=7),
        "no rows": base[:0],
        "equal": torch.full((4, 9), 1.5),
        "zeros": torch.zeros(3, 17),
        "halves": torch.arange(-20, 20).view(2, 20) / 4,
        "expanded": base[:, :1].expand(6, 10, 40),
    }


def grid_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points [..., 1], of which some clamp codes on either side."""
    rows = x.shape[:-1]
    scale = 0.25 + torch.rand(*rows, 1, generator=torch.Generator().manual_seed(1))
    return scale, torch.randint(0, LEVELS, (*rows, 1), generator=torch.Generator().manual_seed(2)).float()


def plain(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The formula, with round as the identity of autograd."""
    ratio = x / scale
    codes = ((torch.round(ratio) - ratio).detach() + ratio + zero).clamp(0, LEVELS - 1)
    return (codes - zero) * scale


@pytest.mark.parametrize("name", awkward())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_the_straight_through_estimate(name, dtype):
    x = awkward()[name].to(dtype)
    scale, zero = (t.to(dtype) for t in grid_of(x))
    upstream = random(*x.shape, seed=3).to(dtype)

    def gradients(function, *given):
        leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in given[:2]]
        out = function(*leaves, *given[2:])
        return out.detach(), *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves)

    expected = gradients(plain, x.double(), scale.double(), zero.double())
    own = gradients(lambda x, s, z: FakeQuantize.apply(x, s, z, LEVELS - 1), x, scale, zero)
    exact = 1e-12 if dtype == torch.float64 else 2e-6
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=exact, atol=exact * x.shape[-1])


@pytest.mark.parametrize("name", awkward())
def test_loops_give_the_numbers_of_the_reference(name):
    x = awkward()[name]
    (scale, zero), upstream = grid_of(x), random(*x.shape, seed=3)
    assert torch.equal(cpu.quantize(x, scale, zero, 7), reference.quantize(x, scale, zero, 7))
    own, other = (m.quantize_gradient(x, scale, zero, 7, upstream) for m in (cpu, reference))
    assert torch.equal(own[0], other[0])
    torch.testing.assert_close(own[1], other[1], rtol=1e-5, atol=1e-5 * x.shape[-1])
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    ends = (random(*low.shape, seed=4), random(*low.shape, seed=5))
    torch.testing.assert_close(cpu.span_gradient(x, low, high, *ends), reference.span_gradient(x, low, high, *ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_scale_for_all_rows(dtype):
    """As of a range of the whole calibration data: its gradient is that of all rows together."""
    x = random(5, 33).to(dtype).requires_grad_()
    scale, zero = torch.full((1, 1), 0.4, dtype=dtype, requires_grad=True), torch.full((1, 1), 3.0, dtype=dtype)
    upstream = random(5, 33, seed=3).to(dtype)
    given = (x.double().detach().requires_grad_(), scale.double().detach().requires_grad_())
    expected = torch.autograd.grad((plain(*given, zero.double()) * upstream).sum(), given)
    out = FakeQuantize.apply(x, scale, zero, LEVELS - 1)
    for a, b in zip(torch.autograd.grad((out * upstream).sum(), (x, scale)), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", awkward())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spans_share_gradients_as_autograd_does(name, dtype):
    x = awkward()[name].to(dtype)
    weights = [random(*x.shape[:-1], 1, seed=s).to(dtype) for s in (4, 5)]
    leaf = x.double().clone().requires_grad_()
    expected = leaf.amin(-1, keepdim=True), leaf.amax(-1, keepdim=True)
    of_expected = torch.autograd.grad(sum((e * w).sum() for e, w in zip(expected, weights, strict=True)), leaf)
    own = x.clone().requires_grad_()
    ends = Span.apply(own)
    assert all(torch.equal(a.double(), b) for a, b in zip(ends, expected, strict=True))
    of_own = torch.autograd.grad(sum((e * w).sum() for e, w in zip(ends, weights, strict=True)), own)
    torch.testing.assert_close(of_own[0].double(), of_expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_so(strange):
    """A loss that is not finite takes an epoch back: nothing on the way may make a number of it."""
    x = random(4, 24)
    x[2, 7] = strange
    low, high = Span.apply(x)
    scale = (high - low) / 7
    own = FakeQuantize.apply(x, scale, torch.round(-low / scale), 7)
    expected = reference.quantize(x, scale, torch.round(-low / scale), 7)
    assert bool(own[2].isnan().any()) and not bool(own[3].isnan().any())
    fixed = torch.ones(4, 1), torch.full((4, 1), 3.0)
    pairs = ((own, expected), (FakeQuantize.apply(x, *fixed, 7), reference.quantize(x, *fixed, 7)))
    for pair in pairs:
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread alone")
def test_any_number_of_threads_gives_the_same_bits():
    x, upstream = random(301, 77), random(301, 77, seed=3)
    scale, zero = grid_of(x)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(cpu.quantize_gradient(x, scale, zero, 7, upstream))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_sums_of_a_long_row_are_exact():
    """A range of the whole calibration data has one row of millions of entries."""
    x, upstream = torch.full((1, 1 << 21), 9.0), torch.full((1, 1 << 21), 0.1)
    scale, zero = torch.ones(1, 1), torch.zeros(1, 1)
    _, own = cpu.quantize_gradient(x, scale, zero, 7, upstream)  # all clamped: the sum of 7 times the gradient
    torch.testing.assert_close(own.double(), (upstream.double() * 7).sum(-1, keepdim=True), rtol=1e-6, atol=0)
