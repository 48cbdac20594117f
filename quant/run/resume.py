"""What learning starts from besides the model: files of activation ranges, and the learned parameters of another run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from models.load import LazyModel
from quant.core.errors import InputError
from quant.core.files import json_sha256
from quant.learn.parametrization import InputRange
from quant.run.config import RunConfig
from quant.run.directory import Record, RunDirectory


def check_ranges(run: RunConfig, model: LazyModel, model_sha256: str) -> None:
    """Raise InputError where a file of ranges was measured on another model, lacks an entry of this one, or holds what
    cannot be a range: numbers that are not finite, or scales below 0."""
    for flag, path in (("--act-scales", run.act_scales), ("--act-shifts", run.act_shifts)):
        if path is None:
            continue
        if run.rotation is not None:
            raise InputError(
                f"{flag} {path} was measured on the model as it is, not rotated: leave it out with --rotate"
            )
        with _vectors(path) as file:
            digest = (file.metadata() or {}).get("model_sha256", model_sha256)  # others' files do not say
            if digest != model_sha256:
                raise InputError(
                    f"{path} was not made from this model but from one of hash {digest[:12]}, "
                    f"this one's is {model_sha256[:12]}; run generate_act_scale_shift.py on this one"
                )
            names = set(file.keys())
            for index in range(min(run.num_layers, len(model.blocks))):
                for name, (_, n_in) in model.linear_shapes().items():
                    key = f"{model.family.blocks}.{index}.{name}"
                    if key not in names or file.get_slice(key).get_shape() != [n_in]:
                        raise InputError(f"{path} was not made from this model: it has no {key} of {n_in} channels")
                    vector = file.get_tensor(key)
                    if not bool(torch.isfinite(vector).all()):
                        raise InputError(f"{flag} {path}: {key} has entries that are not finite; make the file again")
                    if path is run.act_scales and bool((vector < 0).any()):
                        raise InputError(
                            f"{flag} {path}: {key} has negative entries, which no largest |x| is; "
                            "are --act-scales and --act-shifts exchanged?"
                        )


def input_ranges(run: RunConfig, model: LazyModel, index: int) -> dict[str, InputRange] | None:
    """Ranges of block ``index`` from the files given, which `check_ranges` found whole; None if there are none."""
    if run.act_scales is None:
        return None
    keys = {name: f"{model.family.blocks}.{index}.{name}" for name in model.linear_shapes()}
    with _vectors(run.act_scales) as file:
        scales = {name: file.get_tensor(key).float() for name, key in keys.items()}
    shifts = {name: torch.zeros_like(scale) for name, scale in scales.items()}
    if run.act_shifts is not None:
        with _vectors(run.act_shifts) as file:
            shifts = {name: file.get_tensor(key).float() for name, key in keys.items()}
    return {name: InputRange(scales[name], shifts[name]) for name in keys}


@contextmanager
def _vectors(path: Path) -> Iterator[Any]:
    """A safetensors file of named vectors, opened. Raises InputError if it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a safetensors file ({error}); make it with generate_act_scale_shift.py"
        ) from error


def check_source(path: Path, configuration: Record, model_sha256: str) -> str:
    """The hash of the run in ``path``, whose learned parameters a run of this configuration starts from.

    Raises InputError if that is no run, if they were learned on another model or for another quantization, or if a
    block is missing or damaged.
    """
    source = RunDirectory(path)
    manifest = source.read("manifest.json")
    if manifest is None:
        raise InputError(f"--resume {path}: no manifest.json; give the run directory that holds learned parameters")
    try:
        before: Record = manifest["configuration"]
        theirs, own = _meaning_of(before), _meaning_of(configuration)
        digest, model = before["model_sha256"], manifest["model"]["id"]
    except (AttributeError, KeyError, TypeError) as error:  # JSON of some other shape
        raise InputError(
            f"--resume {path}: manifest.json is not of a run of this version (no {error}); give a run directory"
        ) from error
    if digest != model_sha256:
        raise InputError(f"--resume {path}: its parameters were learned on another model ({model})")
    if not before.get("learning"):
        raise InputError(f"--resume {path}: nothing was learned there ({before['method']})")
    for name in own:
        if theirs.get(name) != own[name]:
            raise InputError(
                f"--resume {path}: its parameters were learned for another configuration "
                f"({name}: {theirs.get(name)}, here {own[name]})"
            )
    for index in range(configuration["blocks"]):
        if not source.block_file(index).exists():
            raise InputError(f"--resume {path}: block {index} was not finished there; finish that run first")
        source.read_summary(index)  # the header is there, and fits the size of the file
    return json_sha256(before)


def _meaning_of(configuration: Record) -> Record:
    """What the meaning of a configuration's learned parameters depends on, by name.

    How they were trained (epochs, rates, losses), where they started and what rounds afterwards may differ.
    """
    learning: Record = configuration["learning"] or {}
    transform = learning.get("transform", {})
    return (
        {"method": method_that_learned(configuration)}
        | {name: configuration[name] for name in ("wbits", "group_size", "symmetric", "levels")}
        | {"rotation": configuration.get("rotation")}
        | {"column_scales": configuration.get("column_scales", False)}
        | {f"activations, {name}": value for name, value in configuration["act"].items()}
        | {name: learning.get(name) for name in ("clip", "compensation", "extra_ingredients")}
        | {f"transform, {k}": v for k, v in transform.items() if k not in ("alpha", "stability", "precise")}
    )


def method_that_learned(configuration: Record) -> str:
    """The method's name without the solver, which the name of a run may add to it (``omniquant+gptq``)."""
    method: str = configuration["method"]
    name, _, last = method.rpartition("+")
    return name.rstrip() if name and last.strip() == configuration["solver"] else method
