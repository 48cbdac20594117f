"""The exact knapsack against all choices there are."""

import itertools

import numpy as np
import pytest

from quant.core.knapsack import choose


def brute_force(items, budget):
    """Loss and size of the best choice, by trying all."""
    fitting = [
        (sum(items[i][k][1] for i, k in enumerate(ks)), sum(items[i][k][0] for i, k in enumerate(ks)))
        for ks in itertools.product(*(range(len(options)) for options in items))
    ]
    return min((loss, size) for loss, size in fitting if size <= budget)


def value(items, chosen):
    picked = [options[k] for options, k in zip(items, chosen, strict=True)]
    return sum(loss for _, loss in picked), sum(size for size, _ in picked)


@pytest.mark.parametrize("seed", range(40))
def test_it_is_what_trying_all_choices_finds(seed):
    """Losses are whole numbers, so that ties are ties; some items have one option, some options are dominated."""
    rng = np.random.default_rng(seed)
    items = [
        [(int(rng.integers(0, 12)), float(rng.integers(0, 9))) for _ in range(rng.integers(1, 5))]
        for _ in range(rng.integers(1, 7))
    ]
    low, high = (sum(how(size for size, _ in options) for options in items) for how in (min, max))
    for budget in {low, (low + high) // 2, high, high + 5, int(rng.integers(low, high + 1))}:
        chosen = choose(items, budget)
        assert value(items, chosen) == brute_force(items, budget)
        assert chosen == choose(items, budget)


def test_a_greedy_choice_would_be_worse():
    """The best gain for its size leaves no room for two others."""
    items = [[(0, 10.0), (6, 0.0)], [(0, 7.0), (5, 0.0)], [(0, 7.0), (5, 0.0)]]
    assert choose(items, 10) == [0, 1, 1]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="smallest options take 9, more than the budget of 8"):
        choose([[(4, 1.0), (6, 0.0)], [(5, 0.0)]], 8)
    with pytest.raises(ValueError, match="not finite"):
        choose([[(1, float("nan")), (2, 0.0)]], 8)


def test_many_items_of_few_kinds():
    """200 items of two kinds, whose best choice is known: losses fall by 4 a bit, so that widths differ by one at most."""
    items = [[(bits * size, 4.0**-bits) for bits in range(2, 6)] for size in [10] * 100 + [10] * 100]
    chosen = choose(items, 10 * 200 * 3)
    assert chosen == [1] * 200
    chosen = choose(items, 10 * 200 * 3 + 10 * 55)
    assert sorted(chosen) == [1] * 145 + [2] * 55
