"""The critic's loss: squared error of values to returns, clipped as PPO's.

Shapes: N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(value_N: Tensor, old_value_N: Tensor, return_N: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """Return ``max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2`` of each token, ``[N]``, not reduced.

    Weigh it by 1 / tokens of the step's global batch. Baselines' PPO; verl's ``cliprange_value`` 0.5, OpenRLHF's 0.5,
    TRL's former PPO 0.2.

    Args:
        value_N: the critic's values; carry the gradient.
        old_value_N: its values when the rollout was scored.
        return_N: targets.
        clip: half-width; None: the plain squared error.
    """
    error_N = (value_N - return_N).square()
    if clip is not None:
        near_N = clipped_values(value_N, old_value_N, clip)
        error_N = torch.maximum(error_N, (near_N - return_N).square())
    return error_N / 2


def clipped_values(value_N: Tensor, old_value_N: Tensor, clip: float | None) -> Tensor:
    """Return the values within ``clip`` of the old ones, ``[N]``; None: as they are."""
    return value_N if clip is None else value_N.clamp(old_value_N - clip, old_value_N + clip)
