"""The run directory: what is on disk is whole, or is not there.

manifest.json, journal.jsonl, blocks/NNNNN.safetensors, results.json. Every file is written to a temporary name,
synced and renamed. A block's file carries its journal lines, so the journal is rebuilt from the blocks when a
killed run is continued.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from quant.core.errors import InputError
from quant.core.types import BilevelScales, Grid, Outliers, QuantizedWeight, QuantSpec

Record = dict[str, Any]
CHANGED, LEARNED = "changed/", "learned/"  # prefixes of a block file's other tensors


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under its final name only when every byte is on disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON, indented for people, written atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


@dataclass(frozen=True)
class BlockSummary:
    """What stays in memory of a finished block: its journal records, seconds by stage, a hash of what is deployed,
    and how learning went (losses, events)."""

    records: list[Record]
    seconds: Mapping[str, float]
    codes_sha256: str
    learning: Mapping[str, Any] = field(default_factory=dict)


class RunDirectory:
    """One run on disk. ``open`` decides whether there is something to continue."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks = path / "blocks"
        self._verified: set[int] = set()  # blocks whose tensors had their hash when they were first read

    def open(self, manifest: Record, overwrite: bool) -> None:
        """Start a run, or continue the one that is here if its configuration is the same.

        Raises InputError with the differences if it is another, or if the place cannot be written.
        """
        try:
            if overwrite and (self.path / "manifest.json").exists():
                shutil.rmtree(self.path)
            self.blocks.mkdir(parents=True, exist_ok=True)
        except (OSError, NotADirectoryError) as error:
            raise InputError(f"cannot write the run directory {self.path}: {error.strerror}; use --run-dir") from error
        found = self.read("manifest.json")
        if found is None:
            others = [p.name for p in self.path.iterdir() if p != self.blocks and not p.name.endswith(".tmp")]
            if others:
                raise InputError(f"{self.path} holds other files ({others[0]}, ...); give --run-dir an empty directory")
            write_json(self.path / "manifest.json", manifest)
            return
        old, new = found.get("configuration"), manifest["configuration"]
        if not isinstance(old, dict):
            raise InputError(
                f"{self.path / 'manifest.json'} is no manifest of a run; delete {self.path} or use --overwrite"
            )
        changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        if changed:
            raise InputError(
                f"{self.path} holds a run of another configuration ({'; '.join(changed)}); "
                "use another --run-dir, or --overwrite to discard it"
            )

    def read(self, name: str) -> Record | None:
        """A JSON file of the run, or None if it is not there. Raises InputError if it is damaged."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            content: Any = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged; delete {self.path} and run its command again") from error
        if not isinstance(content, dict):
            raise InputError(f"{path} holds no JSON object; delete {self.path} and run its command again")
        return content

    def block_file(self, index: int) -> Path:
        """Where block ``index`` is kept."""
        return self.blocks / f"{index:05d}.safetensors"

    def finished_blocks(self) -> list[BlockSummary]:
        """The leading blocks that are done; the journal is rewritten to hold exactly their lines."""
        done: list[BlockSummary] = []
        while self.block_file(len(done)).exists():
            done.append(self.read_summary(len(done)))
        lines = [json.dumps(record) + "\n" for block in done for record in block.records]
        write_atomically(self.path / "journal.jsonl", "".join(lines).encode())
        return done

    def write_block(
        self,
        index: int,
        weights: Mapping[str, QuantizedWeight],
        records: list[Record],
        seconds: Mapping[str, float],
        *,
        changed: Mapping[str, Tensor] | None = None,
        learned: Mapping[str, Tensor] | None = None,
        learning: Mapping[str, Any] | None = None,
    ) -> BlockSummary:
        """Keep a finished block, then add its lines to the journal.

        changed: what is deployed otherwise than in the checkpoint, besides the solved linears. learned: parameters to
        continue from.
        """
        tensors = {CHANGED + name: tensor.cpu().contiguous() for name, tensor in (changed or {}).items()}
        linears: dict[str, Any] = {}
        for name, weight in weights.items():
            grid = weight.grid
            parts = {"codes": weight.codes, "scale": grid.scale, "zero": grid.zero, "g_idx": grid.g_idx}
            linears[name] = {"spec": weight.spec.to_json(), "qmax": grid.qmax, "info": dict(weight.info)}
            if weight.outliers is not None:
                parts |= {"outlier_index": weight.outliers.index, "outlier_value": weight.outliers.value}
                linears[name]["whole_columns"] = weight.outliers.whole_columns
            if grid.bilevel is not None:
                level = grid.bilevel
                parts |= {"scale_codes": level.codes, "scale_base": level.base, "scale_step": level.step}
                linears[name]["bilevel"] = {"bits": level.bits, "rows": level.rows}
            tensors |= {f"{name}.{part}": tensor.cpu().contiguous() for part, tensor in parts.items()}
        summary = BlockSummary(records, dict(seconds), _digest(tensors), dict(learning or {}))
        tensors |= {LEARNED + name: tensor.cpu().contiguous() for name, tensor in (learned or {}).items()}
        metadata = {"format": "pt", "linears": json.dumps(linears), "summary": json.dumps(asdict(summary))}
        write_atomically(self.block_file(index), save(tensors, metadata))
        self._verified.discard(index)
        with (self.path / "journal.jsonl").open("a") as stream:
            stream.write("".join(json.dumps(record) + "\n" for record in records))
        return summary

    def read_summary(self, index: int) -> BlockSummary:
        """Records, seconds and hash of a finished block, without its tensors."""
        with self._opened(index) as file:
            return BlockSummary(**json.loads(file.metadata()["summary"]))

    def read_weights(self, index: int) -> dict[str, QuantizedWeight]:
        """The solved linears of a finished block, by name. Raises InputError where they are not those that were solved."""
        with self._opened(index) as file:
            self._verify(index, file)
            entries = json.loads(file.metadata()["linears"])
            return {name: _quantized(file, name, entry).check() for name, entry in entries.items()}

    def read_changed(self, index: int) -> dict[str, Tensor]:
        """What a finished block deploys otherwise than the checkpoint, besides the solved linears."""
        with self._opened(index) as file:
            self._verify(index, file)
        return self._read_prefixed(index, CHANGED)

    def read_learned(self, index: int) -> dict[str, Tensor]:
        """The learned parameters of a finished block."""
        return self._read_prefixed(index, LEARNED)

    def _verify(self, index: int, file: Any) -> None:
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
        with self._opened(index) as file:
            return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118

    @contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        """A block's file. Raises InputError if it is damaged or not there."""
        path = self.block_file(index)
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing; the command of the run solves it again") from error
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({error}); delete it and the later blocks, and run the command of that run again"
            ) from error


def _quantized(file: Any, name: str, entry: Record) -> QuantizedWeight:
    """One linear of an opened block file."""

    def part(which: str) -> Tensor:
        tensor: Tensor = file.get_tensor(f"{name}.{which}")
        return tensor

    bilevel = outliers = None
    if "bilevel" in entry:
        bilevel = BilevelScales(part("scale_codes"), part("scale_base"), part("scale_step"), **entry["bilevel"])
    if "whole_columns" in entry:
        outliers = Outliers(part("outlier_index"), part("outlier_value"), entry["whole_columns"])
    grid = Grid(part("scale"), part("zero"), part("g_idx"), entry["qmax"], bilevel)
    return QuantizedWeight(part("codes"), grid, QuantSpec(**entry["spec"]), entry["info"], outliers)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())  # numpy knows no bfloat16
    return digest.hexdigest()
