"""A quantized checkpoint, read as if it were a plain one: linears are dequantized when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.container import metadata_of
from models.load import LazyModel
from models.vocabulary import vocabulary_of
from quant.blocks.weights import is_input_range, is_online
from quant.core.errors import InputError
from quant.core.types import QuantizedWeight, QuantSpec
from quant.export import format_of
from quant.export.formats import Content, OutsideMatrix, StoredLinear, in_order
from quant.export.write import Entry

SPARSE = "outlier_values"


class QuantizedCheckpoint(Checkpoint):
    """Tensors by their plain names. Raises InputError where files were edited since they were written, an unknown
    format is named, or config.json and tensors disagree.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.declared = self.reader.metadata()
        self.quantization: dict[str, Any] = self.declared["quantization_config"]
        if not isinstance(self.quantization, dict):
            raise InputError(f"{path / 'config.json'}: quantization_config is no JSON object")
        self.format = format_of(self.quantization, path)
        name = self.declared.get("dtype") or self.declared.get("torch_dtype") or "float16"
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"{path / 'config.json'}: dtype {name!r} is no type of floating-point numbers")
        self.dtype: torch.dtype = dtype
        mark = f".{self.format.parts[0]}"
        self.linears = [name.removesuffix(mark) for name in self.reader.names() if name.endswith(mark)]
        if not self.linears:
            raise InputError(f"{path}: its configuration says {self.format.name}, but no tensor is quantized")
        with self._naming("quantization_config of config.json is not complete"):
            self.act = self.format.act(self.quantization)
        parts = {f"{linear}.{part}" for linear in self.linears for part in self.format.parts}
        self._plain = [name for name in self.reader.names() if name not in parts]
        self._check_orphans()
        self.extra = [name for name in self._plain if is_online(name) or is_input_range(name)]
        self._weights = {f"{linear}.weight": linear for linear in self.linears}

    def _check_orphans(self) -> None:
        """Raise InputError for a part of a quantized linear without the others."""
        endings = tuple(f".{part}" for part in self.format.parts if part != "weight")
        for name in self._plain:
            if name.endswith(endings):
                raise InputError(f"{self.path}: {name} is part of a linear whose other tensors are missing")
            if name.endswith(".weight") and not self.reader.dtype_of(name).is_floating_point:
                raise InputError(f"{self.path}: {name} holds integers, but no scale belongs to them")

    @contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Whatever a wrong config.json leads to, as one line that says ``what`` is wrong; but for memory."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            said = f"no {lines[0]}" if isinstance(error, KeyError) else lines[0]
            raise InputError(f"{self.path}: {what} ({said})") from error

    def __contains__(self, name: str) -> bool:
        return name in self._weights or name in self.reader

    def names(self) -> Iterable[str]:
        """Names as of a plain checkpoint."""
        return [*self._plain, *self._weights]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the headers."""
        if name not in self._weights:
            return super().shape(name)
        linear = self._weights[name]
        with self._naming(f"{linear} does not fit config.json"):
            return self.format.shape(self._stored(linear))

    def dtype_of(self, name: str) -> torch.dtype:
        """Dtype of a tensor; of a quantized one that of config.json, in which a plain checkpoint keeps it."""
        return self.dtype if name in self._weights else super().dtype_of(name)

    def read(self, name: str) -> Tensor:
        """A tensor as a plain checkpoint keeps it: a quantized one dequantized and rounded to the model's dtype. That is
        what the run measured, which is deployed so, and what readers compute with.
        """
        return self.quantized(name).dequantize().to(self.dtype) if name in self._weights else super().read(name)

    def solved(self, model: LazyModel, index: int) -> dict[str, QuantizedWeight]:
        """The quantized linears of a block of the model whose checkpoint this is, by name."""
        keys = {name: model.key(f"{model.family.blocks}.{index}.{name}.weight") for name in model.linear_shapes(index)}
        return {name: self.quantized(key) for name, key in keys.items() if key in self._weights}

    def quantized(self, name: str) -> QuantizedWeight:
        """Codes and grid of a weight. Raises InputError where they are not legal."""
        linear = self._weights[name]
        with self._naming(f"{linear} does not fit config.json"):
            return self.format.decode(self._stored(linear)).check()

    def _stored(self, linear: str) -> StoredLinear:
        """A linear under the name that files and config.json have for it."""
        return StoredLinear(self.layout.on_disk(linear), self.raw, self.quantization)

    def entries(self) -> Iterator[Entry]:
        """Everything in it, for another format."""
        for name in self._plain:
            yield name, self.reader.read(name)
        for name in self._weights:
            yield name, self.quantized(name)

    def storage_bits(self, name: str) -> int | None:
        """Bits that a weight takes, by its plain name; None where it is not quantized."""
        return self.quantized(name).storage_bits() if name in self._weights else None

    def solved_outside(self, model: LazyModel) -> dict[str, QuantizedWeight]:
        """What is quantized outside the blocks of the model whose checkpoint this is, by module; a tied tensor by its
        embedding's name."""
        return {module: self.quantized(f"{key}.weight") for key, (module, _, _) in self._outside(model).items()}

    def _outside(self, model: LazyModel) -> dict[str, tuple[str, bool, bool]]:
        """The module, whether it is looked up, and whether it is multiplied, by the name here of what is quantized of
        embedding and head."""
        ends = vocabulary_of(model.module)
        read = [(ends.embedding, True, ends.tied)] + ([] if ends.tied else [(ends.head, False, True)])
        keys = {model.key(f"{one[0]}.weight"): one for one in read}
        return {self._weights[key]: one for key, one in keys.items() if key in self._weights}

    def content(self, model: LazyModel, whole: bool = True) -> Content:
        """What another format has to hold of the model whose checkpoint this is; all linears must have one kind of grid.
        whole: see `Content`."""
        shapes: dict[str, tuple[int, int]] = {}
        reordered, specs, beyond, outside = False, {}, self._outside(model), {}
        of_outside: dict[QuantSpec, str] = {}
        for name, linear in self._weights.items():
            weight = self.quantized(name)
            shape = (weight.codes.shape[0], weight.codes.shape[1])
            reordered = reordered or not in_order(weight)
            if linear in beyond:
                outside[linear] = OutsideMatrix(shape, weight.spec.code_bits, *beyond[linear][1:])
                of_outside[weight.spec] = linear
            else:
                specs[weight.spec], shapes[linear] = linear, shape
        if not specs:
            raise InputError(f"{self.path}: nothing is quantized in the blocks, which no other format is for")
        mixed, widths = len(specs) > 1, tuple(sorted({spec.bits for spec in specs}))
        specs |= of_outside
        alike = {replace(spec, bits=8) for spec in specs}
        if len(alike) > 1:
            first, second = list(specs.values())[:2]
            raise InputError(
                f"{first} and {second} have grids that differ in more than bits; only one grid for all linears is converted"
            )
        outliers = any(name.endswith((SPARSE, "scale_codes")) for name in self.reader.names())
        return Content(
            next(iter(specs)),
            shapes,
            self.act,
            reordered,
            outliers,
            online=("matrices of the checkpoint",) if any(map(is_online, self.extra)) else (),
            whole=whole,
            model_type=self.declared["model_type"],
            true_sequential=bool(self.quantization.get("true_sequential")),  # GPTQ's config tells, the others' do not
            static_groups=bool(self.quantization.get("static_groups")),
            mixed=mixed,
            widths=widths if mixed else (),
            outside=outside,
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """A plain or a quantized checkpoint, as it says."""
    return QuantizedCheckpoint(path) if metadata_of(path).get("quantization_config") else Checkpoint(path)
