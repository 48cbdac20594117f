"""Several processes of one job inside a test.

They are forks of a server that has imported what all of them need, and no compiled loops: numba's threads do not survive a
fork. Functions and what they are given are pickled, so that a function is one of a module.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from quant.core import ranks

PATIENCE = 60.0  # seconds that a test waits for them
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["tests.helpers", "numba", "transformers.models.llama.modeling_llama", "torch.distributed"]
)


class Crew:
    """Processes that run a function each. The store that they meet at is the test's own, as torchrun's is torchrun's."""

    def __init__(self, size: int, function: Callable[..., Any], *given: Any, directory: Path) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        self._files = [directory / f"rank-{rank}-{time.monotonic_ns()}.json" for rank in range(size)]
        self.processes = []
        for rank, file in enumerate(self._files):
            world = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            world["TORCHELASTIC_USE_AGENT_STORE"] = True
            self.processes.append(SERVER.Process(target=_work, args=(world, file, function, given)))
            self.processes[-1].start()

    def kill(self, rank: int) -> None:
        """As the system does where memory is short."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def wait(self) -> list[int]:
        """Exit codes by rank; a negative one is that of a signal."""
        end = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [process for process in self.processes if process.exitcode is None]
        for process in hanging:
            process.kill()
        assert not hanging, (len(hanging), self.errors())
        return [process.exitcode for process in self.processes]

    def errors(self) -> list[str]:
        """What each wrote to standard error."""
        return [file.with_suffix(".err").read_text() for file in self._files]

    def results(self) -> list[Any]:
        """What the function returned on each, which all have to reach."""
        codes = self.wait()
        assert not any(codes), (codes, self.errors())
        return [json.loads(file.read_text()) for file in self._files]


def _work(world: dict[str, object], file: Path, function: Callable[..., Any], given: tuple) -> None:
    """One process: its exit code is what the function returns, where that is a number."""
    code = 1
    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in world.items()}
    errors = file.with_suffix(".err").open("w")
    os.dup2(errors.fileno(), 2)
    sys.stderr = errors
    try:
        result = function(*given)
        file.write_text(json.dumps(result))
        code = result if isinstance(result, int) else 0
    except Exception:  # noqa: BLE001 (a test's process ends here, whatever it was)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def together(size: int, function: Callable[..., Any], *given: Any, directory: Path) -> list[Any]:
    """What a function returns (JSON) on each of so many processes that have met."""
    return [own["is"] for own in Crew(size, _met, function, given, directory=directory).results()]


def _met(function: Callable[..., Any], given: tuple) -> Any:
    with ranks.joined():
        return {"is": function(*given)}
