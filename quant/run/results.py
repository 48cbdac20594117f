"""What a run says of itself: manifest.json before the work, results.json after it."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from data.calibration import Tokens
from models.checkpoint import RESULTS, unlike_written
from models.load import LazyModel
from quant.blocks.weights import BlockWeights
from quant.core import env
from quant.core.files import read_json
from quant.core.names import BLOCK_STAGES
from quant.export.read import QuantizedCheckpoint
from quant.export.target import OWN, is_complete
from quant.kernels.columns import describe as describe_kernels
from quant.run.config import RunConfig
from quant.run.directory import BlockSummary, Record
from quant.run.linear import LinearRecord
from quant.run.request import Request
from quant.run.rotating import LearnedRotation
from quant.run.sizes import block_storage, plain_storage, whole_storage


def manifest_of(
    request: Request,
    configuration: Record,
    model: LazyModel,
    device: torch.device,
    calibration: Tokens | None,
    evaluation: Iterable[Tokens],
) -> Record:
    """The command, the configuration, and what it runs on and with. configuration: what decides the codes."""
    return {
        "schema": 1,
        "command": sys.argv,
        "request": request.to_json(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "configuration": configuration,
        "seed": request.run.seed,
        "model": {
            "id": request.session.model,
            "sha256": configuration["model_sha256"],
            "model_type": model.config.model_type,
            "added_biases": len(model.added),
        },
        "calibration": calibration and {"name": calibration.name} | _describe(calibration),
        "evaluation": {tokens.name: _describe(tokens) for tokens in evaluation},
        "versions": env.versions(),
        "commit": env.commit(),
        "hardware": env.describe(device),
        "kernels": describe_kernels(device),
    }


def _describe(tokens: Tokens) -> Record:
    return {
        "protocol": tokens.protocol,
        "sha256": tokens.sha256,
        "text_sha256": tokens.text_sha256,
        "shape": list(tokens.ids.shape),
    }


def results_of(
    run: RunConfig,
    blocks: Sequence[BlockSummary],
    model: LazyModel,
    rotation: LearnedRotation | None = None,
    outside: BlockSummary | None = None,
) -> Record:
    """The entries of results.json that come from the codes and the journal. rotation: of the model, where it was learned.
    outside: of head and embedding, which count in the size of the whole model and among the verdicts, and in no mean over the
    blocks' linears."""
    records = [record for block in blocks for record in block.records]
    bits, count = sum(r.storage_bits for r in records), sum(r.n_weights for r in records)
    stored = torch.finfo(model.storage_dtype).bits
    heldout = [r.relative_error_heldout for r in records if r.relative_error_heldout is not None]
    learned = [block.learning for block in blocks if block.learning]
    if not records:  # nothing was solved: the linears of these blocks stay in the checkpoint's dtype
        bits, count = plain_storage(model, len(blocks))
    turned: Record = dict(_online(model, len(blocks))) if run.rotation is not None else {}
    online = 16 * (sum(log["online_parameters"] for log in learned) + turned.get("online_parameters", 0))
    bits += online
    turned |= {} if rotation is None else {"learned": rotation.record}
    if not count and isinstance(model.checkpoint, QuantizedCheckpoint):
        bits, count = block_storage(model, model.checkpoint)
    beyond = outside.records if outside else []
    whole_bits, whole_count = whole_storage(model, [*records, *beyond], online)
    parts = [*blocks, *([outside] if outside else [])]
    tuned = [block.tuning for block in blocks if block.tuning]
    seconds = {stage: sum(block.seconds.get(stage, 0.0) for block in parts) for stage in BLOCK_STAGES}
    digest = hashlib.sha256("".join(part.codes_sha256 for part in parts).encode()).hexdigest()
    return {
        "schema": 1,
        "method": run.method if run.quantizes else "base",
        "wbits": run.wbits,
        **({} if run.avg_bits is None else {"avg_bits": run.avg_bits}),
        "abits": run.act.bits,
        **({"act_grid": run.act.kind} if run.act.kind != "integer" else {}),
        "kv_bits": run.act.kv_bits,
        "solver": run.solver,
        "options": dict(run.options),
        "group_size": run.group_size,
        "symmetric": run.symmetric,
        **({"grid_kind": run.grid_kind} if run.grid_kind != "integer" else {}),
        "bits_per_weight": bits / count if count else float(stored),
        "model_bits_per_weight": whole_bits / whole_count,
        "model_bytes": (whole_bits + 7) // 8,
        **{name: getattr(run, name) for name in ("head_bits", "embedding_bits") if getattr(run, name) is not None},
        "outlier_share": sum(r.outlier_share * r.n_weights for r in records) / count if records else 0.0,
        "entropy_bits": _entropy(run, records),
        "quantized_bytes": (bits + 7) // 8,
        "checkpoint_bytes": 0,
        "codes_sha256": digest,
        "zero_shot": {},
        "mean_relative_error": sum(r.relative_error for r in records) / len(records) if records else 0.0,
        "mean_relative_error_heldout": sum(heldout) / len(heldout) if heldout else None,
        "learning": learned,
        **({"tuning": tuned} if tuned else {}),
        **({"rotation": turned} if turned else {}),
        "verdicts": {v: sum(r.verdict == v for r in [*records, *beyond]) for v in ("ok", "look", "bad")},
        "seconds": seconds
        | {"calibrate": seconds["forward"] + seconds["gram"], "export": 0.0, "evaluate": 0.0, "tasks": 0.0},
    }


def _online(model: LazyModel, n_blocks: int) -> dict[str, int]:
    """Numbers that the first blocks of a rotated model hold beside their parameters, and flops a token of products with
    them; empty where all of a rotation is in the weights."""
    if not model.checkpoint.extra or not n_blocks:
        return {}
    weights, layout = BlockWeights.read(model, 0, torch.device("cpu")), model.family.heads(model.config)
    flops = weights.online_flops(layout.q[1].numel() + layout.k[1].numel())
    return {"online_parameters": n_blocks * weights.online_numbers(), "online_flops": n_blocks * flops}


def _entropy(run: RunConfig, records: Sequence[LinearRecord]) -> float | None:
    """Bits of a code if all were equally likely, on average over the weights; None where nothing was solved, and where linears
    have grids of other bits than asked for."""
    widths = {r.bits for r in records}
    if not records:
        return None
    if run.avg_bits is None:
        return math.log2(run.levels or 2**run.wbits) if widths == {run.wbits} else None
    return sum(r.bits * r.n_weights for r in records) / sum(r.n_weights for r in records)


def is_saved(save: Path, digest: str, kinds: Collection[str]) -> bool:
    """Whether ``save`` holds, whole and unchanged, the checkpoint of the configuration with this hash in one of these
    formats."""
    return any(is_whole(save, {"configuration_sha256": digest, "format": kind}) for kind in kinds)


def is_whole(directory: Path, entries: Record) -> bool:
    """Whether a directory holds a whole and unchanged checkpoint whose results.json has these entries."""
    path = directory / RESULTS
    stored = read_json(path) if path.exists() else {}
    same = all(stored.get(key) == value for key, value in entries.items())
    complete = OWN not in stored or is_complete(directory)  # earlier versions did not list all files
    return same and complete and bool(stored.get("files_sha256")) and unlike_written(directory, stored) is None
