"""The best choice of one option for every item within a budget, exactly.

    min Σ_i loss_i(k_i)   with   Σ_i size_i(k_i) ≤ budget

Dynamic program over the items: of all choices for the first i, only those stay that no other beats in both size and loss
(Pareto's front), and that leave room for the smallest of the rest. Nothing is rounded, so the answer is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Option = tuple[int, float]  # size, loss


def choose(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The number of the chosen option of every item; of equal losses the smaller size, then the first by number. Raises
    ValueError where the smallest options do not fit, or a loss is not finite."""
    smallest = [min(size for size, _ in options) for options in items]
    if sum(smallest) > budget:
        raise ValueError(f"the smallest options take {sum(smallest)}, more than the budget of {budget}")
    if not all(np.isfinite(loss) for options in items for _, loss in options):
        raise ValueError("a loss is not finite")
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # of every front: where from, and by which option
    left = sum(smallest)
    for options, least in zip(items, smallest, strict=True):
        left -= least
        more = np.array([size for size, _ in options])
        worse = np.array([loss for _, loss in options])
        size = (sizes[None] + more[:, None]).ravel()
        loss = (losses[None] + worse[:, None]).ravel()
        order = np.lexsort((loss, size))  # stable: equal ones by option, then by what came before
        order = order[size[order] <= budget - left]
        front = loss[order]
        best_before = np.minimum.accumulate(np.concatenate(([np.inf], front[:-1])))
        order = order[front < best_before]
        steps.append((order % len(sizes), order // len(sizes)))
        sizes, losses = size[order], loss[order]
    chosen, at = [], len(losses) - 1  # the front falls: its last has the least loss
    for came_from, option in reversed(steps):
        chosen.append(int(option[at]))
        at = int(came_from[at])
    return chosen[::-1]
