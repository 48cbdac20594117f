"""The loop: Adam as published, the best iterate, the same bits after a stop in the middle, the same bits twice."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from quant.core.errors import InputError
from quant.tune.config import Tuning, batch_of, split
from quant.tune.optimize import BETAS, Objective, State, begin, optimize, order_of, rate_at

TARGETS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def quadratic(noise=0.0):
    """Distance to one target a batch; batch 5 is held out."""

    def loss(parameters, batch):
        return (parameters["x"] - TARGETS[batch]).square().sum() + noise * parameters["x"].sum()

    return Objective(loss, lambda p: float((p["x"] - TARGETS[5]).square().sum()), [0, 1, 2, 3, 4])


def run(steps, state=None, stop=None, objective=None, rate=0.1, seed=0, kept_in="full"):
    """The state behind the run, and those that were kept on the way. stop: the step behind which it is killed."""
    objective, kept, tuning = objective or quadratic(), [], Tuning("model", steps, state=kept_in)

    def keep(state):
        tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
        kept.append((tensors, {k: list(v) if isinstance(v, list) else v for k, v in state.numbers().items()}))
        if state.step == stop:
            raise KeyboardInterrupt

    state = state or begin(objective, {"x": torch.zeros(5)}, tuning)
    with contextlib.suppress(KeyboardInterrupt):
        optimize(objective, state, {"x": rate}, tuning, seed, keep)
    return state, kept


def test_steps_are_those_of_adam_in_float64():
    state, _ = run(7)
    x, m, v = torch.zeros(5).double(), torch.zeros(5).double(), torch.zeros(5).double()
    for step in range(7):
        gradient = 2 * (x - TARGETS[order_of(range(5), step, 0)].double())
        m = BETAS[0] * m + (1 - BETAS[0]) * gradient
        v = BETAS[1] * v + (1 - BETAS[1]) * gradient**2
        unbiased = (m / (1 - BETAS[0] ** (step + 1)), v / (1 - BETAS[1] ** (step + 1)))
        x = x - 0.1 * rate_at(step, 7) * unbiased[0] / (unbiased[1].sqrt() + 1e-12)
    assert torch.allclose(state.parameters["x"].detach().double(), x, atol=1e-6)


def test_moments_in_half_precision_are_near_those_in_full_and_begin_alike():
    full, half = run(40)[0], run(40, kept_in="half")[0]
    assert {part[0].dtype for part in (list(half.first.values()), list(half.second.values()))} == {torch.bfloat16}
    assert half.losses[0] == full.losses[0]
    assert torch.allclose(half.parameters["x"], full.parameters["x"], atol=0.05)
    assert not torch.equal(half.parameters["x"], full.parameters["x"])
    for one, other in ((half.first, full.first), (half.second, full.second)):
        assert torch.allclose(one["x"].float(), other["x"], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_one_gradient_is_held_at_a_time_and_none_in_the_end(optimizer):
    """A parameter that is moved before the gradient of another one is there changes none of them."""
    held, names = [], ("a", "b", "c")

    def loss(parameters, batch):
        for name in names:
            parameters[name].register_hook(lambda _: held.append(sum(p.grad is not None for p in parameters.values())))
        return sum((parameters[name] - (i + 1) * TARGETS[batch]).square().sum() for i, name in enumerate(names))

    tuning = Tuning("model", 5, optimizer=optimizer)
    objective = Objective(loss, lambda p: float(p["a"].detach().square().sum()), [0, 1])
    state = begin(objective, {name: torch.zeros(5) for name in names}, tuning)
    optimize(objective, state, dict.fromkeys(names, 0.1), tuning, 0)
    assert held and max(held) == 0
    assert all(p.grad is None for p in state.parameters.values())
    for i, name in enumerate(names):
        alone = Objective(lambda p, b, i=i: (p["x"] - (i + 1) * TARGETS[b]).square().sum(), lambda p: 0.0, [0, 1])
        own = optimize(alone, begin(alone, {"x": torch.zeros(5)}, tuning), {"x": 0.1}, tuning, 0)
        assert torch.equal(own.parameters["x"], state.parameters[name])


def test_rates_rise_over_two_percent_and_fall_as_a_cosine():
    rates = [rate_at(step, 200) for step in range(201)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, rate_at(3, 200)])
    assert rates[100] == pytest.approx(0.5)
    assert rates[200] == pytest.approx(0)
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))


def test_rates_of_the_sign_fall_as_a_line():
    assert [rate_at(step, 4, "sign") for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("stop", [None, 4, 20])
def test_steps_of_the_sign_are_those_of_the_gradient_and_stay_within_bounds(stop):
    objective, tuning, kept = quadratic(), Tuning("model", 40, optimizer="sign"), []

    def keep(state):
        kept.append(({n: t.clone() for n, t in state.tensors().items()}, state.numbers() | {"losses": [*state.losses]}))
        if state.step == stop:
            raise KeyboardInterrupt

    def go(state):
        with contextlib.suppress(KeyboardInterrupt):
            optimize(objective, state, {"x": 0.1}, tuning, 0, keep, bounds={"x": (-0.1, 0.3)})
        return state

    state = go(begin(objective, {"x": torch.zeros(5)}, tuning))
    if stop is not None:
        (tensors, numbers), stop = kept[-1], None
        state = go(State.of(tensors, numbers))
    x, lowest = torch.zeros(5).double(), 0.0
    for step in range(40):
        gradient = 2 * (x - TARGETS[order_of(range(5), step, 0)].double())
        x = (x - 0.1 * (1 - step / 40) * gradient.sign()).clamp(-0.1, 0.3)
        lowest = min(lowest, float(x.min()))
    assert torch.allclose(state.parameters["x"].detach().double(), x, atol=1e-6)
    assert lowest == -0.1


def test_every_batch_comes_once_an_epoch_in_another_order():
    epochs = [[order_of([3, 5, 7, 9], 4 * e + i, 1) for i in range(4)] for e in range(6)]
    assert all(sorted(epoch) == [3, 5, 7, 9] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("kept_in", ["full", "half"])
@pytest.mark.parametrize("stop", [4, 20, 36])
def test_a_run_that_goes_on_from_a_state_ends_with_the_same_bits(stop, kept_in):
    whole, _ = run(40, kept_in=kept_in)
    _, kept = run(40, stop=stop, kept_in=kept_in)
    tensors, numbers = kept[-1]
    assert numbers["step"] == stop
    state, _ = run(40, state=State.of(tensors, numbers), kept_in=kept_in)
    assert state.numbers() == whole.numbers()
    assert {n: t.tolist() for n, t in state.tensors().items()} == {n: t.tolist() for n, t in whole.tensors().items()}


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    (a, _), (b, _), (c, _) = run(40), run(40), run(40, seed=1)
    assert torch.equal(a.parameters["x"], b.parameters["x"])
    assert not torch.equal(a.parameters["x"], c.parameters["x"])


@pytest.mark.parametrize("rate", [0.01, 0.3, 50.0])
def test_the_held_out_loss_never_rises(rate):
    objective = quadratic()
    state, _ = run(40, rate=rate)
    assert objective.held_out(state.best) == state.lowest == min(state.losses) <= state.losses[0]


def test_the_start_stays_where_every_step_makes_it_worse():
    objective = quadratic()
    start = {"x": TARGETS[5].clone()}  # the best there is on what is held out
    state = begin(objective, start, Tuning("model", 20))
    optimize(objective, state, {"x": 0.1}, Tuning("model", 20), 0)
    assert torch.equal(state.best["x"], TARGETS[5])
    assert state.best_step == 0
    assert state.losses[-1] > state.losses[0]
    assert state.record()["held_out_end"] == state.record()["held_out_start"]


def test_a_loss_that_is_not_finite_ends_at_the_best_iterate(caplog):
    objective, calls = quadratic(), []

    def held_out(parameters):
        calls.append(1)
        return math.inf if len(calls) == 6 else objective.held_out(parameters)

    state, _ = run(40, objective=Objective(objective.loss, held_out, objective.batches))
    assert len(state.losses) == 6
    assert state.step == 10 < 40
    assert math.isfinite(state.lowest)
    assert "not finite after step 10" in caplog.text
    assert state.record()["losses"][-1] is None


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="not finite"):
        begin(Objective(quadratic().loss, lambda p: math.nan, [0]), {"x": torch.zeros(5)}, Tuning())


def test_an_eighth_of_the_windows_is_held_out():
    assert (batch_of(128), split(16, 8)) == (8, ([i for i in range(16) if i not in (7, 15)], [7, 15]))
    trained, held = split(128, 8)
    assert len(held) == 8
    assert len(trained) + len(held) == 128
    assert batch_of(12) == 1
    assert split(2, 1) == ([0], [1])
    with pytest.raises(InputError, match="raise --nsamples"):
        batch_of(1)
