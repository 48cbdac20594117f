"""Recorded steps as CUDA graphs, with a stand-in for the captures: answers, states, and what comes of a capture that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from quant.core.recording import Recording, recorded
from quant.kernels.steps.graph import Graph
from tests.graphs import MAIN, Stand


class Memory:
    """What it reads goes to the next place; it answers with all places, weighted."""

    def __init__(self, length: int = 8) -> None:
        self.kept, self.place, self.far = torch.zeros(length, 3), torch.zeros(1, dtype=torch.long), None

    def __call__(self, x: Tensor) -> Tensor:
        self.kept.index_copy_(0, self.place + 0, (x * 2)[None])
        self.place.add_(1)
        if self.far is not None:
            self.far.add_(1)
        return torch.softmax(self.kept.sum(0) * self.place, -1)


def inputs(n: int) -> list[Tensor]:
    return list(torch.randn(n, 3, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.inference_mode():
        yield


def steps(step: Memory, given: list[Tensor]) -> tuple[list[Tensor], Graph]:
    """All answers, the first by recording and the second by the check; what gave the rest."""
    recording = recorded(step, given[0].clone())
    graph = Graph.of(recording)
    assert graph is not None
    return [recording.result.clone(), graph.checked(given[1]), *(graph(x) for x in given[2:])], graph


def check(own: Memory, given: list[Tensor], answers: list[Tensor]) -> None:
    other = Memory()
    assert all(torch.equal(a, other(x)) for a, x in zip(answers, given, strict=True))
    assert torch.equal(own.kept, other.kept) and int(own.place) == int(other.place) == len(given)


def test_a_graph_answers_as_the_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    stand, own, given = Stand(monkeypatch), Memory(), inputs(8)
    answers, graph = steps(own, given)
    assert not graph.instead and graph.graph is not None
    assert stand.happened == ["wait", "capture", "wait", *["replay"] * 7] and stand.stream == MAIN
    check(own, given, answers)


@pytest.mark.parametrize("fails_at", [0, 4])
def test_a_capture_that_fails_leaves_the_replay(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind a write; and the stream is what it was, though the end of such a capture fails too."""
    stand, own, given = Stand(monkeypatch, fails_at=fails_at), Memory(), inputs(6)
    answers, graph = steps(own, given)
    assert graph.instead == "a step is not captured: operation not permitted when stream is capturing"
    assert (
        stand.happened == ["wait", "capture", "wait"] and stand.stream == MAIN and bool(stand.undone) == (fails_at > 0)
    )
    check(own, given, answers)


def test_a_graph_that_gives_something_else_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stand, own, given = Stand(monkeypatch, off=1e-6), Memory(), inputs(6)
    answers, graph = steps(own, given)
    assert graph.instead == "a captured step gives something else" and stand.happened[3:] == ["replay"]
    check(own, given, answers)


def test_what_the_host_read_in_a_capture_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place or its input, taken once and for all: no capture is of the step that it is tried on."""
    plain = Recording.replay
    for baked in ("place", "input"):
        stand, own, given = Stand(monkeypatch), Memory(), inputs(6)

        def replay(self: Recording, own: Memory = own, stand: Stand = stand, baked: str = baked) -> Any:
            step = plain(self)

            def answer(x: Tensor) -> Tensor:
                if stand.stream != "capturing":
                    return step(x)
                read = own.place if baked == "place" else x
                with _disable_current_modes():
                    taken = read.sum().item()
                return (taken - read.sum()) + step(x)

            return answer

        monkeypatch.setattr(Recording, "replay", replay)
        answers, graph = steps(own, given)
        assert graph.instead == "a captured step gives something else"
        check(own, given, answers)


def test_what_no_graph_repeats_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    stand, own, given = Stand(monkeypatch), Memory(), inputs(6)
    own.far = torch.zeros(1, device="meta")
    answers, graph = steps(own, given)
    assert graph.instead == "a graph repeats nothing of another device"
    check(own, given, answers)
    own = Memory()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    answers, graph = steps(own, given)
    assert "deterministic" in graph.instead and not stand.happened
    check(own, given, answers)


def test_answers_are_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Stand(monkeypatch)
    answers, graph = steps(Memory(), inputs(3))
    kept = answers[2].clone()
    answers[2].fill_(7)
    assert graph.result is not None and torch.equal(graph.result, kept)


def test_only_what_is_on_cuda_is_a_graph() -> None:
    with FakeTensorMode():
        on_cuda, on_cpu = torch.empty(1, device="cuda"), torch.empty(1)
    assert Graph.of(Recording([], on_cuda, on_cuda)) is not None
    assert Graph.of(Recording([], on_cpu, on_cpu)) is None


def test_without_memory_for_a_second_state_operations_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def clone(self) -> Tensor:
            raise RuntimeError("CUDA out of memory\nand more")

    stand, own, given = Stand(monkeypatch), Memory(), inputs(5)
    recording = recorded(own, given[0].clone())
    graph = Graph.of(recording)
    assert graph is not None
    graph.state = [Full()]  # type: ignore[list-item]
    answers = [recording.result.clone(), graph.checked(given[1]), *(graph(x) for x in given[2:])]
    check(own, given, answers)
    assert graph.instead == "a step is not captured: CUDA out of memory" and stand.happened == []
