"""A model as one GGUF file: codes of a run in llama.cpp's own blocks, exactly, beside everything else that it needs.

Embedding, head and linears that are not quantized keep their numbers (F16, BF16 or F32); vectors are F32, as llama.cpp's own
converter keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.gguf_architectures import ALWAYS_FLOAT32, architecture_for, stored_rows
from models.gguf_facts import Facts, facts_of, rotary_factors
from models.gguf_file import PLAIN as DTYPES
from models.gguf_layout import ROTARY
from models.gguf_tokens import vocabulary
from models.gguf_writer import FILE, GGUFFile, Place
from models.load import LazyModel
from models.mixtures import expert_count
from models.unread import spellings
from quant.core.errors import InputError
from quant.core.types import QuantizedWeight
from quant.export.gguf_types import TYPES as BLOCKS
from quant.export.gguf_types import encode, type_of

Stacked = list[Tensor] | list[QuantizedWeight]  # of all experts of a block
Value = Tensor | QuantizedWeight | Stacked
Entries = Callable[[], Iterator[tuple[str, Tensor | QuantizedWeight]]]
PLAIN = {dtype: kind for kind, dtype in DTYPES.items()}
TYPES = {one.type: one for one in BLOCKS}
MADE_BY = {"method": str, "bits_per_weight": float, "configuration_sha256": str, "codes_sha256": str}  # of results.json


@dataclass(frozen=True)
class GgufModel:
    """A model as the tensors of one file. entries: all of a checkpoint, weights with codes as they are, by names of
    parameters or of the checkpoint. facts: what the file says."""

    model: LazyModel
    facts: Facts
    entries: Entries

    @classmethod
    def of(
        cls,
        model: LazyModel,
        tokenizer: Any,
        entries: Entries,
        results: Mapping[str, Any],
    ) -> GgufModel:
        """Raises InputError for models and tokenizers that llama.cpp does not have, or computes otherwise."""
        return cls(model, _facts(model, tokenizer) | made_by(results), entries)

    def writer(self, directory: Path) -> GGUFFile:
        """The file in a directory, with its header. All codes are looked at first: they decide the types of blocks."""
        named, _ = architecture_for(self.model.config)
        return GGUFFile(directory / FILE, named, self.facts, [place for place, _ in self._placed()])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the file holds, in order. Raises InputError, with the linear's name, where no type holds its codes."""
        for place, value in self._placed():
            yield place.name, self._stored(place, value)

    def _placed(self) -> Iterator[tuple[Place, Value]]:
        _, architecture = architecture_for(self.model.config)
        factors = rotary_factors(self.model.config, self.model.family.heads(self.model.config))
        if factors is not None:
            yield Place(ROTARY, PLAIN[factors.dtype], tuple(factors.shape)), factors
        parameters = {spelt: name for name, _ in self.model.module.named_parameters()
                      for spelt in spellings(name, self.model.module)}  # fmt: skip
        waiting: dict[str, list[Any]] = {}  # of experts, until the last of a block is there
        for key, value in self.entries():
            if key not in parameters:
                continue  # carried for other software, read by no module
            if stack := architecture.stacked(parameters[key]):
                waiting.setdefault(stack, []).append(value)
                if len(waiting[stack]) == expert_count(self.model.config):
                    values = waiting.pop(stack)
                    yield _place(stack, key, values), values
                continue
            found = architecture.stored(parameters[key])
            if found is None:
                raise InputError(f"gguf: {key} has no place in a file of {self.model.config.model_type} models")
            yield _place(found[0], key, [value]), value

    def _stored(self, place: Place, value: Value) -> Tensor:
        """A tensor in the file's order of rows, numbers and type."""
        if isinstance(value, list):
            return torch.stack([self._stored(place, one) for one in value])
        if place.name == ROTARY:
            assert isinstance(value, Tensor)
            return value
        _, architecture = architecture_for(self.model.config)
        module = place.name.rpartition(".")[0].split(".")[-1]
        if isinstance(value, QuantizedWeight):
            rows = torch.from_numpy(encode(value, TYPES[place.type]))
        else:
            rows = value.to(DTYPES[place.type])
            if architecture.offset and module.endswith("norm"):
                rows = rows + architecture.offset
        undo = architecture.undo.get(module)
        if undo is None:
            return rows
        heads = self.model.family.heads(self.model.config)
        return stored_rows(rows, undo, heads.q[1].shape[0], heads.k[1].shape[0])


def _place(name: str, key: str, values: Sequence[Any]) -> Place:
    """The place of a tensor, or of those of all experts of a block, which are of one type. key: what messages call it."""
    shape = tuple(values[0].codes.shape if isinstance(values[0], QuantizedWeight) else values[0].shape)
    if len(values) > 1:
        shape = (len(values), *shape)
    if all(isinstance(value, QuantizedWeight) for value in values):
        try:
            return Place(name, type_of(*values).type, shape)
        except InputError as error:
            raise InputError(f"{key.removesuffix('.weight')}: {error}") from error
    dtype = values[0].dtype
    mixed = any(value.dtype != dtype for value in values)
    plain = values[0].dim() == 1 or mixed or dtype not in PLAIN or name.split(".")[-2] in ALWAYS_FLOAT32
    return Place(name, PLAIN[torch.float32 if plain else dtype], shape)


def check_model(model: LazyModel, tokenizer: Any) -> None:
    """Raise InputError where llama.cpp does not have a model or its tokenizer, or computes it otherwise."""
    _facts(model, tokenizer)


def made_by(results: Mapping[str, Any]) -> Facts:
    """How codes were made, of results.json; nothing of the machine."""
    own = {f"quantization.{key}": kind(results[key]) for key, kind in MADE_BY.items() if results.get(key) is not None}
    return {"general.quantized_by": "llm-quantizer", **own}


def _facts(model: LazyModel, tokenizer: Any) -> Facts:
    layout = model.family.heads(model.config)
    return facts_of(model.config, layout, model.rows, model.max_length) | vocabulary(tokenizer, model.rows)
