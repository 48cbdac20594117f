"""Seconds of work on a device: the host does not wait for it until somebody asks."""

import time

import pytest
import torch

from quant.core import clock
from quant.core.clock import Clock

CUDA = torch.device("cuda", 1)


class Device:
    """A CUDA device whose time is told by hand."""

    def __init__(self, monkeypatch):
        self.now, self.waits, self.streams = 0.0, 0, []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.at = device.now
                device.streams.append(stream)

            def elapsed_time(self, other):
                assert device.waits, "an event is read before it has happened"
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda of: f"the stream of {of}")
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def wait(self, device):
        assert device == CUDA
        self.waits += 1


def test_on_cuda_nobody_waits_until_seconds_are_asked_for(monkeypatch):
    device = Device(monkeypatch)
    own = Clock(CUDA, ("forward", "observe"))
    for _ in range(3):
        with own.spent("forward"):
            device.now += 1.0
            with own.spent("observe", within="forward"):
                device.now += 0.25
    assert device.waits == 0 and set(device.streams) == {"the stream of cuda:1"}
    assert own.seconds == {"forward": 3.0, "observe": 0.75} and device.waits == 1
    assert own.seconds == {"forward": 3.0, "observe": 0.75} and device.waits == 1, "nothing is counted twice"


def test_marks_that_nobody_reads_do_not_pile_up(monkeypatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(clock, "MOST_MARKS", 10)
    own = Clock(CUDA, ("forward",))
    for _ in range(25):
        with own.spent("forward"):
            device.now += 1.0
    assert device.waits == 2 and len(own._unread) == 5 and own.seconds == {"forward": 25.0}


def test_on_a_cpu_it_is_the_time_of_the_wall_and_failures_do_not_count():
    own = Clock(torch.device("cpu"), ("forward", "observe"))
    with own.spent("forward"), own.spent("observe", within="forward"):
        time.sleep(0.02)
    assert own.seconds["observe"] >= 0.02 > abs(own.seconds["forward"])
    before = own.seconds
    with pytest.raises(ValueError), own.spent("forward"):
        raise ValueError
    assert own.seconds == before and not own._unread
