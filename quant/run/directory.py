"""The run directory: what is on disk is whole, or is not there.

manifest.json, journal.jsonl, blocks/NNNNN.safetensors, outside.safetensors (head and embedding), results.json. Every file is written to a temporary name,
synced and renamed. A block's file carries its journal lines, so the journal is rebuilt from the blocks when a
killed run is continued.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from quant.blocks.stream import STORE
from quant.blocks.weights import BlockWeights
from quant.core import ranks
from quant.core.errors import InputError, RunError
from quant.core.files import (
    RECORD,
    RECORD_LOCK,
    TEMPORARY,
    check_plain_file,
    hold_lock,
    read_json,
    read_record,
    sha256_of_file,
    unlink_all,
    write_atomically,
    write_json,
)
from quant.core.types import QuantizedWeight
from quant.run.answers import answer_in, tensors_of
from quant.run.linear import LinearRecord

Record = dict[str, Any]
SCHEMA = 1
LOCK = "run.lock"
TUNING = "tuning.safetensors"  # where tuning the model stands
LEARNING = "learning.safetensors"  # where learning of all blocks together stands
ROTATION = "rotation.safetensors"  # learned rotations of the model that the run is of
OUTSIDE = "outside"  # in the place of a block's number: what is quantized outside the blocks
OUTSIDE_FILE = f"{OUTSIDE}.safetensors"
PLAN = "bits.json"  # widths of the linears of a run with mixed bits
OWN_FILES = ("manifest.json", "journal.jsonl", "results.json", RECORD, TUNING, LEARNING, ROTATION, PLAN, OUTSIDE_FILE)
BLOCK_FILE = re.compile(r"[0-9]{5,}\.safetensors")
Which = int | str  # a block's number, or OUTSIDE
CHANGED, LEARNED = "changed/", "learned/"  # prefixes of a block file's other tensors


@dataclass(frozen=True)
class BlockSummary:
    """What stays in memory of a finished block: its journal records, seconds by stage, a hash of what is deployed,
    and how learning and tuning went (losses, events). behind: of what is outside the blocks, the hash of those that it was
    solved behind."""

    records: list[LinearRecord]
    seconds: Mapping[str, float]
    codes_sha256: str
    learning: Mapping[str, Any] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    behind: str = ""

    def to_json(self) -> Record:
        """As a block's file keeps it."""
        stored = {**vars(self), "records": [record.to_json() for record in self.records]}
        return {name: value for name, value in stored.items() if value or name not in ("tuning", "behind")}

    @classmethod
    def from_json(cls, stored: Record) -> BlockSummary:
        """Raises TypeError or KeyError for what is no summary."""
        return cls(**{**stored, "records": [LinearRecord.from_json(record) for record in stored["records"]]})


class RunDirectory:
    """One run on disk. ``open`` decides whether there is something to continue."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks = path / "blocks"
        self._verified: set[Which] = set()  # blocks whose tensors had their hash when they were first read

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Make the directory, and keep processes of other jobs out of it; of this job the first one does. Raises InputError
        where the place cannot be written or holds files of others, or another process holds it."""
        if not ranks.is_first():
            yield
            return
        if self.path.is_dir():
            try:
                self._check_place()  # before anything is made there
            except InputError:
                if not (self.path / LOCK).exists():
                    raise  # else another process is at work, and what is here is looked at again under the lock
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold_lock(self.path / LOCK, f"the run directory {self.path}"))
                self.blocks.mkdir(exist_ok=True)
            except OSError as error:
                reason = error.strerror or str(error)
                raise InputError(f"cannot write the run directory {self.path}: {reason}; use --run-dir") from error
            yield

    def _check_place(self) -> tuple[Record | None, list[Path]]:
        """The manifest that is here, and files of others. Raises InputError where they are no place for a run."""
        self.check_links()
        previous, others = self.read("manifest.json"), self._contents()[1]
        if previous is None and others:
            raise InputError(
                f"{self.path} holds other files ({others[0].name}, ...); give --run-dir an empty directory"
            )
        if previous is not None:
            check_manifest(previous, self.path / "manifest.json")
        return previous, others

    def open(self, manifest: Record, overwrite: bool) -> list[Path]:
        """Start a run, or continue the one that is here if its configuration is the same. overwrite: discard that one,
        file by file; returns what else lies there, which stays. Of several processes the first does, and all see it.

        Raises InputError with the differences if it is another, if what is here is not a run, or where a process does not see
        what another one wrote.
        """
        others = [Path(name) for name in ranks.from_first(lambda: list(map(str, self._open(manifest, overwrite))))]
        if ranks.size() > 1:
            digest = ranks.from_first(lambda: sha256_of_file(self.path / "manifest.json"))
            path = self.path / "manifest.json"
            if not path.exists() or sha256_of_file(path) != digest:
                raise InputError(
                    f"process {ranks.rank()} of the job does not see the run directory {self.path} as the first one wrote it: "
                    "give --run-dir a place that all machines share"
                )
        return others

    def _open(self, manifest: Record, overwrite: bool) -> list[Path]:
        previous, others = self._check_place()
        if previous is not None and overwrite:
            self._discard()
            previous = None
        unlink_all(file for file in self._contents()[0] if TEMPORARY.fullmatch(file.name))
        if previous is None:
            write_json(self.path / "manifest.json", manifest)
            return others
        old, new = previous["configuration"], manifest["configuration"]
        changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if changed:
            raise InputError(
                f"{self.path} holds a run of another configuration ({'; '.join(changed)}); "
                "use another --run-dir, or --overwrite to discard it"
            )
        return others

    def add_to_manifest(self, entries: Record) -> None:
        """Say in the manifest what was not known at the start. Raises InputError where it is damaged."""
        write_json(self.path / "manifest.json", (self.read("manifest.json") or {}) | entries)

    def _contents(self) -> tuple[list[Path], list[Path]]:
        """The files here that a run writes, and what else lies here, from one look: a process may be writing."""
        record = read_record(self.path)
        own: list[Path] = []
        others: list[Path] = []
        for file in (*self.path.iterdir(), *(self.blocks.iterdir() if self.blocks.is_dir() else ())):
            if file not in (self.blocks, self.path / LOCK, self.path / RECORD_LOCK):
                (own if self._is_own(file, record) else others).append(file)
        return own, sorted(others)

    def _is_own(self, file: Path, record: Mapping[str, list[str]]) -> bool:
        """Whether a run wrote a file: by its name, a block by its header, a page by its hash in ``record``; a temporary file,
        which a process left that was killed, by the name that it was to get."""
        temporary = TEMPORARY.fullmatch(file.name)
        name = temporary["name"] if temporary else file.name
        if file.parent == self.blocks:
            return BLOCK_FILE.fullmatch(name) is not None and (temporary is not None or _is_block(file))
        if name in (TUNING, LEARNING):
            return temporary is not None or _is_state(file)
        if name == OUTSIDE_FILE:
            return temporary is not None or _is_block(file)
        if name in OWN_FILES:
            return True
        if temporary:
            return name == STORE or name in record
        return name in record and _is_one_of(file, record[name])

    def _discard(self) -> None:
        """Delete the files of the run, the manifest last: until then it says whose the others are."""
        manifest = self.path / "manifest.json"
        unlink_all(file for file in self._contents()[0] if file != manifest)
        unlink_all([manifest])
        self._verified.clear()

    def drop_tuning(self) -> None:
        """Delete where tuning stood, once nothing is left of it."""
        self._drop(TUNING)

    def drop_learning(self) -> None:
        """Delete where learning of all blocks together stood, once every block is solved with what came out of it."""
        self._drop(LEARNING)

    def _drop(self, state: str) -> None:
        if _is_state(self.path / state):
            unlink_all([self.path / state])

    def check_links(self) -> None:
        """Raise InputError where a name of a run's files is a link: writing there would write somewhere else."""
        for file in (self.blocks, *(self.path / name for name in OWN_FILES)):
            if file.is_symlink():
                raise InputError(f"{file} is a link to another place: give --run-dir another directory")

    def read(self, name: str) -> Record | None:
        """A JSON file of the run, or None if it is not there. Raises InputError if it is damaged."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return read_json(path)
        except InputError as error:
            raise InputError(f"{error}; give another run directory, or move the file away") from error

    def block_file(self, index: Which) -> Path:
        """Where block ``index`` is kept, or what is outside of all."""
        return self.path / OUTSIDE_FILE if index == OUTSIDE else self.blocks / f"{index:05d}.safetensors"

    def finished_blocks(self) -> list[BlockSummary]:
        """The leading blocks that are done; the journal is rewritten to hold exactly their lines."""
        stored = ranks.from_first(lambda: [summary.to_json() for summary in self._finished_blocks()])
        return [BlockSummary.from_json(one) for one in stored]

    def _finished_blocks(self) -> list[BlockSummary]:
        done: list[BlockSummary] = []
        while self.block_file(len(done)).exists():
            done.append(self.read_summary(len(done)))
        lines = "".join(_journal_lines(block.records) for block in done)
        write_atomically(self.path / "journal.jsonl", lines.encode())
        return done

    def finished_outside(self, behind: str) -> BlockSummary | None:
        """What was quantized outside the blocks, behind blocks with this hash; None where that is not done. Its lines are
        added to the journal, as `finished_blocks` left it."""
        stored = ranks.from_first(lambda: self._finished_outside(behind))
        return None if stored is None else BlockSummary.from_json(stored)

    def _finished_outside(self, behind: str) -> Record | None:
        if not self.block_file(OUTSIDE).exists():
            return None
        summary = self.read_summary(OUTSIDE)
        if summary.behind != behind:
            return None
        self._add_to_journal(summary.records)
        return summary.to_json()

    def write_block(
        self,
        index: Which,
        weights: Mapping[str, QuantizedWeight],
        records: list[LinearRecord],
        seconds: Mapping[str, float],
        *,
        changed: BlockWeights | None = None,
        learned: Mapping[str, Tensor] | None = None,
        learning: Mapping[str, Any] | None = None,
        tuning: Mapping[str, Any] | None = None,
        behind: str = "",
    ) -> BlockSummary:
        """Keep a finished block, then add its lines to the journal.

        changed: what is deployed otherwise than in the checkpoint, besides the solved linears. learned: parameters to
        continue from.
        """
        others = changed.named() if changed else {}
        tensors = {CHANGED + name: tensor.cpu().contiguous() for name, tensor in others.items()}
        solved, linears = tensors_of(weights)
        tensors |= solved
        summary = BlockSummary(
            records, dict(seconds), _digest(tensors), dict(learning or {}), dict(tuning or {}), behind
        )
        tensors |= {LEARNED + name: tensor.cpu().contiguous() for name, tensor in (learned or {}).items()}
        metadata = {"format": "pt", "linears": json.dumps(linears), "summary": json.dumps(summary.to_json())}
        if ranks.is_first():  # all of them hold the same answers
            write_atomically(self.block_file(index), save(tensors, metadata))
            self._add_to_journal(records)
        self._verified.discard(index)
        if len(set(ranks.all_told(summary.codes_sha256))) > 1:  # behind it, whoever reads the block finds it
            raise RunError(f"{self.block_file(index)}: the processes of this job hold other answers than the first one")
        return summary

    def _add_to_journal(self, records: Sequence[LinearRecord]) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(self.path / "journal.jsonl", flags, 0o666), "w") as stream:
            stream.write(_journal_lines(records))

    def read_summary(self, index: Which) -> BlockSummary:
        """Records, seconds and hash of a finished block, without its tensors."""
        with self._open_block(index) as file:
            return BlockSummary.from_json(json.loads(file.metadata()["summary"]))

    def read_weights(self, index: Which) -> dict[str, QuantizedWeight]:
        """The solved linears of a finished block, by name. Raises InputError where they are not those that were solved."""
        with self._open_block(index) as file:
            self._verify(index, file)
            entries = json.loads(file.metadata()["linears"])
            return {name: answer_in(file.get_tensor, name, entry).check() for name, entry in entries.items()}

    def read_changed(self, index: int) -> BlockWeights:
        """What a finished block deploys otherwise than the checkpoint, besides the solved linears."""
        with self._open_block(index) as file:
            self._verify(index, file)
        return BlockWeights.from_named(self._read_prefixed(index, CHANGED))

    def read_learned(self, index: int) -> dict[str, Tensor]:
        """The learned parameters of a finished block."""
        return self._read_prefixed(index, LEARNED)

    def _verify(self, index: Which, file: Any) -> None:
        """Raise ValueError where what a block deploys has not the hash that was kept with it; once a block."""
        if index in self._verified:
            return
        names = [name for name in file.keys() if not name.startswith(LEARNED)]  # noqa: SIM118
        if (
            _digest({name: file.get_tensor(name) for name in names})
            != json.loads(file.metadata()["summary"])["codes_sha256"]
        ):
            raise ValueError("its tensors have another hash than when they were written")
        self._verified.add(index)

    def _read_prefixed(self, index: int, prefix: str) -> dict[str, Tensor]:
        with self._open_block(index) as file:
            return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118

    @contextmanager
    def _open_block(self, index: Which) -> Iterator[Any]:
        """A block's file. Raises InputError if it is damaged or not there."""
        path = self.block_file(index)
        check_plain_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing; the command of the run solves it again") from error
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({error}); delete it and the later blocks, and run the command of that run again"
            ) from error


def _journal_lines(records: Sequence[LinearRecord]) -> str:
    return "".join(json.dumps(record.to_json()) + "\n" for record in records)


def check_manifest(manifest: Record, path: Path) -> None:
    """Raise InputError for a manifest that no run wrote: other programs have files of this name too."""
    parts = ("request", "configuration", "model", "versions")
    if manifest.get("schema") != SCHEMA or not all(isinstance(manifest.get(part), dict) for part in parts):
        raise InputError(f"{path} is not the manifest of a run: give another directory")


def _is_block(path: Path) -> bool:
    """Whether a file is one that a run wrote, or what is left of it: a block says so in its header."""
    try:
        return _holds(path, {"linears", "summary"})
    except (SafetensorError, OSError):
        return not path.is_symlink()


def _is_state(path: Path) -> bool:
    """Whether a file holds where tuning, or learning, stands."""
    try:
        return _holds(path, {"tuning"})
    except (SafetensorError, OSError):
        return False


def _holds(path: Path, names: set[str]) -> bool:
    """Whether the header of a file of tensors has entries of these names."""
    check_plain_file(path)
    with safe_open(path, framework="pt") as file:
        return names <= (file.metadata() or {}).keys()


def _is_one_of(path: Path, hashes: list[str]) -> bool:
    return path.is_file() and not path.is_symlink() and sha256_of_file(path) in hashes


def answers_sha256(answers: Mapping[str, QuantizedWeight]) -> str:
    """sha256 over the codes and grids of a block that is not written yet."""
    parts = {name: (one.codes, one.grid.scale, one.grid.base) for name, one in answers.items()}
    return _digest({f"{name}.{i}": t.cpu().contiguous() for name, own in parts.items() for i, t in enumerate(own)})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()
