"""Confidence intervals by the bootstrap over items, of one model and of the difference of two on the same items.

Shapes: N items, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
_SEED = 20241014
_ELEMENTS = 1 << 22  # indices drawn at once


Column = tuple[np.ndarray, np.ndarray]  # values and weights of each item


def ratio_interval(values_N: np.ndarray, weights_N: np.ndarray) -> list[float]:
    """Return the 95% interval of ``sum(values) / sum(weights)`` over resampled items: percentiles 2.5 and 97.5.

    Args:
        values_N: of each item, already multiplied by its weight.
        weights_N: of each item; all 1: the ratio is a mean.
    """
    return list(_interval([(values_N, weights_N)], [1.0]))


def difference_interval(first: Column, second: Column) -> tuple[float, float]:
    """Return the 95% interval of the second ratio minus the first, over resampled items that both share."""
    return _interval([first, second], [-1.0, 1.0])


def _interval(columns: Sequence[Column], signs: Sequence[float]) -> tuple[float, float]:
    """Return the interval of the signed sum of ratios; every resample takes the same items of each column."""
    count = len(columns[0][0])
    random, sums = np.random.default_rng(_SEED), []
    rows = max(1, min(RESAMPLES, _ELEMENTS // count))
    for start in range(0, RESAMPLES, rows):
        index_RN = random.integers(0, count, (min(rows, RESAMPLES - start), count))
        ratios = [values_N[index_RN].sum(1) / weights_N[index_RN].sum(1) for values_N, weights_N in columns]
        sums.append(sum(sign * ratio_R for sign, ratio_R in zip(signs, ratios, strict=True)))
    low, high = np.percentile(np.concatenate(sums), [2.5, 97.5])
    return float(low), float(high)
