"""AutoRound's weights: the start is rounding to nearest, a step is that of the paper's equations in float64, and what is
trained is what is deployed."""

from __future__ import annotations

import itertools

import pytest
import torch

from quant.core.errors import InputError
from quant.core.gram import GramStats
from quant.core.types import QuantSpec
from quant.solvers import get_solver
from quant.tune.config import AUTOROUND_TUNING, Tuning
from quant.tune.offsets import HIGH, LOW, OFFSET, OffsetLinear
from quant.tune.optimize import Objective, begin, optimize
from tests.helpers import random_weight

SPECS = [QuantSpec(2), QuantSpec(3, group_size=8), QuantSpec(4, group_size=16, symmetric=True), QuantSpec(2, range="mse"),
         QuantSpec(1), QuantSpec(3, symmetric=True, range="mse", group_size=8)]  # fmt: skip


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(spec, n_out=12, n_in=32, solver="rtn"):
    """A weight with a dead row, a row of one sign and a large weight, and the solver's answer."""
    weight = gaussian(n_out, n_in)
    weight[0], weight[1 % n_out] = 0, weight[1 % n_out].abs() + 0.1
    weight[-1, 0] = 9
    x = gaussian(100, n_in, seed=1)
    return weight, get_solver(solver)(weight, GramStats.from_gram(x.T @ x), spec)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("n_out", "n_in"), [(12, 32), (1, 16)])
def test_the_start_is_rounding_to_nearest(spec, n_out, n_in):
    weight, start = rounded(spec, n_out, n_in)
    linear = OffsetLinear("w", start, spec, weight)
    answer, parameters = linear.answer(linear.initial()), linear.initial()
    assert torch.equal(answer.codes, start.codes)
    assert torch.equal(answer.grid.scale, start.grid.scale)
    assert torch.equal(answer.grid.zero, start.grid.zero)
    assert torch.equal(linear.weight(parameters), start.dequantize())


def moved(linear, seed=3):
    """Parameters away from the start, within their bounds."""
    parameters = linear.initial()
    parameters[OFFSET] += (
        torch.rand(parameters[OFFSET].shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    ) * 0.9
    for i, name in enumerate((LOW, HIGH)):
        parameters[name] -= 0.4 * torch.rand(
            parameters[name].shape, generator=torch.Generator().manual_seed(seed + 1 + i)
        )
    return parameters


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_trained_is_what_is_deployed(spec):
    weight, start = rounded(spec)
    linear = OffsetLinear("w", start, spec, weight)
    answer = linear.answer(moved(linear))
    assert torch.equal(linear.weight(moved(linear)), answer.dequantize())
    assert answer.info["codes_moved"] > 0
    assert int(answer.grid.zero.min()) >= (0 if spec.bits == 1 else 1)


def derivatives(weight, parameters, spec, linear, upstream):
    """∂loss/∂(V, α, β) by hand, float64, from the equations in `quant.tune.offsets` with ∂⌊x⌉/∂x = 1; s and z as stored."""
    n_out, n_in = weight.shape
    size = spec.group_size if spec.group_size > 0 else n_in
    answer = linear.answer(parameters)
    of = {name: torch.zeros_like(tensor).double() for name, tensor in parameters.items()}
    qmax = spec.qmax
    for i, j in itertools.product(range(n_out), range(n_in)):
        g = j // size
        w, v, up = float(weight[i, j]), float(parameters[OFFSET][i, j]), float(upstream[i, j])
        alpha, beta = float(parameters[LOW][i, g]), float(parameters[HIGH][i, g])
        lo, hi = float(linear.low[i, g]), float(linear.high[i, g])
        s, z = float(answer.grid.scale[i, g]), int(answer.grid.zero[i, g])
        code = round(w / s + v) + z
        inside = 0 <= code <= qmax
        by_s = min(max(code, 0), qmax) - z - inside * w / s  # z held
        by_z = s * (inside - 1)
        of[OFFSET][i, j] += up * s * inside
        if spec.symmetric:  # s = 2 max(-α lo, β hi) / qmax, z fixed
            which, end = (LOW, -lo) if -alpha * lo > beta * hi else (HIGH, hi)
            of[which][i, g] += up * by_s * end * 2 / qmax
            continue
        total = by_s + by_z * alpha * lo / s**2  # z = -α lo / s
        of[HIGH][i, g] += up * total * hi / qmax
        of[LOW][i, g] += up * (total * -lo / qmax + by_z * -lo / s)
    return of


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_step_is_that_of_the_equations(spec):
    weight, start = rounded(spec)
    linear = OffsetLinear("w", start, spec, weight)
    parameters, x = moved(linear), gaussian(50, 32, seed=5)
    target = x @ weight.T
    objective = Objective(lambda p, batch: ((x @ linear.weight(p).T) - target).square().mean(), lambda p: 1.0, [0])
    deployed = linear.answer(parameters).dequantize().double()
    upstream = 2 * (x.double() @ deployed.T - target.double()).T @ x.double() / target.numel()
    by_hand = derivatives(weight, parameters, spec, linear, upstream)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    objective.loss(leaves, 0).backward()
    for name, reference in by_hand.items():
        assert reference.norm() > 0
        assert (leaves[name].grad.double() - reference).norm() < 1e-4 * reference.norm()
    tuning, rates = Tuning("block", 4, form="offset", optimizer="sign", grid_rate=0.0), {}
    rates = linear.rates(tuning)
    assert set(rates.values()) == {0.25}
    state = begin(objective, {name: tensor.clone() for name, tensor in parameters.items()}, Tuning(optimizer="sign"))
    assert state.first == {} == state.second

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize(objective, state, rates, tuning, 0, stop, bounds=linear.bounds())
    for name, reference in by_hand.items():
        lowest, highest = linear.bounds()[name]
        expected = (parameters[name].double() - 0.25 * reference.sign()).clamp(lowest, highest)
        sure = (reference.abs() > 1e-5 * reference.abs().max()) | (reference == 0)
        assert torch.allclose(state.parameters[name].detach().double()[sure], expected[sure], atol=1e-6)
        assert sure.double().mean() > 0.5


def test_on_tiny_layers_it_ends_between_rounding_and_the_best_of_all_codes():
    spec = QuantSpec(2)
    x, weight = gaussian(30, 6, seed=2) + 0.5 * gaussian(30, 1, seed=4), gaussian(16, 6, seed=7)
    start = get_solver("rtn")(weight, GramStats.from_gram(x.T @ x), spec)
    linear = OffsetLinear("w", start, spec, weight)

    def loss(parameters, batch=0):
        return ((linear.weight(parameters) - weight) @ x.T).square().mean()

    objective = Objective(loss, lambda p: float(loss(p)), [0])
    state = begin(objective, linear.initial(), Tuning(optimizer="sign"))
    optimize(objective, state, linear.rates(AUTOROUND_TUNING), AUTOROUND_TUNING, 0, bounds=linear.bounds())
    codes = torch.tensor(list(itertools.product(range(4), repeat=6))).float()
    steps = torch.cat([codes - z for z in (1, 2, 3)])
    candidates = torch.linspace(0.3, 1.2, 20)[:, None, None] * steps  # in scales of rounding to nearest
    best = [
        float(((s * candidates - row) @ x.T).square().mean(-1).min())
        for s, row in zip(start.grid.scale[:, 0], weight, strict=True)
    ]
    assert state.lowest < 0.9 * state.losses[0]
    assert state.lowest > 0.95 * sum(best) / len(best)


def test_ranges_reach_one_or_where_they_were_searched_two():
    weight, start = rounded(QuantSpec(3))
    assert OffsetLinear("w", start, QuantSpec(3), weight).bounds()[LOW] == (0, 1)
    spec = QuantSpec(3, range="mse")
    weight, start = rounded(spec)
    assert OffsetLinear("w", start, spec, weight).bounds() == {OFFSET: (-0.5, 0.5), LOW: (0, 2), HIGH: (0, 2)}


def test_other_answers_are_refused():
    weight, start = rounded(QuantSpec(3, group_size=16), solver="spqr")
    with pytest.raises(InputError, match="autoround begins with weights that are rounded to nearest"):
        OffsetLinear("block 0 w", start, QuantSpec(3, group_size=16), weight)


def test_weights_of_lower_precision_are_widened():
    spec = QuantSpec(3)
    weight = gaussian(4, 16).bfloat16()
    start = get_solver("rtn")(weight.float(), GramStats.from_gram(torch.eye(16)), spec)
    linear = OffsetLinear("w", start, spec, weight)
    assert linear.weight(linear.initial()).dtype == torch.float32
    assert torch.equal(linear.answer(linear.initial()).codes, start.codes)


def test_real_minima_are_refused_in_one_line():
    start = random_weight(4, 16, QuantSpec(2, kind="real"))
    with pytest.raises(InputError, match="drop --grid real, or use --tune"):
        OffsetLinear("w", start, start.spec, start.dequantize())
