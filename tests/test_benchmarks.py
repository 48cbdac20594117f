"""The benchmarks compute what they say they compute."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.solvers import column_loop, measured, problem
from quant.blocks.stream import BlockStream
from quant.core.grid import fit_grid
from quant.core.types import QuantSpec
from quant.kernels import columns as blocks
from quant.kernels.columns import TorchKernels
from quant.solvers.quantease import is_rounding_sweep
from tests.references import inputs, make_stats, naive_coordinate_descent, weights


def test_the_published_loop_is_the_same_descent():
    weight, gram = weights(6, 40).double(), make_stats(inputs(40, 200)).gram.double()
    grid, schedule = fit_grid(weight.float(), QuantSpec(3)), [is_rounding_sweep(k, 7) for k in range(7)]
    codes = naive_coordinate_descent(weight, gram, grid, torch.arange(40), schedule)
    found = column_loop(weight, gram, grid, schedule)
    torch.testing.assert_close(found.float(), grid.dequantize(codes), rtol=1e-5, atol=1e-6)


def test_rows_of_one_shape(monkeypatch):
    monkeypatch.setattr(blocks, "_chosen", {})
    args = argparse.Namespace(device="cpu", sweeps=4, precision="highest", float64=True)
    rows = [row.split(" | ") for row in measured(8, 32, args, [TorchKernels()])]
    assert [row[1:3] for row in rows] == [
        ["gram", "torch"], ["quantease", "column loop"], ["gptq", "torch"], ["quantease", "torch"],
        ["objective after 4 sweeps", "column loop"], ["objective after 4 sweeps", "torch"],
        ["objective after 4 sweeps", "column loop, float64"], ["objective after 4 sweeps", "torch, float64"],
    ]  # fmt: skip
    ends = [float(row[3]) for row in rows[-4:]]
    assert ends[0] > 0 and ends[1] == pytest.approx(ends[0], rel=1e-4) and ends[3] == pytest.approx(ends[2], rel=1e-7)
    weight, x = problem(8, 32, "cpu")
    assert weight.shape == (8, 32) and x.shape == (64, 32)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a process's peak")
def test_a_peak_is_of_what_ran_since():
    """In a process of its own: in one that has run other tests the peak may be theirs."""
    script = """
import torch
from quant.core import env
device = torch.device("cpu")
large = torch.ones(75_000_000)
before = env.peak_bytes(device)["host"]
del large
env.reset_peak(device)
after = env.peak_bytes(device)
assert after["device"] == 0
print(before - after["host"])
"""
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=True)
    assert int(found.stdout) > 150_000_000


@pytest.mark.parametrize("whole", [3, 4])
def test_a_model_that_was_cut_passes_its_last_block_too(whole, model_dir, tmp_path, monkeypatch):
    passed, run = [], BlockStream.run
    monkeypatch.setattr(
        BlockStream, "run", lambda self, index, *a, **k: (k.get("advance") and passed.append(index), run(self, index, *a, **k))
    )  # fmt: skip
    args = argparse.Namespace(
        device="cpu", dtype="auto", nsamples=4, seqlen=16, calib_batch=2, activation_store="cpu", sweeps=2, wbits=3,
        true_sequential=False,
    )  # fmt: skip
    found = end_to_end.quantize(model_dir("llama"), "quantease", args, whole)
    assert passed == list(range(whole - 1))
    assert 0 < found["once"] < found["total"]


def test_what_happens_once_is_not_extrapolated():
    assert end_to_end.all_blocks({"once": 10.0, "total": 13.0}, 2, 80) == 10 + 40 * 3
    assert end_to_end.all_blocks({"once": 10.0, "total": 13.0}, 2, 2) == 13
