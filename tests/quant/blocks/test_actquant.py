"""Activations on their grid, at the linears and in the products of attention, whoever computes them."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.load import load_model
from quant.blocks.fake_quant import ActSpec, quantize_activations, quantize_to_levels
from quant.blocks.instrument import AttentionProducts, instrument
from quant.blocks.stream import BlockStream
from quant.blocks.weights import BlockWeights
from quant.core.errors import InputError
from quant.core.levels import TABLES
from quant.core.names import ACT_GRIDS
from quant.kernels.rounding import FakeQuantize
from quant.learn.abq import symmetric_kl
from tests.conftest import CONFIGS, VOCABULARY

CPU = torch.device("cpu")
ONLY = {"bloom": "eager", "gemma2": "eager", "falcon rw": "sdpa"}  # implementations of transformers 5.23 that work


def by_hand(row, bits):
    """One token: scale and zero point from its minimum and maximum, every entry on its own."""
    low, high = min(row), max(row)
    scale = max((high - low) / (2**bits - 1), 1e-5)
    zero = round(-low / scale)
    return [(min(max(round(v / scale) + zero, 0), 2**bits - 1) - zero) * scale for v in row]


def nearest_even(value, magnitudes):
    """The level next to a number, of two that are equally near the one at an even place (the even mantissa)."""
    best = min(abs(abs(value) - level) for level in magnitudes)
    places = [place for place, level in enumerate(magnitudes) if abs(abs(value) - level) == best]
    chosen = magnitudes[next((place for place in places if place % 2 == 0), places[0])]
    return -chosen if value < 0 else chosen


def levels_by_hand(row, kind):
    """One token as floats of few bits, every entry on its own."""
    positive = [level for level in TABLES["fp8"] if level >= 0]
    e2m1 = [level for level in TABLES["nvfp4"] if level >= 0]
    largest = max(map(abs, row))
    if kind == "fp8":
        scale = np.float32(largest) / np.float32(448)
        return [float(np.float32(nearest_even(float(np.float32(v) / scale), positive)) * scale) for v in row]
    out, size = [], 16 if kind == "nvfp4" else 32
    for start in range(0, len(row), size):
        group = row[start : start + size]
        top = max(map(abs, group))
        if kind == "mxfp4":
            scale = np.float32(2.0 ** (math.floor(math.log2(top)) - 2))
        else:
            unit = np.float32(largest) / np.float32(6 * 448)
            scale = np.float32(nearest_even(float(np.float32(top) / np.float32(6) / unit), positive)) * unit
        out += [float(np.float32(nearest_even(float(np.float32(v) / scale), e2m1)) * scale) for v in group]
    return out


@pytest.mark.parametrize("n", [16, 64, 40, 5])
@pytest.mark.parametrize("kind", ACT_GRIDS)
def test_floats_of_few_bits_one_by_one(kind, n):
    x = torch.randn(6, n, generator=torch.Generator().manual_seed(n))
    x[0] *= 100
    x[1, 0], x[2, -1] = 300.0, -1e-3
    x[3] = torch.arange(n) * 0.25 + 0.25  # halves between levels
    expected = torch.tensor([levels_by_hand(row, kind) for row in x.tolist()])
    torch.testing.assert_close(quantize_to_levels(x, kind), expected, rtol=0, atol=0)
    assert not quantize_to_levels(torch.zeros(2, n), kind).any()
    leaf = x.clone().requires_grad_()
    quantize_to_levels(leaf, kind).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))
    assert quantize_to_levels(x.bfloat16(), kind).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ACT_GRIDS)
def test_the_inputs_of_linears_are_those_floats(kind):
    block = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 8))
    x = torch.randn(3, 48)
    inside = torch.nn.functional.linear(quantize_to_levels(x, kind), block[0].weight, block[0].bias)
    expected = torch.nn.functional.linear(quantize_to_levels(inside, kind), block[1].weight, block[1].bias)
    with instrument(block, BlockWeights(), ActSpec.on(kind)), torch.no_grad():
        assert torch.equal(block(x), expected)
    assert not torch.equal(block(x), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_tokens_one_by_one(bits):
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    x[0, 0] = 0.25  # a token without spread
    x[0, 1] = x[0, 1].abs() + 3  # zero is outside of the range
    x[1, 2, 3] = 1e4
    expected = torch.tensor([by_hand(row, bits) for row in x.view(-1, 16).tolist()], dtype=x.dtype).view_as(x)
    torch.testing.assert_close(quantize_activations(x, bits), expected, rtol=1e-12, atol=1e-12)  # measured 0
    whole = torch.tensor(by_hand(x.flatten().tolist(), bits), dtype=x.dtype).view_as(x)
    torch.testing.assert_close(quantize_activations(x, bits, whole=True), whole, rtol=1e-12, atol=1e-12)  # measured 0
    span = torch.tensor([float(x.min()), float(x.max())])
    # Measured 6e-12, relative: the ends of the span are float32
    torch.testing.assert_close(quantize_activations(x, bits, span=span), whole, rtol=1e-9, atol=1e-6)
    assert quantize_activations(x, 16) is x


def test_gradients_are_those_of_the_straight_through_estimate():
    """Against autograd through (x.round() - x).detach() + x, in float64."""
    x = (2 * torch.randn(4, 32, dtype=torch.float64)).requires_grad_()
    scale = (0.3 + 0.1 * torch.rand(4, 1, dtype=torch.float64)).requires_grad_()
    zero, upstream = torch.full((4, 1), 3.0, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)

    def plain(x, scale):
        ratio = x / scale
        codes = ((torch.round(ratio) - ratio).detach() + ratio + zero).clamp(0, 7)
        return (codes - zero) * scale

    expected = torch.autograd.grad((plain(x, scale) * upstream).sum(), (x, scale))
    out = FakeQuantize.apply(x, scale, zero, 7)
    torch.testing.assert_close(out, plain(x, scale))
    for a, b in zip(torch.autograd.grad((out * upstream).sum(), (x, scale)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # measured 4e-16
    # Measured 0.56
    assert bool((out == out.max()).any()) and float(expected[0].eq(0).double().mean()) > 0.05, "some are clamped"


class Watched:
    """Block 0 of a tiny model under one of the library's attention implementations."""

    def __init__(self, path, tmp_path, implementation, dtype=torch.float64):
        implementation = ONLY.get(path.name.replace("-", " "), implementation)
        self.model = load_model(str(path), dtype=dtype, cache_dir=tmp_path, attn_implementation=implementation)
        torch.manual_seed(5)
        ids = torch.randint(1, VOCABULARY, (2, 12))
        self.stream = BlockStream(self.model, ids, device=CPU, batch=2).capture(self.model.outside_weights(CPU))
        self.weights = BlockWeights.read(self.model, 0, CPU)

    def __call__(self, spec=None, watch=None, weights=None):
        with instrument(self.model.blocks[0], weights or self.weights, spec, watch) as own, torch.no_grad():
            return self.stream.call(0, own, slice(0, 2), self.stream.arguments[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_seen_in_every_implementation(name, model_dir, tmp_path):
    """The same logits, and the same effect of quantized queries, keys and values, under eager and sdpa."""
    seen, answers = {}, {}
    for implementation in [ONLY[name]] if name in ONLY else ["eager", "sdpa"]:
        block = Watched(model_dir(name), tmp_path, implementation)
        logits: list[torch.Tensor] = []
        plain = block(watch=logits.append)
        assert len(logits) == 1, "one attention a block"
        seen[implementation] = logits[0].softmax(-1)
        answers[implementation] = [block(ActSpec(16, bits)) for bits in (3, 8)]
        moved = [float((out - plain).norm() / plain.norm()) for out in answers[implementation]]
        assert moved[0] > 5 * moved[1] > 0
        t = seen[implementation].shape[-1]
        assert float(seen[implementation].triu(1).abs().max()) < 1e-12, "causal"  # measured 0
        assert seen[implementation].shape[-2:] == (t, t)
    if name in ONLY:
        pytest.skip(f"transformers has {ONLY[name]} alone: nothing to compare with")
    torch.testing.assert_close(seen["eager"], seen["sdpa"], rtol=1e-5, atol=1e-6)  # measured 2e-16
    for a, b in zip(answers["eager"], answers["sdpa"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # measured 2e-7


def test_queries_are_quantized_where_keys_are():
    """8-bit inputs alone leave attention as it is, as runtimes of W8A8 checkpoints compute it."""
    q, k, v = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64)
    attention = torch.nn.functional.scaled_dot_product_attention
    plain = attention(q, k, v)
    with AttentionProducts(ActSpec(4, 16)):
        assert torch.equal(attention(q, k, v), plain)
        assert torch.equal(q @ k.mT, torch.matmul(q, k.mT))
    with AttentionProducts(ActSpec(4, 8)):
        output = attention(q, k, v)
    torch.testing.assert_close(
        output, attention(quantize_activations(q, 4), *(quantize_activations(x, 8) for x in (k, v))), rtol=0, atol=0
    )


def test_attention_that_does_not_work_is_refused(model_dir, tmp_path):
    """Falcon with ALiBi adds it twice under eager; BLOOM has eager only."""
    for name, implementation in (("falcon rw", "eager"), ("bloom", "sdpa"), ("gemma2", "sdpa")):
        with pytest.raises(InputError, match="sdpa|eager"):
            load_model(str(model_dir(name)), dtype=None, cache_dir=tmp_path, attn_implementation=implementation)
    ids = torch.randint(1, VOCABULARY, (1, 12))
    answers = []
    for implementation in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(
            model_dir("falcon rw"), dtype=torch.float64, attn_implementation=implementation
        )
        with torch.no_grad():
            answers.append(model.eval()(ids).logits)
    if float((answers[0] - answers[1]).abs().max()) < 1e-6:
        pytest.skip("mended in this transformers: no_eager in models/falcon.py may go")


@pytest.mark.parametrize("name", ["opt", "bloom", "falcon 40b", "llama gqa, tied"])
def test_every_linear_gets_quantized_inputs(name, model_dir, tmp_path):
    block, levels = Watched(model_dir(name), tmp_path, "sdpa"), {}
    names = [n for group in block.model.groups for n in group]

    def see(name):
        return lambda x: levels.__setitem__(name, max(row.unique().numel() for row in x.reshape(-1, x.shape[-1])))

    observe = {n: see(n) for n in names}
    block.stream.run(0, block.weights, observe=observe, act=ActSpec(2, 16))
    assert levels.keys() == set(names) and max(levels.values()) <= 4
    block.stream.run(0, block.weights, observe=observe)
    assert min(levels.values()) > 4
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in block.model.blocks[0].modules())


def test_static_ranges_are_used_and_are_no_parameters(model_dir, tmp_path):
    block = Watched(model_dir("llama"), tmp_path, "sdpa")
    wide, narrow = (
        BlockWeights(input_ranges={n: torch.tensor([-w, w]) for group in block.model.groups for n in group})
        for w in (9.0, 0.01)
    )
    spec, plain = ActSpec(8, 16, "static"), block()
    near, far = (block(spec, weights=block.weights | ranges) for ranges in (wide, narrow))
    assert float((near - plain).norm()) < 0.1 * float((far - plain).norm())  # measured 0.07


def test_symmetric_kl_is_the_sum_of_both():
    a, b = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    a, b = (t.masked_fill(hidden, torch.finfo(torch.float32).min) for t in (a, b))
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    expected = 0.0
    for i in range(5):
        for j in range(i + 1):
            expected += ((p[..., i, j] - q[..., i, j]) * (p[..., i, j] / q[..., i, j]).log()).sum()
    # Measured 6e-8
    torch.testing.assert_close(symmetric_kl(b, a).double(), expected / (2 * 3 * 5), rtol=1e-5, atol=1e-7)
    assert float(symmetric_kl(a, a)) == 0
    logits, plain = b.double().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for i in range(5):  # row by row over the keys that are seen
        log_p, log_q = (t[..., i, : i + 1].log_softmax(-1) for t in (a.double(), logits))
        plain = plain + ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / (2 * 3 * 5)
    leaf = b.clone().requires_grad_()
    symmetric_kl(leaf, a).backward()
    expected_gradient = torch.autograd.grad(plain, logits)[0]
    # Measured 6e-9 absolute, 1e-6 relative
    torch.testing.assert_close(leaf.grad.double(), expected_gradient, rtol=1e-4, atol=1e-7)
