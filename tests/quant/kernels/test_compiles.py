"""Triton kernels compile for real GPUs on a machine without one (benchmarks/compiled_kernels.py), within bounds that a wrong one leaves."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")


def compiled(*words: str) -> subprocess.CompletedProcess:
    """In a process of its own: the interpreter of the other tests is chosen when kernels are defined."""
    command = [sys.executable, "-m", "benchmarks.compiled_kernels", "--quick", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", [80, 90])
def test_every_kernel_compiles_and_fits(target):
    done = compiled("--targets", str(target))
    assert done.returncode == 0, done.stderr
    for kernel in ("_coordinate_descent", "_gptq", "_one_token", "_narrow_groups", "_many_tokens"):
        assert f"{kernel} |" in done.stdout
    assert done.stdout.count(f"sm_{target}") >= 20
    rows = [
        [cell.strip() for cell in line.split("|")]
        for line in done.stdout.splitlines()
        if line.startswith("| _one_token")
    ]
    per_code = {row[2]: float(row[-2]) for row in rows}
    assert len(per_code) == 4 and all(1 < count < 12 for count in per_code.values()), per_code
    assert all(count <= 8 for case, count in per_code.items() if case.startswith("4 bits")), per_code


def test_spills_beyond_the_bound_are_named():
    done = compiled("--targets", "90", "--max-stack", "100")  # compiled before, so that this is quick
    assert done.returncode == 1
    assert "_many_tokens, 3 bits, groups of 128, 16 tokens, float32, sm_90: a stack of " in done.stderr
