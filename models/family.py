"""What the toolkit knows of a model family: where its blocks are and in which order their linears are solved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ModelFamily:
    """Declares a family; dispatch is on ``config.model_type`` alone.

    blocks: path of the list of decoder blocks in the causal-LM module. groups(config): names of the linears
    inside a block in order of execution; linears of one group read the same input and share one Gram matrix.
    """

    model_types: tuple[str, ...]
    blocks: str
    groups: Callable[[Any], Groups]
