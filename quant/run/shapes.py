"""Sizes of a model from its configuration alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models import family_for
from models.load import build_meta
from models.vocabulary import Vocabulary, vocabulary_of
from quant.run.config import DEFAULT_MAX_SEQLEN

Linears = tuple[tuple[str, int, int], ...]  # name in the block, out, in


@dataclass(frozen=True)
class Kind:
    """Sizes of blocks that are alike: parameters, and linears in groups that share an input. experts: of a mixture, the module
    that holds the experts; a token reaches a ``share`` of them."""

    parameters: int
    groups: tuple[Linears, ...]
    experts: str = ""
    share: float = 1.0

    @property
    def linears(self) -> Linears:
        """All linears of a block."""
        return tuple(linear for group in self.groups for linear in group)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear by its name in a block."""
        return {name: (out, n_in) for name, out, n_in in self.linears}

    @property
    def weights(self) -> int:
        """Entries of all linears."""
        return sum(out * n_in for _, out, n_in in self.linears)

    def is_routed(self, group: Linears) -> bool:
        """Whether linears are an expert's, which reads some tokens only."""
        return bool(self.experts) and group[0][0].startswith(f"{self.experts}.")

    @property
    def routed(self) -> tuple[Linears, ...]:
        """Groups of experts."""
        return tuple(group for group in self.groups if self.is_routed(group))

    @property
    def ordinary(self) -> tuple[Linears, ...]:
        """Groups that read every token."""
        return tuple(group for group in self.groups if not self.is_routed(group))

    @property
    def active(self) -> float:
        """Parameters that a token meets."""
        inside = sum(out * n_in for group in self.routed for _, out, n_in in group)
        return self.parameters - inside + self.share * inside if inside else self.parameters


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model: every block's kind, parameters outside, norms of a block that a matrix may stand behind, the linear
    behind the heads, and the size of one."""

    kinds: tuple[Kind, ...]
    outside: int
    hidden: int
    max_length: int
    heads: int = 1
    norms: int = 0
    vocabulary: int = 0
    output: str = ""
    head_dim: int = 0
    ends: Vocabulary | None = None

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return len(self.kinds)

    @property
    def block(self) -> int:
        """Parameters of the largest block."""
        return max(kind.parameters for kind in self.kinds)

    @property
    def groups(self) -> tuple[Linears, ...]:
        """Linears of a block in groups, where all blocks are alike."""
        return self.kinds[-1].groups

    @property
    def linears(self) -> Linears:
        """All linears by their names in a block; where blocks differ, of all."""
        named = {linear[0]: linear for kind in dict.fromkeys(self.kinds) for linear in kind.linears}
        return tuple(named.values())

    @property
    def active(self) -> float:
        """Parameters that a token meets."""
        return self.outside + sum(kind.active for kind in self.kinds)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.outside + sum(kind.parameters for kind in self.kinds)

    def first(self, n_blocks: int) -> Iterator[tuple[Kind, int]]:
        """The kinds of the first blocks, and how many of each there are."""
        yield from Counter(self.kinds[:n_blocks]).items()


def shapes_of(config: Any, trust_remote_code: bool = False) -> Shapes:
    """Sizes from a configuration alone; no weights are needed."""
    family = family_for(config)
    module = build_meta(config, torch.float32, trust_remote_code)
    blocks = module.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    kinds = tuple(_kind(block, family.groups_of(config, i), family.experts, config) for i, block in enumerate(blocks))
    outside = sum(p.numel() for p in module.parameters()) - sum(kind.parameters for kind in kinds)
    longest = int(getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_SEQLEN)
    layout = family.heads(config)
    heads, head_dim = layout.q[1].shape
    norms = sum(seam.kind == "norm" for seam in family.seams(config))
    return Shapes(
        kinds, outside, config.hidden_size, longest, heads, norms, config.vocab_size, layout.output, head_dim,
        vocabulary_of(module),
    )  # fmt: skip


def _kind(block: nn.Module, groups: tuple[tuple[str, ...], ...], experts: str, config: Any) -> Kind:
    modules = dict(block.named_modules())
    sized = tuple(
        tuple((name, modules[name].out_features, modules[name].in_features) for name in group) for group in groups
    )
    parameters = sum(p.numel() for p in block.parameters())
    if not experts or experts not in modules:  # a block without a mixture, also in front of those that have one
        return Kind(parameters, sized)
    return Kind(parameters, sized, experts, config.num_experts_per_tok / len(list(modules[experts].children())))
