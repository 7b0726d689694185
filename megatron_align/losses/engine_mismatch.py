"""Weights for the difference between the engine that sampled and the trainer: truncated importance sampling.

Shapes: N sampled tokens of C completions, one completion after the other.

The engine computes the same weights in another precision and with other kernels, so its log-probs differ from the
trainer's. The ratio ``trainer / engine`` corrects for it, bounded so that a few tokens do not dominate.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megatron_align.losses.segments import per_token, segment_sums

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def engine_correction(
    difference_N: Tensor,
    length_C: Tensor,
    *,
    mode: CorrectionMode = "token_truncate",
    cap: float | None = 2.0,
    floor: float | None = None,
    mask_N: Tensor | None = None,
) -> Tensor:
    """Return the weight of each token, ``[N]``, a constant of the rollout: computed once, before any update.

    Args:
        difference_N: log-prob of the trainer, under the weights that sampled the tokens, minus the engine's; NaN where
            the engine gave none: that token's log-ratio counts as 0.
        length_C: tokens of each completion, int64.
        mode: token: the ratio of each token; sequence: of its completion, the exponential of the sum. truncate: bounded
            to ``[floor, cap]``; mask: 0 outside. TRL's names; TRL's default is sequence_mask with cap 3.
        cap: None: no upper bound.
        floor: None: no lower bound.
        mask_N: bool: tokens that count; the log-ratio of the others counts as 0. In a sequence mode they too have the
            weight of their completion.
    """
    log_N = difference_N.nan_to_num(nan=0.0)
    if mask_N is not None:
        log_N = log_N.masked_fill(~mask_N, 0.0)
    if mode.startswith("sequence"):
        log_N = per_token(segment_sums(log_N, length_C), length_C)
    ratio_N = log_N.exp()
    low, high = 0.0 if floor is None else floor, float("inf") if cap is None else cap
    if mode.endswith("truncate"):
        return ratio_N.clamp(low, high)
    return ratio_N.masked_fill((ratio_N < low) | (ratio_N > high), 0.0)


def effective_sample_share(weights_N: Tensor) -> Tensor:
    """Return the effective sample size of some weights over their number, a scalar in (0, 1]; 1 where all are equal."""
    return weights_N.sum().square() / (len(weights_N) * weights_N.square().sum())
