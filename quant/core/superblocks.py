"""Grids of GGUF's super-blocks of 256 columns: a part of 16 or 32 columns has integers of a few bits, times float16 numbers
that the whole super-block shares.

    q2_k, q4_k, q5_k:  w = (d·a)·code - e·b         a, b >= 0 of the part; d, e of the super-block
    q3_k, q6_k:        w = (d·a)·(code - centre)    a of either sign: below 0 the longer side of the levels is the positive one

A `Grid` has d·a as its scale and -e·b as its minimum, both exact in float32; a negative a is a zero point one lower, with
codes counted from the other end. So nothing but scale and minimum is kept, and `units_of` takes them apart again.

Fit: every part by itself, then d and e so that the largest part takes the largest integer, then d and the integers around
that are searched, with columns weighted by the Gram diagonal. Refit for given codes, under the whole Gram matrix: d and e
of a super-block in closed form (two unknowns), then every part's integers. (Layouts: ggml-quants.c, dequantize_row_q*_K.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.core.names import SUPER_COLUMNS, SUPER_GRIDS, SuperKind
from quant.core.real_grid import fit_scale_minimum, weighted_error
from quant.core.types import Grid, QuantSpec

SMALLEST, LARGEST = 2.0**-24, 65504.0  # of float16
SHRINKS = [1.1 - 0.05 * i for i in range(11)]  # of a centred part's range: 1.10, ... 0.60
STRETCHES = (1.0, 0.9, 0.95, 1.05, 1.1)  # of d
FLAT = 1e-9  # of the product of the diagonal: a smaller determinant is one of codes that do not vary


@dataclass(frozen=True)
class Units:
    """d and e, float32 [out, S] with float16 values; a and b, float32 [out, S, parts] with whole ones. Centred kinds have
    no e and b, and a is its magnitude."""

    d: Tensor
    a: Tensor
    e: Tensor | None = None
    b: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """d·a, float32 [out, G]."""
        return (self.d[..., None] * self.a).flatten(1)

    @property
    def minimum(self) -> Tensor:
        """-e·b, float32 [out, G]."""
        assert self.e is not None and self.b is not None
        return -(self.e[..., None] * self.b).flatten(1)


def kind_of(spec: QuantSpec) -> SuperKind:
    """The layout of a spec's super-blocks. Raises ValueError where it has none."""
    if spec.kind not in SUPER_GRIDS:
        raise ValueError(f"kind={spec.kind!r} has no super-blocks")
    return SUPER_GRIDS[spec.kind]


def half(numbers: Tensor) -> Tensor:
    """The nearest float16 number above 0."""
    return numbers.clamp(SMALLEST, LARGEST).half().float()


def fit_superblocks(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale float32 and minimum float32 (or zero point int32), [out, G], of weight float32 [out, G, n]; importance [G, n].

    Raises ValueError where the parts are not whole super-blocks.
    """
    kind, (n_out, n_groups, n) = kind_of(spec), weight.shape
    if n_groups * n % SUPER_COLUMNS:
        raise ValueError(f"{spec.kind} has super-blocks of {SUPER_COLUMNS} columns, which do not divide {n_groups * n}")
    h = torch.ones_like(weight[:1]) if importance is None else importance.expand(n_groups, n)[None]
    h = (h / h.amax().clamp(min=torch.finfo(h.dtype).tiny)).expand_as(weight)
    parts = SUPER_COLUMNS // kind.part
    if kind.minima:
        plain = QuantSpec(spec.bits, kind.part, range=spec.range, kind="fractional", largest=spec.largest)
        scale, minimum = fit_scale_minimum(weight, plain, h if spec.range == "mse" else None)
        units = with_minima(weight, h, scale.view(n_out, -1, parts), minimum.view(n_out, -1, parts), spec)
        return units.scale, units.minimum
    scale, zero = centred(weight, h, spec)
    scale = scale.view(n_out, -1, parts)
    d = half(scale.amax(2) / kind.most)
    units = Units(d, (scale / d[..., None]).round_().clamp_(1, kind.most))
    if spec.range == "mse":
        units = _stretched(weight, h, scale, zero.view_as(scale), units, kind)
    return units.scale, zero


def centred(weight: Tensor, h: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero point int32 [out, G] of every part by itself: its largest |w| on the outermost level of the longer
    side, or, with ``range="mse"``, the shrink and side of least Σ h (w - ŵ)²."""
    centre = (spec.qmax + 1) // 2
    low, high = weight.aminmax(dim=-1)
    step = torch.maximum(-low, high) / centre
    step = step.where(step > 0, 1.0)
    scale, zero = step, torch.where(high > -low, centre - 1, centre).to(torch.int32)
    if spec.range != "mse":
        return scale, zero
    best = torch.full_like(step, torch.inf)
    for shrink in SHRINKS:
        for place in (centre, centre - 1):
            error = _error(weight, h, step * shrink, torch.full_like(zero, place), spec.qmax)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, step * shrink, scale)
            zero = torch.where(better, place, zero)
    return scale, zero


def _error(weight: Tensor, h: Tensor, scale: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """Σ h (w - ŵ)² [...] over the last dimension, of grids with zero points."""
    s, z = scale[..., None], zero[..., None].float()
    value = ((weight / s).round_() + z).clamp_(0, qmax).sub_(z).mul_(s)
    return value.sub_(weight).square_().mul_(h).sum(-1)


def with_minima(weight: Tensor, h: Tensor, scale: Tensor, minimum: Tensor, spec: QuantSpec) -> Units:
    """The units of parts with these scales and minima [out, S, parts], which are 0 or below; of range="mse" the stretch of d
    and the integers next to them that leave the least Σ h (w - ŵ)²."""
    kind = kind_of(spec)
    d, e = (half(t.amax(2) / kind.most) for t in (scale, -minimum))

    def units(d: Tensor, step: int, lowest: Tensor) -> Units:
        a = ((scale / d[..., None]).round_() + step).clamp_(1, kind.most)
        return Units(d, a, e, (-lowest / e[..., None]).round_().clamp_(0, kind.most))

    best = units(d, 0, minimum)
    if spec.range != "mse":
        return best
    grouped, of_part = weight.view(*scale.shape, -1), h.reshape(*scale.shape, -1)
    rows, of_row = (t.reshape(-1, grouped.shape[-1]) for t in (grouped, of_part))
    total = of_part.sum(-1).clamp(min=torch.finfo(h.dtype).tiny)
    best_error = torch.full_like(d, torch.inf)
    for stretch in STRETCHES:
        tried = half(d * stretch)
        own, error = units(tried, 0, minimum), torch.full_like(scale, torch.inf)
        for step in (0, -1, 1):
            near = units(tried, step, minimum)
            s, m = (t.view_as(scale)[..., None] for t in (near.scale, near.minimum))
            codes = ((grouped - m) / s).round_().clamp_(0, spec.qmax)
            lowest = ((grouped - codes * s) * of_part).sum(-1) / total  # the best minimum of these codes
            for one in (near, units(tried, step, lowest)):
                left = weighted_error(rows, of_row, one.scale.flatten(), one.minimum.flatten(), spec.qmax)
                better = left.view_as(scale) < error
                error = torch.minimum(left.view_as(scale), error)
                assert own.b is not None and one.b is not None
                own = replace(own, a=torch.where(better, one.a, own.a), b=torch.where(better, one.b, own.b))
        best_error, best = _better(error.sum(2), best_error, own, best)
    return best


def _stretched(weight: Tensor, h: Tensor, scale: Tensor, zero: Tensor, units: Units, kind: SuperKind) -> Units:
    """The same search for centred parts."""
    grouped, of_part = weight.view(*scale.shape, -1), h.reshape(*scale.shape, -1)
    best, best_error = units, torch.full_like(units.d, torch.inf)
    for stretch in STRETCHES:
        d = half(units.d * stretch)
        nearest = (scale / d[..., None]).round_()
        a, error = nearest.clamp(1, kind.most), torch.full_like(scale, torch.inf)
        for step in (0, -1, 1):
            tried = (nearest + step).clamp_(1, kind.most)
            own = _error(grouped, of_part, d[..., None] * tried, zero, 2**kind.bits - 1)
            a, error = torch.where(own < error, tried, a), torch.minimum(own, error)
        best_error, best = _better(error.sum(2), best_error, Units(d, a), best)
    return best


def _better(error: Tensor, best_error: Tensor, own: Units, best: Units) -> tuple[Tensor, Units]:
    """The lower errors [out, S] and the units that have them."""
    better = error < best_error
    chosen = Units(torch.where(better, own.d, best.d), torch.where(better[..., None], own.a, best.a), best.e, best.b)
    if own.b is not None and best.b is not None:
        chosen = replace(chosen, b=torch.where(better[..., None], own.b, best.b))
    return torch.where(better, error, best_error), chosen


def units_of(grid: Grid, spec: QuantSpec) -> Units:
    """The integers and float16 numbers of a grid, whose products are its scales and minima exactly. Raises ValueError where
    there are none."""
    kind, n_out = kind_of(spec), grid.scale.shape[0]
    parts = SUPER_COLUMNS // kind.part
    d, a = _apart(grid.scale.view(n_out, -1, parts), kind.most)
    if grid.minimum is None:
        return Units(d, a)
    return Units(d, a, *_apart(-grid.minimum.view(n_out, -1, parts), kind.most))


def _apart(products: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """u [out, S] and whole numbers k up to ``most`` with u·k = products [out, S, parts] >= 0; u is a float16 number, and the
    smallest that there is. Zeros alone have u = SMALLEST."""
    wide = products.double()
    top, settled = wide.amax(2), wide.amax(2) == 0
    unit = torch.full_like(top, SMALLEST)
    for k in range(most, 0, -1):
        tried = top / k
        counts = (wide / tried[..., None]).round()
        fits = (tried.half().double() == tried) & (counts * tried[..., None] == wide).all(2) & ~settled
        unit, settled = torch.where(fits, tried, unit), settled | fits
    if not bool(settled.all()):
        raise ValueError("these scales or minima are no small integers times a float16 number of their super-block")
    return unit.float(), (wide / unit[..., None]).round().float()


def rescaled(grid: Grid, factor: float, spec: QuantSpec) -> Grid:
    """The grid with d times a factor; where there are minima, the middle of every part's levels stays where it was."""
    units = units_of(grid, spec)
    scaled = replace(units, d=half(units.d * factor))
    if grid.minimum is None:
        return replace(grid, scale=scaled.scale)
    assert units.e is not None
    middle = grid.minimum + grid.scale * (grid.qmax / 2)
    lowest = (middle - scaled.scale * (grid.qmax / 2)).view_as(units.a)
    b = (-lowest / units.e[..., None]).round_().clamp_(0, kind_of(spec).most)
    scaled = replace(scaled, b=b)
    return replace(grid, scale=scaled.scale, minimum=scaled.minimum)


@dataclass(frozen=True)
class Line:
    """What the objective of Ŵ = x·v + y·u + rest is in x and y: changes (dx, dy) add `change(dx, dy)` to it.

    vv, vu, uu: v Σ vᵀ and so on, cv, cu: (W - Ŵ) Σ v, all float64 [out].
    """

    vv: Tensor
    vu: Tensor
    uu: Tensor
    cv: Tensor
    cu: Tensor

    @classmethod
    def of(cls, v: Tensor, u: Tensor, gram: Tensor, correlation: Tensor) -> Line:
        """v, u, correlation [out, n], gram [n, n]."""
        wide = torch.float64
        v_gram, u_gram = v @ gram, u @ gram
        vv, vu, uu = (t.sum(1, dtype=wide) for t in (v_gram * v, v_gram * u, u_gram * u))
        return cls(vv, vu, uu, (correlation * v).sum(1, dtype=wide), (correlation * u).sum(1, dtype=wide))

    def change(self, dx: Tensor, dy: Tensor) -> Tensor:
        """What the objective changes by."""
        return dx * (dx * self.vv + 2 * dy * self.vu - 2 * self.cv) + dy * (dy * self.uu - 2 * self.cu)

    def best_x(self) -> Tensor:
        """The change of x that goes with the best of both."""
        determinant = self.vv * self.uu - self.vu.square()
        solvable = determinant > FLAT * self.vv * self.uu
        both = (self.cv * self.uu - self.cu * self.vu) / determinant.where(solvable, 1.0)
        alone = self.cv / self.vv.where(self.vv > 0, 1.0)
        return torch.where(solvable, both, torch.where((self.uu == 0) & (self.vv > 0), alone, 0.0))

    def best_y(self, dx: Tensor) -> Tensor:
        """The best change of y with this one of x."""
        return torch.where(self.uu > 0, (self.cu - dx * self.vu) / self.uu.where(self.uu > 0, 1.0), 0.0)


def refit_units(
    codes: Tensor, d: Tensor, a: Tensor, e: Tensor, b: Tensor, gram: Tensor, correlation: Tensor
) -> tuple[Tensor, Tensor]:
    """d and e [out] of one super-block of which ‖(W - Ŵ)X‖² is least for its codes and integers as they are, as float16 holds
    them; never worse than they were. codes [out, n], counted from the zero point where there is one; a, b [out, n] of every
    column; gram [n, n]; correlation [out, n] of (W - Ŵ) Σ."""
    line = Line.of(codes * a, -b, gram, correlation)
    best, gain = (d, e), torch.zeros_like(line.vv)
    for wanted in (d + line.best_x(), d.double()):
        new = half(wanted.float())
        dx = new.double() - d
        low = half((e + line.best_y(dx)).float())
        for one in (low, e):
            change = line.change(dx, one.double() - e)
            better = (wanted > 0) & (change < gain)
            gain = torch.where(better, change, gain)
            best = torch.where(better, new, best[0]), torch.where(better, one, best[1])
    return best


def refit_integers(
    codes: Tensor, d: Tensor, a: Tensor, e: Tensor | None, b: Tensor, gram: Tensor, correlation: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """a and b [out] of one part likewise, d and e being given; e None: there are no minima, and b stays. codes [out, n],
    gram [n, n], correlation [out, n]."""
    ones = torch.ones_like(codes[:1]) if e is not None else torch.zeros_like(codes[:1])
    line = Line.of(codes, ones.expand_as(codes), gram, correlation)
    wanted = a + line.best_x() / d
    best, gain = (a, b), torch.zeros_like(line.vv)
    for tried in (wanted.floor(), wanted.ceil(), a.double()):
        new = tried.clamp(1, most)
        dx = (new - a) * d
        lower = b.double() if e is None else (b - line.best_y(dx) / e).round().clamp(0, most)
        dy = torch.zeros_like(dx) if e is None else (b - lower) * e
        change = line.change(dx, dy)
        better = change < gain
        gain = torch.where(better, change, gain)
        best = torch.where(better, new.float(), best[0]), torch.where(better, lower.float(), best[1])
    return best
