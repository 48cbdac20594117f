"""The two matrices of a model that have a row a token: the embedding in front of the blocks and the head behind them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quant.core.errors import InputError


@dataclass(frozen=True)
class Vocabulary:
    """Names of the modules in the whole model, and (rows, columns) of their weights. tied: both have one weight, which then
    is a parameter of the embedding."""

    embedding: str
    head: str
    embedding_shape: tuple[int, int]
    head_shape: tuple[int, int]
    tied: bool


def vocabulary_of(model: nn.Module) -> Vocabulary:
    """Where a causal LM has its embedding and its head. Raises InputError where they are no `nn.Embedding` and `nn.Linear`."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        kinds = f"{type(embedding).__name__} and {type(head).__name__}"
        raise InputError(
            f"embedding and head of this model are {kinds}, which are not quantized: leave them as they are"
        )
    names = {module: name for name, module in model.named_modules()}
    shapes = [(module.weight.shape[0], module.weight.shape[1]) for module in (embedding, head)]
    return Vocabulary(names[embedding], names[head], shapes[0], shapes[1], tied=embedding.weight is head.weight)
