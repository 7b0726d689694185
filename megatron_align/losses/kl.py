"""Estimators of the KL divergence of the policy from a reference, from the log-prob of the sampled token alone.

Shapes: N scored tokens. ``log_ratio_N`` is ``log policy - log reference`` of tokens that the policy drew; each
estimator returns ``[N]``, not reduced, in nats. Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(log_ratio_N: Tensor) -> Tensor:
    """Return ``log ratio``: unbiased, negative on many tokens; summed over an answer it is the answer's log-ratio.

    As a term of a loss its own gradient is 0 in expectation, so it needs the weight of the importance ratio; in a
    reward it is the natural choice.
    """
    return log_ratio_N


def k2(log_ratio_N: Tensor) -> Tensor:
    """Return ``(log ratio)^2 / 2``: biased, never negative; its gradient is that of the KL divergence on-policy."""
    return log_ratio_N.square() / 2


def k3(log_ratio_N: Tensor) -> Tensor:
    """Return ``1 / ratio - 1 + log ratio``: unbiased, never negative. TRL's in GRPO; DeepSeekMath, arXiv:2402.03300."""
    return torch.expm1(-log_ratio_N) + log_ratio_N


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
