"""Which device is used, and what a manifest says of the software."""

import pytest
import torch

from quant.core import env
from quant.core.errors import InputError
from quant.kernels import columns


def test_a_device_with_a_number_becomes_the_current_one(monkeypatch):
    """Triton starts kernels on torch's current device, whatever tensors they are given."""
    made = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    assert env.pick_device("cuda:1") == torch.device("cuda", 1) and made == [torch.device("cuda", 1)]
    env.pick_device("cuda")
    env.pick_device("cpu")
    assert len(made) == 1
    with pytest.raises(InputError, match=r"--device cuda:2 is not there: this machine has 2 CUDA device\(s\)"):
        env.pick_device("cuda:2")


def test_kernels_are_chosen_for_every_device(monkeypatch):
    monkeypatch.setattr(columns, "_chosen", {})
    tried = []
    monkeypatch.setattr(columns, "_choose", lambda device: tried.append(str(device)) or columns.TorchKernels())
    names = ("cuda", "cuda:0", "cuda:1", "cuda:1", "cpu")
    chosen = [columns.kernels(torch.device(name)) for name in names]
    assert tried == ["cuda", "cuda:1", "cpu"] and chosen[0] is chosen[1] and chosen[2] is chosen[3]


SAID = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)  Tue Sep 23 09:55:41"


def test_versions_are_of_everything_that_moves_numbers(monkeypatch, tmp_path):
    assert env.versions()["numba"] != "missing" and "driver" not in env.versions()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(env, "version", lambda package: f"{package} 1")
    monkeypatch.setattr(env, "DRIVER", tmp_path / "version")
    expected = {"cuda": "13.0", "triton": "triton 1", "torch": "torch 1"}
    assert expected.items() <= env.versions().items() and "driver" not in env.versions(), "a machine without one"
    (tmp_path / "version").write_text(f"{SAID}\nGCC version: gcc version 13.3.0\n")
    assert (expected | {"driver": "580.95.05"}).items() <= env.versions().items()
