"""Confidence intervals by the bootstrap over items, of one model and of the difference of two on the same items.

Shapes: N items, R resamples.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
_SEED = 20241014
_ELEMENTS = 1 << 22  # indices drawn at once


def ratio_interval(values_N: np.ndarray, weights_N: np.ndarray | None = None) -> list[float]:
    """Return the 95% interval of ``sum(values) / sum(weights)`` over resampled items: percentiles 2.5 and 97.5.

    Args:
        values_N: of each item, already multiplied by its weight.
        weights_N: None: 1 each, so the ratio is a mean.
    """
    values_N = np.asarray(values_N, np.float64)
    weights_N = np.ones_like(values_N) if weights_N is None else np.asarray(weights_N, np.float64)
    count = len(values_N)
    random, ratios = np.random.default_rng(_SEED), []
    rows = max(1, min(RESAMPLES, _ELEMENTS // count))
    for start in range(0, RESAMPLES, rows):
        index_RN = random.integers(0, count, (min(rows, RESAMPLES - start), count))
        ratios.append(values_N[index_RN].sum(1) / weights_N[index_RN].sum(1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return [float(low), float(high)]
