"""What is compiled ahead is what products take later."""

import pytest
import torch

from quant.core.types import QuantSpec
from quant.kernels.ahead import of_products, of_rounding
from quant.kernels.matmul import cpu_fields, pack
from quant.kernels.matmul.pack import pack_weight
from quant.kernels.rounding import FakeQuantize, Span, cpu
from tests.helpers import random_weight


@pytest.mark.parametrize("group", [-1, 32, 128])
def test_products_find_their_loops_compiled(group, monkeypatch):
    monkeypatch.setattr(pack, "layout_of", lambda device: cpu_fields.FieldTiles())
    of_products(4)
    loops = (cpu_fields._multiply, cpu_fields._expand, cpu_fields._group_sums)
    before = [len(loop.signatures) for loop in loops]
    packed = pack_weight(random_weight(40, 256, QuantSpec(4, group)))
    for tokens in (1, 2, 3, 20, 1200):
        packed.matmul(torch.randn(tokens, 256))
    assert [len(loop.signatures) for loop in loops] == before


def test_training_finds_its_loops_compiled():
    of_rounding()
    loops = (cpu._quantize, cpu._quantize_gradient, cpu._span_gradient)
    before = [len(loop.signatures) for loop in loops]
    x = torch.randn(3, 4, 24).transpose(0, 1).requires_grad_()
    low, high = Span.apply(x)
    FakeQuantize.apply(x, (high - low) / 7, torch.full_like(low, 3), 7).mean().backward()
    assert [len(loop.signatures) for loop in loops] == before and all(before)
