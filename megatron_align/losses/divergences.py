"""f-DPO: the log-ratio under another f-divergence than the reverse KL.

Wang et al. 2023, arXiv:2309.16240. With ``t = policy / reference``, the implicit reward is ``beta f'(t)`` up to a term
of the prompt alone; so only losses of the difference of two rewards can use it. Every function here maps log t to
f'(t), elementwise; reverse KL is the identity, plain DPO.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor], Tensor]

# Past this, exp overflows fp32. TRL clamps its alpha divergence at the same place; beyond it the gradient is 0.
LARGEST_EXPONENT = 80.0


def reverse_kl(log_ratio_N: Tensor) -> Tensor:
    """Return ``log t``."""
    return log_ratio_N


def alpha_divergence(log_ratio_N: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Return ``(t^(alpha - 1) - 1) / (alpha - 1)``; its limit at alpha = 1 is the reverse KL, alpha = 0 the forward KL.

    TRL: ``f_alpha_divergence_coef`` (default 0.5).
    """
    if abs(alpha - 1) < 1e-6:
        return log_ratio_N
    return torch.expm1(((alpha - 1) * log_ratio_N).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)


def forward_kl(log_ratio_N: Tensor) -> Tensor:
    """Return ``1 - 1 / t``."""
    return alpha_divergence(log_ratio_N, alpha=0.0)


def js_divergence(log_ratio_N: Tensor) -> Tensor:
    """Return ``log(2 t / (t + 1))``: Jensen-Shannon."""
    return math.log(2) + F.logsigmoid(log_ratio_N)


# TRL: f_divergence_type (default reverse_kl)
DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
