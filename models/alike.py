"""Which known families a model of an unknown type looks like, and whether it has what the family has that it is taken for, by
the linears and norms of its first block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from models.family import ModelFamily
from quant.core.errors import InputError, foreign


def alike(module: nn.Module, config: Any, families: Iterable[ModelFamily]) -> list[str]:
    """Model types of the families, one of each, whose names and shapes are those of a causal LM's first block."""
    return [family.model_types[0] for family in families if family.layout.is_plain and _fits(family, module, config)]


def _fits(family: ModelFamily, module: nn.Module, config: Any) -> bool:
    """Whether the first block has the linears of a family, with as many rows as its heads take, and the norms of its seams."""
    try:
        block = module.get_submodule(family.blocks)[0]  # type: ignore[index]
        groups, layout, seams = family.groups(config), family.heads(config), family.seams(config)
    except (AttributeError, TypeError):  # another path, or fields that this configuration does not have
        return False
    modules = dict(block.named_modules())
    linears = linears_of(block)
    if sorted(linears) != sorted(name for group in groups for name in group):
        return False
    rows = Counter[str]()
    for name, of_heads in (layout.q, layout.k, layout.v):
        rows[name] += of_heads.numel()
    norms = [norm for seam in seams if seam.kind == "norm" for norm in seam.producers]
    return (
        all(linears[name].out_features == count for name, count in rows.items())
        and linears[layout.output].in_features == layout.q[1].numel()
        and all(norm in modules for norm in norms)
    )


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by name."""
    return {name: linear for name, linear in block.named_modules() if isinstance(linear, nn.Linear)}


def check_linears(block: nn.Module, family: ModelFamily, config: Any) -> None:
    """Raise InputError where a block has other linears than a family says, or its configuration other fields."""
    what = f"this {config.model_type} model is none of the family {family.model_types[0]}"
    with foreign(what):
        declared = [name for group in family.groups(config) for name in group]
        family.heads(config)
        family.seams(config)
    if sorted(declared) != sorted(linears_of(block)):
        raise InputError(f"{what}: its linears are {', '.join(linears_of(block))}, not {', '.join(declared)}")
