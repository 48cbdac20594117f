"""The paired percentile bootstrap, for ratios of perplexities and differences of tasks alike."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000


def paired_interval(values: np.ndarray, reference: np.ndarray, seed: int = 0) -> list[float]:
    """95% interval of the mean difference of paired values: percentile bootstrap over pairs, RESAMPLES draws."""
    difference = values - reference
    draws = np.random.default_rng(seed).integers(0, len(difference), size=(RESAMPLES, len(difference)))
    low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
    return [float(low), float(high)]
