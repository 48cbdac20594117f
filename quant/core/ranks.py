"""One job on several processes: who they are, and everything that they tell each other.

Each process runs the same program; ``torchrun`` says in the environment who it is. Without that, or with one process, every
function here answers at once and nothing is imported or sent. Sums are added in float64 in the order of the ranks and rounded
once, whatever library carries them (gloo on a CPU, nccl between GPUs), so that all processes hold the same bits. What is no
tensor travels as JSON. A process that loses another one says so as a `RunError`.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from quant.core.errors import InputError, RunError, first_line, is_memory

if TYPE_CHECKING:  # flags are read without torch
    import torch
    from torch import Tensor

T = TypeVar("T")
LONGEST = timedelta(days=2)  # that a process waits for the others: while the first saves a checkpoint, for instance
MEETING = timedelta(minutes=10)  # for all to be there
PIECE = 1 << 26  # entries of a sum that travel at a time
TOLD = "told"  # key of the store: how many processes wanted to say why the job ends
GONE = "another process of this job is gone (killed, or out of memory), so all of them end"


@dataclass
class World:
    """The processes of this job. sent: bytes that this one gave to others so far, by what they were: each part of a sum goes to
    the one that adds it and back to all; anything else to every other."""

    rank: int
    size: int
    local: int
    store: Any
    sent: Counter[str] = field(default_factory=Counter)
    speaks: bool | None = None


_worlds: list[World] = []  # the one of this process, as torch.distributed has one


def rank() -> int:
    """The number of this process, from 0."""
    return _worlds[-1].rank if _worlds else 0


def size() -> int:
    """How many processes there are."""
    return _worlds[-1].size if _worlds else 1


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return _worlds[-1].local if _worlds else 0


def is_first() -> bool:
    """Whether this process is the one that writes and shows what all of them do."""
    return rank() == 0


def sent() -> Mapping[str, int]:
    """Bytes that this process has given to others, by what they were; see `World`."""
    return _worlds[-1].sent if _worlds else {}


def asked() -> int:
    """How many processes the environment speaks of."""
    given = (os.environ.get("RANK"), os.environ.get("WORLD_SIZE"))
    return int(given[1]) if all(word is not None and word.isdigit() for word in given) and given[1] else 1


def may_speak() -> bool:
    """Whether this process says why the job ends: the first one that asks."""
    if not _worlds:
        return True
    world = _worlds[-1]
    if world.speaks is None:
        world.speaks = True
        with suppress(RuntimeError):  # the store is gone with the process that held it
            world.speaks = world.store.add(TOLD, 1) == 1
    return world.speaks


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes of the job, where there are any. Raises InputError where the environment does not say how."""
    if asked() <= 1:
        yield
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    try:
        store, number, count = next(rendezvous("env://", timeout=MEETING))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"WORLD_SIZE is {asked()}, and the processes do not meet ({first_line(error)}): start them with torchrun, or "
            "unset WORLD_SIZE and RANK"
        ) from error
    world = World(number, count, int(os.environ.get("LOCAL_RANK", number)), store)
    with_cuda = torch.cuda.is_available()
    if with_cuda:
        torch.cuda.set_device(world.local % torch.cuda.device_count())
    _worlds.append(world)
    before = signal.signal(signal.SIGTERM, _end)
    try:
        with _losses():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if with_cuda else "gloo",
                store=store, rank=number, world_size=count, timeout=LONGEST,
            )  # fmt: skip
        yield
        barrier()
        dist.destroy_process_group()  # not after a failure: it would wait for those that are gone
    finally:
        signal.signal(signal.SIGTERM, before)


def left() -> None:
    """Forget the other processes: nothing is sent any more."""
    _worlds.clear()


def _end(number: int, _: object) -> None:
    raise RunError(GONE)  # torchrun ends those that are left in this way


@contextmanager
def _losses() -> Iterator[None]:
    """What the libraries raise where another process is gone, in one line."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunError) or is_memory(error):
            raise
        raise RunError(GONE) from error


def barrier() -> None:
    """Wait until all processes are here."""
    all_told(None)


def all_sum_(tensor: Tensor) -> Tensor:
    """The tensor, of any shape, with its sum over all processes in place. Each adds its part of the entries in float64 in the
    order of the ranks, and gives it to all."""
    if size() == 1:
        return tensor
    import torch
    import torch.distributed as dist

    n, pieces = size(), []
    for piece in tensor.reshape(-1).split(PIECE):
        part = -(-piece.numel() // n)
        room = piece.new_zeros(n * part)
        room[: piece.numel()] = piece
        others = torch.empty_like(room)
        with _losses():
            dist.all_to_all_single(others, room)
            own = torch.zeros(part, dtype=torch.float64, device=tensor.device)
            for given in others.view(n, part):
                own += given
            dist.all_gather(list(room.view(n, part)), own.to(tensor.dtype))
        _worlds[-1].sent["sums"] += 2 * (n - 1) * part * tensor.itemsize
        pieces.append(room[: piece.numel()])
    with torch.inference_mode():  # in which some are made, and may not be changed outside
        return tensor.copy_(torch.cat(pieces).view(tensor.shape))


def all_rows(rows: Tensor) -> Tensor:
    """The rows [n, ...] of all processes, of which each may have another number, one below the other in the order of the
    ranks."""
    if size() == 1:
        return rows
    import torch

    given = _exchange(rows.contiguous().view(-1).view(torch.uint8), "rows")
    return torch.cat(given).view(rows.dtype).view(-1, *rows.shape[1:])


def all_told(value: Any) -> list[Any]:
    """What every process says, by rank: JSON."""
    if size() == 1:
        return [value]
    given = all_bytes(json.dumps(value).encode(), "words")
    return [json.loads(one) for one in given]


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes (JSON), on all of them; the others make nothing."""
    if size() == 1:
        return make()
    made: T = all_told(make() if is_first() else None)[0]
    return made


def all_bytes(payload: bytes, what: str, device: torch.device | str = "cpu") -> list[bytes]:
    """What every process gives, by rank. device: that it travels between, where there is much of it."""
    import torch

    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    return [part.cpu().numpy().tobytes() for part in _exchange(data.to(device), what)]


def _exchange(data: Tensor, what: str) -> list[Tensor]:
    """The bytes, uint8 [n], of every process."""
    import torch
    import torch.distributed as dist

    n, device = size(), data.device
    with _losses():
        lengths = torch.empty(n, 1, dtype=torch.int64)
        dist.all_gather(list(lengths), torch.tensor([data.numel()]))
        longest = int(lengths.max())
        room, everything = data.new_zeros(longest), torch.empty(n, longest, dtype=torch.uint8, device=device)
        room[: data.numel()] = data
        if longest:
            dist.all_gather(list(everything), room)
    _worlds[-1].sent[what] += (n - 1) * longest
    return [part[:length] for part, length in zip(everything, lengths[:, 0].tolist(), strict=True)]
