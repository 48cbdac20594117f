"""A mixture's experts as ordinary linears. The library fuses the weights of all experts of a block into two tensors; here
every expert is a module of three linears again, with names like ``mlp.experts.3.gate_proj``. Routing stays the library's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from models.family import ModelFamily

READ_HIDDEN = (".gate_proj", ".up_proj")  # ends of the names of an expert's linears that read what it is called with


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)) for x [tokens, hidden]; weights on `meta`."""

    def __init__(self, hidden: int, inner: int, act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False, device="meta", dtype=dtype)
        self.up_proj = nn.Linear(hidden, inner, bias=False, device="meta", dtype=dtype)
        self.down_proj = nn.Linear(inner, hidden, bias=False, device="meta", dtype=dtype)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        """What it adds to a token, before the router's weight."""
        answer: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return answer


class Experts(nn.ModuleList):
    """The experts of a block, in the place of the library's fused module and with its signature."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """For every token the sum of its experts' answers times their weights.

        hidden_states [tokens, hidden]; top_k_index int64 and top_k_weights [tokens, k]: experts of a token, and their weights.
        """
        total = torch.zeros_like(hidden_states)
        for number, token, place in routed(top_k_index, len(self)):
            answer = self[number](hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, answer.to(total.dtype))
        return total


def routed(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens in their order, where among a token's k it stands) for every expert that has tokens."""
    order = torch.argsort(top_k_index.flatten(), stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=experts)[:experts].tolist()  # those beyond: padding
    for number, entries in enumerate(order[: sum(counts)].split(counts)):
        if entries.numel():
            yield number, entries // top_k_index.shape[1], entries % top_k_index.shape[1]


class Gate(nn.Module):
    """A linear that says how much something counts, which is never quantized: like the library's routers, no `nn.Linear`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] times the weight [out, in]."""
        return F.linear(x, self.weight)


def separated(fused: nn.Module) -> Experts:
    """The experts of a fused module of the library, with weights on `meta`. Its parameters gate_up_proj [experts, 2·inner,
    hidden] (gates first) and down_proj [experts, hidden, inner] are for products from the left, without biases."""
    gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
    experts, hidden, inner = down.shape
    assert gate_up.shape == (experts, 2 * inner, hidden)
    act: Callable[[Tensor], Tensor] = fused.act_fn  # type: ignore[assignment]
    return Experts(Expert(hidden, inner, act, down.dtype) for _ in range(experts))


def separate_experts(blocks: nn.ModuleList, family: ModelFamily) -> None:
    """Put separate experts, and gates that are no linears, into the blocks of a mixture."""
    for block in blocks if family.gates else ():
        for name, module in dict(block.named_modules()).items():
            if name == family.experts:
                block.set_submodule(name, separated(module))
            elif name in family.gates and isinstance(module, nn.Linear):
                block.set_submodule(name, Gate(module.get_parameter("weight")))
