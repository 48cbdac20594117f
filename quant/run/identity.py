"""What decides the codes of a run, and the run's name; and what decides its numbers once the codes are there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from quant.core import ranks
from quant.core.files import json_sha256
from quant.learn.config import Rotation
from quant.run.config import BY_WHAT_IT_NAMES, DECIDES_CODES, WHERE_IT_DIFFERS, Output, RunConfig
from quant.run.directory import Record
from quant.run.inputs import Inputs
from quant.run.resume import check_source
from quant.tune.config import Tuning


def configuration_of(inputs: Inputs, run: RunConfig) -> Record:
    """What decides the codes: two runs with equal configurations on one machine give the same bits.

    Every field of the run and those of the session that say so, as they are; of fields that name something, what that is.
    """
    tokens = inputs.calibration(run) if run.quantizes else None
    decided = {f.name: getattr(inputs.config, f.name) for f in fields(inputs.config) if f.metadata == DECIDES_CODES}
    decided |= {
        f.name: getattr(run, f.name) for f in fields(run) if f.metadata not in (BY_WHAT_IT_NAMES, WHERE_IT_DIFFERS)
    }
    later = [(part, f) for part in (inputs.config, run) for f in fields(part) if f.metadata == WHERE_IT_DIFFERS]
    decided |= {f.name: value for part, f in later if (value := getattr(part, f.name)) != f.default}
    decided |= {
        "model_sha256": inputs.model_sha256,
        "calibration": None if tokens is None else f"{tokens.name} ({tokens.protocol}) {tokens.sha256[:16]}",
        "seqlen": inputs.seqlen,
        "method": run.method,
        "options": dict(run.options),
        "learning": run.learning.to_json() if run.learning else None,
        "act": run.act.to_json(),
        "start": None,
        "act_ranges": [_file_digest(path) for path in (run.act_scales, run.act_shifts)],
        "blocks": inputs.n_blocks(run),
        "dtype": str(inputs.model.dtype).removeprefix("torch."),
        "device": inputs.device.type,
    }
    if ranks.size() > 1 and run.quantizes:
        decided["processes"] = ranks.size()  # sums are added in other parts
    if inputs.device.type == "cuda":
        decided["deterministic"] = inputs.config.deterministic  # a CPU always is
    configuration: Record = json.loads(json.dumps(decided, default=_plain))  # as it will be read back: tuples are lists
    if run.resume is not None:
        configuration["start"] = check_source(run.resume, configuration, inputs.model_sha256)
    return configuration


def _plain(value: Any) -> Any:
    return value.to_json() if isinstance(value, Tuning | Rotation) else asdict(value)


def _file_digest(path: Path | None) -> str | None:
    if path is None or not path.exists():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def path_of(inputs: Inputs, run: RunConfig, output: Output) -> Path:
    """``--run-dir``, or a name under ``runs`` that the configuration decides."""
    if output.run_dir is not None:
        return output.run_dir
    digest = json_sha256(configuration_of(inputs, run))[:8]
    bits = f"w{run.width}" + (f"a{run.act.bits}" if run.act.active else "")
    bits += f"g{run.group_size}" if run.group_size > 0 else ""
    model = inputs.config.model
    name = Path(model).resolve().name if Path(model).exists() else model.replace("/", "--")
    return output.runs / f"{name}-{run.method if run.quantizes else 'base'}-{bits}-{digest}"


def evaluation_of(inputs: Inputs, output: Output) -> Record:
    """What decides the numbers once the codes are there."""
    session = inputs.config
    hashes = {name: tokens.sha256 for name, tokens in inputs.evaluation.items()}
    tasks = {"names": list(session.tasks), "num_fewshot": session.num_fewshot, "limit": session.limit}
    return {
        "token_sha256": hashes,
        "limit": session.limit,
        "full_precision": session.full_precision_eval,
        "packed": output.packed,
        "tasks": tasks if inputs.tasks else None,
    }
