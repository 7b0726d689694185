"""The global normaliser: what each scored token weighs, so that a step's loss is a plain sum over all ranks.

Shapes: B samples of one step and C their completions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Normalization = Literal["token", "sample", "pair", "example"]


def row_weights(
    scored_counts_B: np.ndarray, normalization: Normalization, weights_B: np.ndarray | None = None
) -> np.ndarray:
    """Return the weight (float64) of one scored token of each sample; over the step they sum to 1.

    Args:
        scored_counts_B: scored tokens of each sample of the step, over all ranks, each at least 1.
        normalization: token: all scored tokens weigh the same; else all samples do (pairs, examples).
        weights_B: of each sample, which multiplies its part: a sample of weight 2 counts as if it were in the
            step twice. Default: 1.

    Raises:
        ValueError: if the weights are negative or all 0.
    """
    counts_B = np.asarray(scored_counts_B, dtype=np.float64)
    weights_B = np.ones(len(counts_B)) if weights_B is None else np.asarray(weights_B, dtype=np.float64)
    if weights_B.min() < 0 or weights_B.max() == 0:
        raise ValueError(
            f"row_weights needs weights of at least 0, not all 0; got {weights_B.min()} to {weights_B.max()}"
        )
    total = step_weight(counts_B, normalization, weights_B)
    return weights_B / (total if normalization == "token" else total * counts_B)


def step_weight(scored_counts_B: np.ndarray, normalization: Normalization, weights_B: np.ndarray) -> float:
    """Return what a step's loss is divided by: the total weight of its scored tokens, or of its samples."""
    return float((scored_counts_B * weights_B if normalization == "token" else weights_B).sum())


def completion_weights(
    weights_B: np.ndarray, counts_B: np.ndarray, rows_C: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight (float64[C]) of each completion, and of one of its scored rows.

    Over a step the first sum to 1, taken once per sample, and the second sum to 1 over the scored rows of all first
    completions, of all second ones, and so on.

    Args:
        weights_B: of each sample.
        counts_B: completions of each sample.
        rows_C: scored rows of each completion.
    """
    starts_B = np.cumsum(counts_B) - counts_B
    nth_C = np.arange(counts_B.sum()) - np.repeat(starts_B, counts_B)
    own_C = np.repeat(weights_B, counts_B)
    rows_of_nth = np.bincount(nth_C, own_C * rows_C)
    return own_C / weights_B.sum(), own_C / rows_of_nth[nth_C]
