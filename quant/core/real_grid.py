"""Grids with a minimum, w = scale * code + minimum: fitted to weights, and refitted to codes as they are. The minimum is
real, or as many parts of a step below 0 as a fractional zero point says.

The fit (NeUQI, arXiv 2505.17595): for a given scale s let x = w / s and z = -minimum / s. A weight's code is
clip(⌊x + z⌉, 0, qmax), and Σ h (x + z - code)² is a quadratic in z between the breakpoints z = k - ½ - x, k = 1..qmax.
At a breakpoint one code goes up by one: its three coefficients change by what cumulative sums over the sorted
breakpoints give, and the best vertex of all pieces is the best zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant.core.stacks import times
from quant.core.stored import FINEST_STEP, stored_base, stored_scale
from quant.core.types import QuantSpec

STEPS_BELOW = 20  # scales are searched down to a grid that is so many steps shorter than the range
COARSE, FINE = 12, (-0.6, -0.3, 0.3, 0.6)  # candidates, and then powers of their ratio around the best
PIECES = 1 << 22  # quadratics that are held at a time
FLAT = 1e-9  # of the product of the diagonal: a smaller determinant is one of codes that do not vary


def fit_scale_minimum(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and minimum, float32 [...], over the last dimension of weight float32 [..., n].

    Min-max: the exact range. ``range="mse"``: the least Σ importance · (w - ŵ)² over scales, each with its best real
    zero. importance: [..., n], broadcastable (the Gram diagonal).
    """
    lo, hi = weight.amin(-1), weight.amax(-1)
    if spec.kind == "fractional":  # its range holds 0
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    step = hi / spec.qmax - lo / spec.qmax
    best = stored_base(step.where((lo != 0) | (hi != 0), 1.0), lo, spec)
    if spec.range == "minmax":
        return best
    rows = weight.reshape(-1, weight.shape[-1])
    h = torch.ones_like(rows) if importance is None else importance.expand_as(weight).reshape(rows.shape)
    h = h / h.amax(1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
    step, finest = step.flatten(), FINEST_STEP * torch.maximum(-lo, hi).flatten()
    scale, minimum = (t.flatten() for t in best)
    factor, error = torch.ones_like(step), weighted_error(rows, h, scale, minimum, spec.qmax)

    def consider(tried: Tensor) -> None:
        nonlocal scale, minimum, factor, error
        s = stored_scale(torch.maximum(step * tried, finest), spec)
        s, m = stored_base(s, -s * best_zero(rows / s[:, None], h, spec.qmax), spec)
        e = weighted_error(rows, h, s, m, spec.qmax)
        better = e < error
        scale, minimum = torch.where(better, s, scale), torch.where(better, m, minimum)
        factor, error = torch.where(better, tried, factor), torch.where(better, e, error)

    ratio = (spec.qmax / (spec.qmax + STEPS_BELOW)) ** (1 / (COARSE - 1))
    for power in range(COARSE):
        consider(torch.full_like(step, ratio**power))
    middle = factor
    for share in FINE:
        consider(middle * ratio**share)
    return scale.view_as(lo), minimum.view_as(lo)


def weighted_error(weight: Tensor, importance: Tensor, scale: Tensor, minimum: Tensor, qmax: int) -> Tensor:
    """Σ importance · (w - ŵ)² [rows] of the nearest codes, for weight [rows, n], scale and minimum [rows]."""
    s, m = scale[:, None], minimum[:, None]
    value = ((weight - m) / s).round_().clamp_(0, qmax).mul_(s).add_(m)
    return value.sub_(weight).square_().mul_(importance).sum(1)


def best_zero(x: Tensor, importance: Tensor, qmax: int) -> Tensor:
    """The z [rows] with the least Σ h (x + z - clip(⌊x + z⌉, 0, qmax))², x and h >= 0 [rows, n]; of any float dtype.

    No grid is better than all that begin at most half a step below the range and, unless they are longer than it, end
    at most half a step above: a level more on the other side would do no harm. So z is looked for in
    max(1, range + 1 - qmax) steps, in each of which every weight has one breakpoint, in the same order.
    """
    lo, hi = x.amin(1), x.amax(1)
    n_steps = math.ceil(float((hi - lo + 1 - qmax).nan_to_num(0, 0, 0).amax().clamp(min=1))) + 1
    size = max(1, PIECES // (x.shape[1] * n_steps))
    start = -torch.maximum(lo + 0.5, hi + 0.5 - qmax)
    parts = zip(x.split(size), importance.split(size), start.split(size), strict=True)
    return torch.cat([_best_after(own + first[:, None], h, qmax, n_steps) + first for own, h, first in parts])


def _best_after(x: Tensor, h: Tensor, qmax: int, n_steps: int) -> Tensor:
    """The best z of those from 0 to n_steps."""
    first = (-0.5 - x).remainder(1)  # breakpoints of z >= 0, of which there is one in every step
    first, order = first.sort(1)
    x, h = x.gather(1, order), h.gather(1, order)
    following = (first + 0.5 + x).round()  # the code that begins at the first breakpoint
    off = x - (following - 1).clamp(0, qmax)
    # Σh z² + 2 slope z + level, before the first breakpoint and then behind every one
    total = h.sum(1, keepdim=True)
    inverse = torch.where(total > 0, 1 / total, 0.0)
    slope, level = (h * off).sum(1, keepdim=True), (h * off.square()).sum(1, keepdim=True)
    k = following[:, None] + torch.arange(n_steps, device=x.device, dtype=x.dtype)[:, None]  # [rows, steps, n]
    jump = torch.where((k >= 1) & (k <= qmax), h[:, None], 0.0)
    changes = k.sub_(x[:, None]).mul_(2).sub_(1).mul_(jump)
    slopes, levels = slope - jump.flatten(1).cumsum(1), changes.flatten(1).cumsum(1).add_(level)
    lowest, place = (levels - slopes.square().mul_(inverse)).min(1, keepdim=True)
    behind = -slopes.gather(1, place) * inverse
    return torch.where(lowest < level - slope.square() * inverse, behind, -slope * inverse).squeeze(1)


def refit_scale_minimum(
    codes: Tensor,
    scale: Tensor,
    minimum: Tensor,
    gram: Tensor,
    correlation: Tensor,
    *,
    spec: QuantSpec,
    free: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scale and minimum [out] of one group of n columns that minimize ‖(W - Ŵ)X‖² for its codes as they are.

    codes float32 [out, n]. scale, minimum [out]: as they are. gram [n, n], of a stack [parts, n, n]. correlation [out, n]: the group's columns of
    (W - Ŵ) Σ. free bool [out, n]: entries beside the grid. With v = codes - qmax / 2 and u = 1 (both 0 at free entries) a
    change (ds, dc) of Ŵ = ... + ds·v + dc·u changes the objective by ds²·vΣv + 2·ds·dc·vΣu + dc²·uΣu - 2·ds·c·v - 2·dc·c·u:
    two equations. The scale of their solution is stored, then the best minimum with it; kept only where the objective falls.
    The scale as it is, with its best minimum, is tried too.
    """
    centre = spec.qmax / 2
    v, u = codes - centre, torch.ones_like(codes if gram.dim() == 3 else codes[:1])
    if free is not None:
        v, u = v.masked_fill(free, 0), (~free).to(codes.dtype)
    v_gram, u_gram = times(v, gram), times(u, gram)
    wide = torch.float64
    vv, vu, uu = (t.sum(1, dtype=wide) for t in (v_gram * v, v_gram * u, u_gram * u))
    cv, cu = (correlation * v).sum(1, dtype=wide), (correlation * u).sum(1, dtype=wide)
    determinant = vv * uu - vu.square()
    solvable = determinant > FLAT * vv * uu
    change = torch.where(solvable, (cv * uu - cu * vu) / determinant.where(solvable, 1.0), 0.0)
    best, best_gain = (scale, minimum), torch.zeros_like(vv)
    for wanted in (scale + change, scale.to(wide)):
        legal = (wanted > 0) & torch.isfinite(wanted)
        new = stored_scale(wanted.where(legal, scale.to(wide)).float(), spec)
        ds = new.to(wide) - scale
        dc = torch.where(uu > 0, (cu - ds * vu) / uu.where(uu > 0, 1.0), 0.0)
        stored = stored_base(new, (minimum + dc - ds * centre).float(), spec)
        ds = stored[0].to(wide) - scale
        dc = stored[1].to(wide) - minimum + ds * centre
        gain = ds * (ds * vv + 2 * dc * vu - 2 * cv) + dc * (dc * uu - 2 * cu)
        better = legal & (gain < best_gain)
        best_gain = torch.where(better, gain, best_gain)
        best = (torch.where(better, stored[0], best[0]), torch.where(better, stored[1], best[1]))
    return best
