"""Where tuning, or learning of all blocks together, stands, kept in the run directory, so that a run that was killed goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from quant.core.errors import InputError
from quant.core.files import check_plain_file, write_atomically
from quant.run.directory import TUNING, RunDirectory
from quant.tune.optimize import State

KEEP_SECONDS = 60.0  # between states of a block that are kept: those of a large one are gigabytes


@dataclass
class Kept:
    """The file. solved: hashes of the codes that are tuned; None where some are replaced already. rarely: a state
    is written only where the last one is KEEP_SECONDS old (which states are there changes no bit). file: its name; what: that goes
    on from it."""

    target: RunDirectory
    solved: str | None
    seconds: float = 0.0
    rarely: bool = False
    file: str = TUNING
    what: str = "tuning"

    def __post_init__(self) -> None:
        self.started, self.path = time.perf_counter(), self.target.path / self.file
        self.written = self.started

    def write(self, state: State) -> None:
        """Keep a state."""
        if self.rarely and time.perf_counter() - self.written < KEEP_SECONDS:
            return
        numbers = state.numbers() | {
            "solved": self.solved,
            "seconds": self.seconds + time.perf_counter() - self.started,
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors().items()}
        write_atomically(self.path, save(tensors, {"format": "pt", "tuning": json.dumps(numbers)}))
        self.written = time.perf_counter()

    def read(self, device: torch.device, of_others: bool = True) -> tuple[State | None, float]:
        """The state that was kept and the seconds behind it; None where there is none. of_others: whether a state of other
        codes is a mistake; else it is one that is not needed any more. Raises InputError where it is damaged or of other
        codes."""
        check_plain_file(self.path)
        if not self.path.exists():
            return None, 0.0
        try:
            with safe_open(self.path, framework="pt", device=str(device)) as file:
                numbers: Mapping[str, Any] = json.loads(file.metadata()["tuning"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state, self.seconds = State.of(tensors, numbers), float(numbers["seconds"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path} is damaged ({error}); delete it, and {self.what} begins again") from error
        if not of_others and self.solved != numbers["solved"]:
            self.seconds = 0.0
            return None, 0.0
        if self.solved not in (None, numbers["solved"]):
            raise InputError(
                f"{self.path} belongs to other codes than those beside it; delete it, and {self.what} begins again"
            )
        return state, self.seconds
