"""What of a checkpoint no parameter of the model reads: nothing of it is passed over in silence."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.checkpoint import Checkpoint
from quant.core.errors import InputError

log = logging.getLogger(__name__)
# What older files hold and the library computes itself, by name: rotary frequencies, causal masks.
RECOMPUTED = (r"inv_freq$", r"(cos|sin)_cached$", r"\.masked_bias$")
ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|adapters?|ia3_\w+|prompt_embeddings?)(\.|$)")
SHOWN = 3  # names in a message


def spellings(name: str, module: nn.Module) -> tuple[str, ...]:
    """Names that a checkpoint may have for a module's tensor: hub files of older models lack or add the base prefix."""
    prefix = f"{module.base_model_prefix}."
    return tuple(dict.fromkeys((name, name.removeprefix(prefix), prefix + name)))


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong into a checkpoint; all others are computed."""
    saved = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def own_head(module: nn.Module, checkpoint: Checkpoint) -> str | None:
    """The tensor that the module ties to another, but that has values of its own in the checkpoint (as after full
    fine-tuning of both); None where all ties hold."""
    ties: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    for pair in ties.items():
        tied, source = (next((n for n in spellings(name, module) if n in checkpoint), None) for name in pair)
        if tied and source and not same_values(checkpoint, tied, source):
            return tied
    return None


def same_values(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors of a checkpoint hold the same numbers, in whatever dtypes."""
    if checkpoint.shape(first) != checkpoint.shape(second):
        return False
    a, b = checkpoint.read(first), checkpoint.read(second)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.equal(a.to(dtype), b.to(dtype))


def carried_over(module: nn.Module, blocks: str, n_blocks: int, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Names of tensors that no parameter reads and a saved checkpoint keeps, said in one warning: heads for other tasks,
    further modules. Buffers that the checkpoint holds are kept too.

    blocks: path of the list of blocks. Raises InputError for what would change the numbers: tensors of blocks that are
    not there, of modules that have no such parameter, of adapters, and a second spelling of a name with other values.
    """
    modules = {spelt for name, _ in module.named_modules() if name for spelt in spellings(name, module)}
    rest = list(_unread(module, checkpoint))
    if other := _other_frequencies(module, checkpoint):
        log.warning("%s: %s is not what config.json gives, which is computed with", checkpoint.path, other)
    for name in rest:
        owner, inside = name.rpartition(".")[0], _block_of(name, module, blocks)
        if ADAPTER.search(name):
            raise InputError(
                f"{checkpoint.path}: {name} belongs to an adapter: merge it into the model first (peft: merge_and_unload)"
            )
        reason = ""
        if inside is not None and inside >= n_blocks:
            reason = f"belongs to none of the {n_blocks} blocks that config.json describes"
        elif inside is not None or owner in modules:
            reason = "has no place in the model that config.json describes, and would change what it computes"
        if reason:
            raise InputError(f"{checkpoint.path}: {name} {reason}; the checkpoint does not fit its config.json")
    if rest:
        shown = ", ".join(rest[:SHOWN]) + (f" and {len(rest) - SHOWN} more" if len(rest) > SHOWN else "")
        log.warning("%s: no parameter of the model reads %s; saved checkpoints keep them", checkpoint.path, shown)
    buffers = (spelt for name in saved_buffers(module) for spelt in spellings(name, module))
    return (*rest, *(name for name in buffers if name in checkpoint))


def _unread(module: nn.Module, checkpoint: Checkpoint) -> Iterator[str]:
    """Names that nothing reads, without those that are known to mean nothing. Raises InputError where one tensor stands
    under two names with different values."""
    held = dict.fromkeys([*module.state_dict(keep_vars=True), *(name for name, _ in module.named_buffers())])
    known = set(checkpoint.extra)
    for name in held:
        there = [spelt for spelt in spellings(name, module) if spelt in checkpoint]
        known.update(there)
        for other in there[1:]:
            if not same_values(checkpoint, there[0], other):
                raise InputError(f"{checkpoint.path}: {there[0]} and {other} are one tensor with different values")
    ignored = (*RECOMPUTED, *(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()))
    for name in checkpoint.names():
        if name in known or any(re.search(pattern, name) for pattern in ignored):
            continue
        # auto-gptq wrote biases of zeros where a model has none
        if not (name.endswith(".bias") and not bool(checkpoint.read(name).any())):
            yield name


def _other_frequencies(module: nn.Module, checkpoint: Checkpoint) -> str | None:
    """Rotary frequencies in a checkpoint that are not those of config.json, beyond rounding to 16 bits; older files hold
    them. Where positions are scaled they may be those before scaling, and are not compared."""
    settings = getattr(module.config, "rope_parameters", None) or {}
    computed = [buffer.float() for name, buffer in module.named_buffers() if name.endswith("inv_freq")]
    if settings.get("rope_type") != "default" or not computed:
        return None
    for name in checkpoint.names():
        if name.endswith("inv_freq"):
            stored = checkpoint.read(name).float()
            close = (torch.allclose(stored, own, 2.0**-7, 2.0**-24) for own in computed if own.shape == stored.shape)
            if not any(close):
                return name
    return None


def _block_of(name: str, module: nn.Module, blocks: str) -> int | None:
    """The index of the block that a tensor's name puts it in; None outside of the blocks."""
    for prefix in spellings(blocks, module):
        if match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name):
            return int(match[1])
    return None
