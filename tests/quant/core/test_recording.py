"""Recorded steps: the same numbers as the code itself for every input, state included; what decides by values is refused."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from quant.core.recording import NotRecordedError, as_one, recorded


class Counter:
    """A step with state in tensors: a memory that every call writes to at the next place, read through a view."""

    def __init__(self) -> None:
        self.memory, self.place, self.scale = torch.zeros(6, 3), torch.zeros(1, dtype=torch.long), torch.tensor(2.0)
        self.asked = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.asked += 1
        factor = self.scale.exp().sqrt()  # of nothing that varies
        self.memory.index_copy_(0, self.place, (x * factor)[None])
        self.place.add_(1)
        view = self.memory.t()
        low, high = view.split(3, 1)
        return F.silu(torch.cat([low.sum(1), high.sum(1)])) + self.place.float()


def inputs(n: int) -> list[Tensor]:
    return list(torch.randn(n, 3, generator=torch.Generator().manual_seed(0)))


def test_every_replay_is_the_step_with_its_state() -> None:
    own, other, given = Counter(), Counter(), inputs(6)
    recording = recorded(own, given[0])
    replay = recording.replay()
    assert torch.equal(recording.result, other(given[0])) and own.asked == 1
    for x in given[1:]:
        assert torch.equal(replay(x), other(x))
    assert torch.equal(own.memory, other.memory) and own.asked == 1 and int(own.place) == 6
    assert own.memory.count_nonzero() == 18


def test_what_depends_on_nothing_is_not_repeated() -> None:
    own = Counter()
    replay = recorded(own, inputs(1)[0]).replay()
    names = {getattr(node.target, "__name__", str(node.target)) for node in replay.__self__.graph.nodes}
    assert not any("exp" in name or "sqrt" in name for name in names), names
    assert any("silu" in name for name in names)
    own.scale.fill_(5.0)  # nothing in the step writes to it: its first value stays
    replay(inputs(1)[0])
    assert torch.equal(own.memory[1], inputs(1)[0] * torch.tensor(2.0).exp().sqrt())


def test_functions_that_are_one_are_called_with_the_new_input() -> None:
    seen = []

    def inner(x: Tensor) -> Tensor:
        seen.append(x)
        return x * 2 if float(x.sum()) > 0 else x * 3  # reads values: a recorder would refuse it

    def step(x: Tensor) -> Tensor:
        return as_one(inner, x + 1) - 1

    replay = recorded(step, torch.ones(2)).replay()
    for x in (torch.tensor([3.0, 4.0]), torch.tensor([-3.0, -4.0])):
        assert torch.equal(replay(x), step(x))
    assert len(seen) == 5 and as_one(inner, torch.ones(1)) == 2


def test_one_within_one() -> None:
    def outer(x: Tensor) -> Tensor:
        return as_one(torch.neg, x) + 1

    replay = recorded(lambda x: as_one(outer, x) * 2, torch.ones(2)).replay()
    assert torch.equal(replay(torch.tensor([1.0, 5.0])), torch.tensor([0.0, -8.0]))


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x.unique(),
        lambda x: torch.bincount(x.long().abs()),
        lambda x: x * 2 if x.max() < 3 else x * 3,
        lambda x: x * max(x[0], x[1]),
        lambda x: x * len(torch.where(x > 2)[0]),
        lambda x: x.repeat_interleave(x.long().abs()),
        lambda x: x * x.tolist()[0],
        lambda x: x * float(x.numpy().sum()),
        lambda x: x * float(np.asarray(x).sum()),
        lambda x: x * float(f"{x[0]}"),
        lambda x: F.dropout(x, 0.5),
        lambda x: x + torch.rand(3),
        lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 1, 3)] * 3, dropout_p=0.5),
    ],
)
def test_what_decides_by_values_or_draws_is_refused(step: Any) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(NotRecordedError):
            recorded(step, torch.tensor([1.0, -2.0, 3.0]))
    assert torch.equal(as_one(torch.neg, torch.ones(1)), -torch.ones(1)), "nothing is left recording"


@pytest.mark.parametrize(
    "step",
    [
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 1, 3)] * 3),
        lambda x: torch.where(x > 0, x, -x).masked_fill(x == 0, 3),
        lambda x: x.to(torch.float32).to(torch.float64),
        lambda x: torch.tensor([0.0, 0.0, 1.0]).masked_fill_(x > 2, 9.0) + x,
        lambda x: torch.topk(x, 2).values + torch.topk(x, 2).indices,
        lambda x: x.view(1, 3).expand(2, 3)[:, 1:].contiguous() @ torch.arange(2.0),
    ],
)
def test_what_does_not_is_replayed(step: Any) -> None:
    with torch.inference_mode():
        replay = recorded(step, torch.tensor([1.0, -2.0, 3.0])).replay()
        for x in [3 * x for x in inputs(6)]:
            assert torch.equal(replay(x), step(x))


def test_a_split_at_places_that_are_given_is_refused() -> None:
    """Seen under inference mode alone, which generation is in."""
    with torch.inference_mode(), pytest.raises(NotRecordedError):
        recorded(lambda x: x.tensor_split(x[:1].long())[0], torch.tensor([1.0, -2.0, 3.0]))


def test_other_threads_are_not_recorded() -> None:
    begun, ended = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        begun.set()
        ended.wait(10)
        return x

    other = threading.Thread(target=as_one, args=(slow, torch.ones(1)))

    def step(x: Tensor) -> Tensor:
        other.start()
        begun.wait(10)
        y = x * 2
        ended.set()
        other.join()
        return y + 1

    replay = recorded(step, torch.tensor([1.0])).replay()
    assert torch.equal(replay(torch.tensor([4.0])), torch.tensor([9.0]))


def test_slices_of_every_kind_are_replayed() -> None:
    memory = torch.zeros(7, 4)

    def step(x: Tensor) -> Tensor:
        memory.copy_(x)
        memory.mul_(2)
        memory[1:3].add_(1)
        y = memory + 0
        parts = [y[2:], y[:-3], y[-2:], y[1:100], y[::2], y[..., 1:3], y[5:2], y[:, -3:-1]]
        return torch.cat([part.flatten() for part in parts])

    given = [torch.randn(7, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    replay = recorded(step, given[0]).replay()
    for x in given[1:]:
        own = replay(x)
        assert torch.equal(own, step(x))
