"""What a checkpoint format is: how linears are written and read back, what config.json says, what it cannot hold.

Codes, scales and zero points go from the solver's answer into the tensors as they are; nothing is rounded again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from models.container import Reader
from quant.blocks.fake_quant import ActSpec
from quant.core.errors import InputError
from quant.core.names import LEVEL_GRIDS
from quant.core.types import QuantizedWeight, QuantSpec, group_index


@dataclass(frozen=True)
class OutsideMatrix:
    """A quantized matrix outside the blocks: (rows, columns) and bits. looked_up: it is the embedding, multiplied: the head;
    tied, it is both."""

    shape: tuple[int, int]
    bits: int
    looked_up: bool
    multiplied: bool


@dataclass(frozen=True)
class Content:
    """What a checkpoint is to hold, as far as it is known before work begins.

    spec: None where weights stay in full precision. shapes: (out, in) of the linears by their names in a block; where
    blocks differ, of all. reordered: columns change their
    group (act-order without static groups). outliers: sparse parts. online: what puts matrices behind norms or in front of
    linears, in flags where a run asks for it. whole: whether every block is quantized. model_type: of config.json.
    true_sequential, static_groups: what GPTQ's config tells of how the codes came about. misfit: a linear whose scales
    float16 cannot hold, and why, in words. mixed: linears have several numbers of bits,
    of which ``spec`` says one. widths: the bits that such linears may have. outside: what is quantized of head
    and embedding, by the module's name in the whole model.
    """

    spec: QuantSpec | None
    shapes: Mapping[str, tuple[int, int]]
    act: ActSpec = field(default_factory=ActSpec)
    reordered: bool = False
    outliers: bool = False
    online: tuple[str, ...] = ()
    whole: bool = True
    model_type: str = ""
    true_sequential: bool = False
    static_groups: bool = False
    misfit: str | None = None
    mixed: bool = False
    widths: tuple[int, ...] = ()
    outside: Mapping[str, OutsideMatrix] = field(default_factory=dict)

    @property
    def grids(self) -> Iterator[tuple[str, int, QuantSpec]]:
        """Linears with their inputs and the grids that they may have."""
        assert self.spec is not None
        for bits in self.widths if self.mixed else (self.spec.bits,):
            spec = replace(self.spec, bits=bits)
            for linear, (_, n_in) in self.shapes.items():
                yield linear, n_in, spec.for_inputs(n_in)

    def of(self, linear: str) -> Content:
        """The content as it is for one linear, by its full name: head and embedding have bits of their own."""
        matrix = self.outside.get(linear)
        return self if matrix is None else self._alone(linear, matrix)

    def of_outside(self) -> Iterator[tuple[str, OutsideMatrix, Content]]:
        """What is quantized outside the blocks, each as a content of its own."""
        for name, matrix in self.outside.items():
            yield name, matrix, self._alone(name, matrix)

    def _alone(self, name: str, matrix: OutsideMatrix) -> Content:
        assert self.spec is not None
        spec = replace(self.spec, bits=matrix.bits, levels=None)
        return replace(self, spec=spec, shapes={name: matrix.shape}, misfit=None, mixed=False, outside={})

    @property
    def has_other_bits(self) -> bool:
        """Whether something outside the blocks has other bits than their linears."""
        return any(matrix.bits != self.bits for matrix in self.outside.values())

    @property
    def bits(self) -> int:
        """Stored bits of a code."""
        assert self.spec is not None
        return self.spec.code_bits

    @property
    def has_experts(self) -> bool:
        """Whether linears are those of a mixture's experts."""
        return any(".experts." in name for name in self.shapes)

    @property
    def centered(self) -> bool:
        """Whether every zero point is 2^(bits-1), so that it need not be stored."""
        return self.spec is not None and self.spec.symmetric and self.spec.levels is None


@dataclass(frozen=True)
class Layers:
    """The linears of a checkpoint: quantized ones by full name, and those left alone. gates: routers of mixtures and the
    like, which are linears to other software and never quantized."""

    quantized: Sequence[str]
    untouched: Sequence[str]
    blocks: str
    n_blocks: int
    gates: Sequence[str] = ()

    def renamed(self, rename: Callable[[str], str]) -> Layers:
        """The same under other names."""
        quantized, untouched, gates = ([*map(rename, names)] for names in (self.quantized, self.untouched, self.gates))
        return replace(self, quantized=quantized, untouched=untouched, gates=gates)


@dataclass(frozen=True)
class StoredLinear:
    """A quantized linear as a checkpoint has it: its tensors by the last part of their names, and ``quantization_config``."""

    name: str
    tensors: Reader
    config: Mapping[str, Any]

    def __contains__(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.tensors

    def __getitem__(self, part: str) -> Tensor:
        return self.tensors.read(f"{self.name}.{part}")

    def header(self, part: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.tensors.shape(f"{self.name}.{part}")


class Holder(Protocol):
    """What a format can hold."""

    name: str

    def refuses(self, content: Content) -> str | None:
        """Why it cannot hold this, with a format that can; None if it can."""


class Format(Holder, Protocol):
    """One checkpoint format. parts: names of the tensors that may stand for a linear's weight; the first tells that it is
    quantized."""

    parts: tuple[str, ...]

    def encode(self, weight: QuantizedWeight, content: Content) -> dict[str, Tensor]:
        """Tensors of one linear, by the last part of their names."""

    def config(self, content: Content, layers: Layers) -> dict[str, Any]:
        """The ``quantization_config`` of config.json."""

    def shape(self, linear: StoredLinear) -> tuple[int, int]:
        """(out, in), from headers and single numbers."""

    def decode(self, linear: StoredLinear) -> QuantizedWeight:
        """One linear read back. Raises InputError where tensors and config.json disagree."""

    def act(self, config: Mapping[str, Any]) -> ActSpec:
        """How activations are quantized."""


def refuses_codes(content: Content, name: str) -> str | None:
    """Why a format of nothing but codes and scales cannot hold this; None if it can, as far as that goes."""
    if content.spec is None:
        return f"{name} holds quantized weights, and these stay in full precision: use format dequantized"
    if content.mixed:
        return f"{name} holds one number of bits, and linears have several: use format bitplane or dequantized"
    if content.outliers or content.online:
        what = "sparse outliers" if content.outliers else "matrices behind norms or in front of linears"
        return f"{name} cannot hold {what}: use format bitplane"
    return None


def refuses_outside(content: Content, name: str) -> str | None:
    """Why a format of linears alone cannot hold what is quantized outside the blocks; None if it can, as far as that goes."""
    for module, matrix in content.outside.items():
        if matrix.looked_up:
            also = ", which the head is tied to" if matrix.multiplied else ""
            return f"{name} holds quantized linears, and {module} is an embedding{also}: use format bitplane or dequantized"
    if content.outside and content.act.active:
        return f"{name} would quantize the head's inputs too, which stay as they are: use format bitplane"
    return None


def refuses_grid(content: Content, name: str, *taken: str) -> str | None:
    """Why a format of integer zero points cannot hold this kind of grid; None if it can. taken: kinds that it holds besides."""
    if content.spec is None or content.spec.kind in ("integer", *taken):
        return None
    kind = content.spec.kind
    if content.spec.super_kind is not None:
        return f"{name} cannot hold the super-blocks of --grid {kind}: use format gguf"
    if content.spec.level_kind is not None:
        return f"{name} cannot hold the levels of --grid {kind}: use format {level_format(kind)}"
    what = "real minima" if kind == "real" else f"{kind} ones"
    return f"{name} stores integer zero points and cannot hold {what} (--grid {kind}): use format bitplane"


def level_format(kind: str) -> str:
    """The format that holds levels which are not evenly spaced."""
    return "gguf" if LEVEL_GRIDS[kind].scale == "half" else "compressed-tensors"


def uneven_groups(content: Content, name: str) -> str | None:
    """Why a format that counts in equal groups cannot hold this; None if all are equal."""
    assert content.spec is not None
    group = content.spec.group_size
    for linear, (_, n_in) in content.shapes.items():
        if group > 0 and n_in % group:
            return f"{name} needs groups that divide the inputs, {linear} has {n_in}: use format gptq_v2"
    return None


def misfit_linear(content: Content, name: str) -> str | None:
    """Why a format whose scales are float16 cannot hold this; None if it can."""
    if content.misfit is None:
        return None
    return f"{name} stores scales in float16, but {content.misfit}: use format bitplane"


def check_encodable(weight: QuantizedWeight, content: Content, name: str) -> None:
    """Raise InputError where an answer holds more than a uniform grid of the content's bits, or has its columns in an order
    that was not announced: what the options of a solver did not tell before work began.
    """
    if weight.outliers is not None:
        raise InputError(f"{name} cannot hold sparse outliers: use format bitplane")
    check_grid(weight, content, name)
    if not content.reordered and not in_order(weight):
        raise InputError(f"{name} was to hold columns in order, and these are not: use format bitplane")


def check_grid(weight: QuantizedWeight, content: Content, name: str) -> None:
    """Raise InputError where an answer's grid is not the one that config.json will name for every linear."""
    assert content.spec is not None
    if content.mixed:
        content = replace(content, spec=replace(content.spec, bits=weight.spec.bits))
    assert content.spec is not None
    if weight.spec.code_bits != content.bits:
        raise InputError(
            f"{name} holds one number of bits, {content.bits}, and this linear has {weight.spec.code_bits}"
        )
    settings = (weight.spec.group_size, weight.grid.qmax, weight.spec.symmetric, weight.spec.kind)
    asked = (content.spec.group_size, content.spec.qmax, content.spec.symmetric, content.spec.kind)
    for what, own, whole in zip(("group_size", "largest code", "symmetric", "kind"), settings, asked, strict=True):
        if own != whole:
            raise InputError(f"{name} holds one grid, of {what} {whole}, and this linear has {own}: quantize it again")
    if content.centered and bool((weight.grid.zero != 2 ** (content.bits - 1)).any()):
        raise InputError(f"{name}: zero points of a symmetric grid must be {2 ** (content.bits - 1)}")


def check_shape(linear: str, weight: QuantizedWeight, content: Content) -> None:
    """Raise InputError where an answer is not of the shape that the model has under the linear's full name."""
    shape = (weight.codes.shape[0], weight.codes.shape[1])
    known = (s for name, s in content.of(linear).shapes.items() if linear == name or linear.endswith(f".{name}"))
    if (expected := next(known, None)) != shape:
        raise InputError(f"{linear} has codes of {shape}, but the model's linear is {expected}: quantize it again")


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a config.json fits a linear's name from its start. Raises InputError for no pattern."""
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise InputError(f"config.json: {pattern!r} is no regular expression ({error})") from error


def half_scales(weight: QuantizedWeight, name: str) -> Tensor:
    """The scales in float16. Raises InputError where that would round them: runs round those of a row that is almost zero
    before they measure anything, so that these are of a linear whose weights are all that small."""
    if weight.grid.scale_bits != 16:
        raise InputError(f"{name} stores scales in float16 and cannot hold these exactly: use format bitplane")
    return weight.grid.scale.half()


def in_order(weight: QuantizedWeight) -> bool:
    """Whether column i belongs to group i // group_size."""
    plain = group_index(weight.codes.shape[1], weight.spec.group_size)
    return bool(torch.equal(plain, weight.grid.g_idx.cpu()))
