"""What decides the codes of a run, and the run's name; and what decides its numbers once the codes are there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from quant.core.files import json_sha256
from quant.run.config import RunConfig
from quant.run.directory import Record
from quant.run.inputs import Inputs
from quant.run.resume import check_source


def configuration_of(inputs: Inputs, config: RunConfig) -> Record:
    """What decides the codes: two runs with equal configurations on one machine give the same bits."""
    tokens = inputs.calibration(config)
    decided = {
        "model_sha256": inputs.model_sha256,
        "calibration": None if tokens is None else f"{tokens.name} ({tokens.protocol}) {tokens.sha256[:16]}",
        "nsamples": config.nsamples,
        "seqlen": inputs.seqlen,
        "seed": config.seed,
        "method": config.method,
        "options": dict(config.options),
        "wbits": config.wbits,
        "group_size": config.group_size,
        "symmetric": config.symmetric,
        "range": config.range,
        "levels": config.levels,
        "solver": config.solver or config.method,
        "learning": config.learning.to_json() if config.learning else None,
        "act": asdict(config.act),
        "start": None,
        "act_ranges": [_file_digest(path) for path in (config.act_scales, config.act_shifts)],
        "attn_implementation": config.attn_implementation,
        "true_sequential": config.true_sequential,
        "blocks": inputs.n_blocks(config),
        "dtype": str(inputs.model.dtype).removeprefix("torch."),
        "solver_precision": config.solver_precision,
        "device": inputs.device.type,
        "calib_batch": config.calib_batch,
    }
    if inputs.device.type == "cuda":
        decided["deterministic"] = config.deterministic  # a CPU always is
    configuration: Record = json.loads(json.dumps(decided))  # as it will be read back: tuples are lists
    if config.resume is not None:
        configuration["start"] = check_source(config.resume, configuration, inputs.model_sha256)
    return configuration


def _file_digest(path: Path | None) -> str | None:
    if path is None or not path.exists():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def path_of(inputs: Inputs, config: RunConfig) -> Path:
    """``--run-dir``, or a name under ``runs`` that the configuration decides."""
    if config.run_dir is not None:
        return config.run_dir
    digest = json_sha256(configuration_of(inputs, config))[:8]
    bits = f"w{config.wbits}" + (f"a{config.act.bits}" if config.act.active else "")
    bits += f"g{config.group_size}" if config.group_size > 0 else ""
    name = Path(config.model).resolve().name if Path(config.model).exists() else config.model.replace("/", "--")
    return config.runs / f"{name}-{config.method if config.quantizes else 'base'}-{bits}-{digest}"


def evaluation_of(inputs: Inputs, config: RunConfig) -> Record:
    """What decides the numbers once the codes are there."""
    hashes = {name: tokens.sha256 for name, tokens in inputs.evaluation.items()}
    tasks = {"names": list(config.tasks), "num_fewshot": config.num_fewshot, "limit": config.limit}
    return {
        "token_sha256": hashes,
        "limit": config.limit,
        "full_precision": config.full_precision_eval,
        "packed": config.packed,
        "tasks": tasks if inputs.tasks else None,
    }
