"""The machine a run stands on: device, dtype, memory, versions."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from quant.core import ranks
from quant.core.errors import InputError

PACKAGES = ("torch", "transformers", "datasets", "safetensors", "tokenizers", "numpy", "numba")
DRIVER = Path("/proc/driver/nvidia/version")  # says of the kernel's module which driver it is of


def pick_device(name: str) -> torch.device:
    """``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:i``; of several processes each gets a CUDA device of its
    own. A device with a number becomes torch's current one: Triton starts its kernels there, whatever tensors they are given.
    Raises InputError if it is not there."""
    if ranks.size() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return _own_device()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if ranks.size() > 1 and device.index is not None:
        raise InputError(
            f"--device {name}: every process of a job has a device of its own; use --device cuda, cpu or auto"
        )
    if device.type == "cuda" and (device.index or 0) >= count:
        present = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise InputError(f"--device {name} is not there: this machine has {present}; use --device cpu or auto")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _own_device() -> torch.device:
    local, count = ranks.local_rank(), torch.cuda.device_count()
    if local >= count:
        raise InputError(
            f"process {local} on this machine has no CUDA device, there are {count}: give torchrun --nproc-per-node {count}, or "
            "use --device cpu"
        )
    return torch.device("cuda", local)


def pick_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The arithmetic's dtype, one of `names.DTYPES`; None is the checkpoint's own. ``auto`` computes in float32 on a CPU."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.float32 if device.type == "cpu" else None


def reset_peak(device: torch.device) -> None:
    """Forget the peaks seen so far: of device memory, and on Linux of this process (it falls to what is in use now)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # a system without it, or that does not allow it: the peak stays that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peak memory since `reset_peak`: on the device (0 on a CPU, where host and device are one) and of this process."""
    return {"device": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, "host": _host_peak()}


def _host_peak() -> int:
    """Peak resident bytes. The kernel's own counter where there is one: unlike getrusage's, it can be set back."""
    status = Path("/proc/self/status")
    line = (
        re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE) if status.exists() else None
    )
    if line:
        return int(line[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_bytes() -> int:
    """What this process has in memory now, 0 where the system does not say."""
    status = Path("/proc/self/status")
    line = (
        re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE) if status.exists() else None
    )
    return int(line[1]) * 1024 if line else 0


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, for the manifest."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "platform": platform.system(),
        "deterministic": device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
    }


def be_deterministic() -> None:
    """Only deterministic algorithms on CUDA, before it is first used (a CPU always is, with one number of threads, and takes packed
    products by constants then)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can move a number; where torch is built for CUDA also of CUDA, Triton and the
    driver, as far as they are there."""
    by_package = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = "missing"
    if torch.version.cuda is not None:  # kernels are compiled by Triton for CUDA alone
        by_package["cuda"] = torch.version.cuda
        with suppress(PackageNotFoundError):
            by_package["triton"] = version("triton")
        with suppress(OSError):
            by_package["driver"] = _driver(DRIVER.read_text(encoding="utf-8"))
    return by_package


def _driver(text: str) -> str:
    """The number out of what a driver says of itself; all of its first line where there is none."""
    first = (text.splitlines() or [""])[0]
    number = re.search(r"\b\d+(\.\d+)+\b", first)
    return number[0] if number else first


def commit() -> str | None:
    """The project's git commit, with `-dirty` where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def total_bytes(device: torch.device) -> int:
    """Memory of the device, on a CPU of the machine, whatever is free of it now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int:
    """Memory that work on the device may still take: of the device, on a CPU of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    status = Path("/proc/meminfo")
    match = (
        re.search(r"^MemAvailable:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE)
        if status.exists()
        else None
    )
    return int(match[1]) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
