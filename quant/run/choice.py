"""The format that --real_quant saves in where none is named, for both command lines."""

from __future__ import annotations

from dataclasses import replace

from models.load import load_config
from quant.export import first_holding
from quant.run.config import RunConfig, content_of
from quant.run.plan import shapes_of

FALLBACK = "bitplane"  # holds every answer of every solver, also scales that turn out not to be fp16 numbers


def in_packed_format(config: RunConfig) -> RunConfig:
    """The configuration with the first packed format that holds what comes of it, by the shapes of the model alone.

    Answers that turn out not to fit are saved in FALLBACK, unless a target is named, which may not load that. Raises
    InputError where no format holds it, or where the model cannot be described.
    """
    declared, _ = load_config(config.model, config.cache_dir, config.trust_remote_code, with_weights=False)
    shapes = shapes_of(declared, config.trust_remote_code)
    named = {name: (out, n_in) for name, out, n_in in shapes.linears}
    kind = first_holding(content_of(config, named, shapes.n_blocks, declared.model_type))
    return replace(config, format=kind, fallback=None if config.target else FALLBACK)
