"""Which type of GGUF's blocks holds a grid exactly, and a matrix of codes in it.

Two kinds. Of one, a value is d·(q - centre) with a fixed centre: an integer zero point moves the codes, as far as they then
fit. Of the other it is d·q + m: m is a float16 number in blocks of 32, and minus an integer times a float16 number in
super-blocks of 256, which holds scale·zero as it is. A scale that serves more columns than a block has is written in each.
Grids that are a super-block's own (`quant.core.superblocks`) have its integers and float16 numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from quant.core.errors import InputError
from quant.core.superblocks import units_of
from quant.core.types import QuantizedWeight, QuantSpec
from quant.export import gguf_blocks as blocks
from quant.export.formats import in_order


@dataclass(frozen=True)
class BlockType:
    """levels: codes are below. centre: the code of 0, or None where a minimum is stored beside the scale."""

    type: GGMLQuantizationType
    levels: int
    centre: int | None = None

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return GGML_QUANT_SIZES[self.type][0]

    @property
    def bits_per_weight(self) -> float:
        """With all scales and minima."""
        columns, size = GGML_QUANT_SIZES[self.type]
        return 8 * size / columns

    def holds_every(self, spec: QuantSpec, n_in: int) -> bool:
        """Whether it holds whatever a grid of ``spec`` on n_in columns can be (its scales and minima being float16)."""
        if spec.super_kind is not None or spec.level_kind is not None:
            return self.type.name == spec.kind.upper() and n_in % self.columns == 0
        if not self._has_columns(spec, n_in) or self.type == Type.IQ4_NL:
            return False
        if self.centre is None:
            return spec.qmax < self.levels and (
                spec.kind == "real" or (spec.kind == "integer" and self.columns == blocks.SUPER)
            )
        lowest, highest = (spec.numbers.middle,) * 2 if spec.symmetric else (0, spec.qmax)
        return spec.kind == "integer" and self.is_inside(-highest, spec.qmax - lowest)

    def holds(self, weight: QuantizedWeight) -> bool:
        """Whether it holds this answer: what `holds_every` says, or what its codes and zero points happen to be."""
        spec, n_in = weight.spec, weight.codes.shape[1]
        if spec.super_kind is not None or spec.level_kind is not None or self.holds_every(spec, n_in):
            return self.holds_every(spec, n_in)
        if (
            not self._has_columns(spec, n_in)
            or self.type == Type.IQ4_NL
            or (spec.has_minimum and self.centre is not None)
        ):
            return False
        if self.centre is None:
            base = _base(weight)
            return spec.qmax < self.levels and bool((base.half().float() == base).all())
        steps = weight.codes.int() - weight.grid.expand()[1].int()
        return self.is_inside(int(steps.min()), int(steps.max()))

    def _has_columns(self, spec: QuantSpec, n_in: int) -> bool:
        """Whether rows are whole blocks, and every block has one group's scale."""
        return n_in % self.columns == 0 and (spec.group_size == -1 or spec.group_size % self.columns == 0)

    def is_inside(self, lowest: int, highest: int) -> bool:
        """Whether codes from lowest to highest, counted from that of 0, are all there."""
        assert self.centre is not None
        return -self.centre <= lowest and highest < self.levels - self.centre


Q3_OFFSET = 32  # of the scales of Q3_K as they are stored
Type = GGMLQuantizationType
TYPES = (  # from few bits to many
    BlockType(Type.Q2_K, 4),
    BlockType(Type.Q3_K, 8, blocks.Q3_MIDDLE),
    BlockType(Type.Q4_0, 16, 8),
    BlockType(Type.IQ4_NL, 16),
    BlockType(Type.Q4_K, 16),
    BlockType(Type.Q4_1, 16),
    BlockType(Type.Q5_0, 32, 16),
    BlockType(Type.Q5_K, 32),
    BlockType(Type.Q5_1, 32),
    BlockType(Type.Q6_K, 64, 32),
    BlockType(Type.Q8_0, 256, 128),
)


def type_for(spec: QuantSpec, n_in: int) -> BlockType | None:
    """The smallest type that holds every grid of ``spec`` on n_in columns; None if none does."""
    return next((one for one in TYPES if one.holds_every(spec, n_in)), None)


def type_of(*weights: QuantizedWeight) -> BlockType:
    """The smallest type that holds an answer, or all of several. Raises InputError where none does."""
    for weight in weights:
        if not in_order(weight):
            raise InputError("gguf holds columns in order, and these are not: use format bitplane")
        exact = weight.grid.scale_bits == 16 and weight.grid.minimum_bits != 32
        if weight.spec.super_kind is None and not exact:
            raise InputError(
                "gguf stores scales and minima in float16 and cannot hold these exactly: use format bitplane"
            )
    found = next((one for one in TYPES if all(one.holds(weight) for weight in weights)), None)
    if found is None:
        raise InputError("gguf has no type of blocks that holds this grid: use format bitplane")
    return found


def nearest(spec: QuantSpec, inputs: Iterable[int]) -> str | None:
    """Flags of the grid closest to ``spec`` that some type holds on all these numbers of columns: the same bits first, then
    more, then fewer. None if there is none."""
    widths = (*range(spec.bits, 9), *range(spec.bits - 1, 0, -1))
    groups = dict.fromkeys((spec.group_size, 128, 64, 32, -1))
    own = "real" if spec.super_kind else "integer" if spec.level_kind else spec.kind
    kinds = dict.fromkeys(((spec.symmetric, own), (spec.symmetric, "integer"), (True, "integer")))
    sizes = tuple(inputs)
    for bits in widths:
        for group in groups:
            for symmetric, kind in kinds:
                if (symmetric and (bits == 1 or kind == "real")) or any(group > 0 and n % group for n in sizes):
                    continue
                asked = QuantSpec(bits, group, symmetric, kind=kind)
                if all(type_for(asked, n_in) is not None for n_in in sizes):
                    grid = " --sym" if symmetric else f" --grid {kind}" if kind != spec.kind else ""
                    return f"--wbits {bits} --group-size {group}{grid}"
    return None


def encode(weight: QuantizedWeight, kind: BlockType) -> np.ndarray:
    """The blocks of an answer, uint8 [out, bytes of a row]; dequantized they are its values, element by element. Raises
    ValueError where the type does not hold it."""
    n_out, n_in = weight.codes.shape
    if weight.spec.super_kind is not None:
        return _of_super_blocks(weight).reshape(n_out, -1)
    grid, first = weight.grid, weight.grid.g_idx.view(n_in // kind.columns, kind.columns)[:, 0]

    def of_blocks(numbers: Tensor) -> np.ndarray:
        """Numbers of groups [out, G] for every block, whose columns are of one group."""
        return numbers[:, first].reshape(-1).numpy()

    codes = weight.codes.numpy().reshape(-1, kind.columns)
    d = blocks.halves(of_blocks(grid.scale))
    if kind.centre is not None:
        steps = codes.astype(np.int16) - of_blocks(grid.zero)[:, None].astype(np.int16)
        if not kind.is_inside(int(steps.min()), int(steps.max())):
            raise ValueError(f"codes from {steps.min()} to {steps.max()} around 0 do not fit {kind.type.name}")
        data = _centred(kind.type, (steps + kind.centre).astype(np.uint8), d)
    elif kind.type == Type.IQ4_NL:
        data = blocks.q4(codes, d)
    elif kind.columns == blocks.BLOCK:
        data = {Type.Q4_1: blocks.q4, Type.Q5_1: blocks.q5}[kind.type](
            codes, d, blocks.halves(of_blocks(_base(weight)))
        )
    elif grid.minimum is None:  # scale times zero, subtracted
        data = _super(kind.type, codes, d, d, of_blocks(grid.zero))
    else:
        data = _super(kind.type, codes, d, blocks.halves(-of_blocks(grid.minimum)), np.ones(len(codes)))
    return data.reshape(n_out, -1)


def _of_super_blocks(weight: QuantizedWeight) -> np.ndarray:
    """The blocks of a grid that is its type's own."""
    spec, units = weight.spec, units_of(weight.grid, weight.spec)
    codes = weight.codes.numpy().reshape(-1, blocks.SUPER)
    d, a = blocks.halves(units.d.flatten().numpy()), units.a.flatten(0, 1).numpy()
    if units.e is not None and units.b is not None:
        e, b = blocks.halves(units.e.flatten().numpy()), units.b.flatten(0, 1).numpy().astype(np.uint8)
        pack = {"q2_k": blocks.q2_k, "q4_k": blocks.q4_k, "q5_k": blocks.q5_k}[spec.kind]
        return pack(codes, d, e, a.astype(np.uint8), b)
    mirrored = (
        (weight.grid.zero < spec.numbers.middle).view(len(codes), -1).numpy()
    )  # the codes count from the other end
    signed = np.where(mirrored, -a, a).astype(np.int8)
    codes = np.where(np.repeat(mirrored, blocks.SUPER // a.shape[1], 1), np.uint8(spec.qmax) - codes, codes)
    if spec.kind == "q3_k":
        return blocks.q3_k(codes, d, (signed + Q3_OFFSET).astype(np.uint8))
    return blocks.q6_k(codes, d, signed)


def _centred(kind: GGMLQuantizationType, codes: np.ndarray, d: np.ndarray) -> np.ndarray:
    if kind == Type.Q3_K:
        return blocks.q3_k(codes, d, np.full((len(codes), 16), blocks.Q3_SCALE_OF_ONE, np.uint8))
    if kind == Type.Q6_K:
        return blocks.q6_k(codes, d, np.ones((len(codes), 16), np.int8))
    return {Type.Q4_0: blocks.q4, Type.Q5_0: blocks.q5, Type.Q8_0: blocks.q8}[kind](codes, d)


def _super(
    kind: GGMLQuantizationType, codes: np.ndarray, d: np.ndarray, dmin: np.ndarray, times: np.ndarray
) -> np.ndarray:
    """Super-blocks whose parts all have the scale d, and dmin as often as ``times`` [blocks] says for a minimum."""
    pack, parts = {Type.Q2_K: (blocks.q2_k, 16), Type.Q4_K: (blocks.q4_k, 8), Type.Q5_K: (blocks.q5_k, 8)}[kind]
    minima = np.repeat(times.astype(np.uint8)[:, None], parts, 1)
    return pack(codes, d, dmin, np.ones_like(minima), minima)


def _base(weight: QuantizedWeight) -> Tensor:
    """The value of code 0 in every group, float32 [out, G]: exact, as a scale has 11 bits and a zero point 8."""
    grid = weight.grid
    return -grid.scale * grid.zero if grid.minimum is None else grid.minimum
