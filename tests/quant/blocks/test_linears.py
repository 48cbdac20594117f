"""A linear by reference: a module of its own, or one expert of a parameter [experts, out, in]."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import functional_call

from quant.blocks.linears import LinearRef
from quant.core.gram import GramStats
from quant.core.types import QuantSpec
from quant.solvers import get_solver

N_EXPERTS, N_OUT, N_IN = 3, 12, 8


class Mixture(nn.Module):
    """Experts as transformers 5 keeps them, each token to one of them, and a plain linear in front."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(N_IN, N_IN)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(N_EXPERTS, N_OUT, N_IN))

    def forward(self, x, which):
        x = self.proj(x)
        out = x.new_zeros(len(x), N_OUT)
        for index in range(N_EXPERTS):
            out[which == index] = F.linear(x[which == index], self.experts.up[index])
        return out


EXPERTS = [LinearRef(f"experts.up.{index}", "experts.up", index) for index in range(N_EXPERTS)]


@pytest.fixture
def setting():
    block, x, which = Mixture(), torch.randn(40, N_IN), torch.randint(N_EXPERTS, (40,))
    return block, {name: p.detach() for name, p in block.named_parameters()}, x, which


def test_weights_are_taken_and_replaced(setting):
    block, weights, x, which = setting
    plain = LinearRef.of_module("proj")
    assert plain.weight(weights) is weights["proj.weight"]
    for ref in [plain, *EXPERTS]:
        weight = ref.weight(weights)
        same = ref.replace(weights, weight.clone())
        assert torch.equal(functional_call(block, same, (x, which)), functional_call(block, weights, (x, which)))
        other = ref.replace(weights, weight + 1)
        assert torch.equal(ref.weight(other), weight + 1) and torch.equal(ref.weight(weights), weight)
        untouched = [one for one in [plain, *EXPERTS] if one != ref]
        assert all(torch.equal(one.weight(other), one.weight(weights)) for one in untouched)
    before, after = (
        functional_call(block, w, (x, which))
        for w in (weights, EXPERTS[1].replace(weights, EXPERTS[1].weight(weights) * 2))
    )
    assert torch.equal(after[which != 1], before[which != 1])
    torch.testing.assert_close(after[which == 1], 2 * before[which == 1])


def test_each_sees_its_own_inputs(setting):
    block, weights, x, which = setting
    seen = {ref: [] for ref in [LinearRef.of_module("proj"), *EXPERTS]}
    for ref, inputs in seen.items():
        with ref.observe(block, weights, inputs.append):
            expected = functional_call(block, weights, (x, which))
        functional_call(block, weights, (x, which))  # no longer
    inside = F.linear(x, weights["proj.weight"], weights["proj.bias"])
    assert torch.equal(*seen.pop(LinearRef.of_module("proj")), x)
    for index, (ref, inputs) in enumerate(seen.items()):
        assert len(inputs) == 1 and torch.equal(inputs[0], inside[which == index])
        torch.testing.assert_close(inputs[0] @ ref.weight(weights).T, expected[which == index])


def test_an_expert_is_solved_as_a_linear_is(setting):
    """From its own tokens alone: its error there is lower than that of rounding to nearest."""
    block, weights, x, which = setting
    x, which = torch.randn(4000, N_IN) @ torch.randn(N_IN, N_IN), torch.randint(N_EXPERTS, (4000,))
    stats = GramStats(N_IN)
    with EXPERTS[2].observe(block, weights, stats.update):
        before = functional_call(block, weights, (x, which))
    assert stats.n_tokens == int((which == 2).sum())
    errors = {}
    for method in ("rtn", "quantease"):
        answer = get_solver(method)(EXPERTS[2].weight(weights), stats, QuantSpec(3)).dequantize()
        after = functional_call(block, EXPERTS[2].replace(weights, answer), (x, which))
        assert torch.equal(after[which != 2], before[which != 2])
        errors[method] = float((after - before).square().sum())
    assert 0 < errors["quantease"] < 0.8 * errors["rtn"]
