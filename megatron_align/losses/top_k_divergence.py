"""Divergences between the policy and a frozen teacher over the teacher's top k tokens: distillation, KL on SFT data.

Shapes: N rows, K columns: the same K tokens of a row for both models, the teacher's most likely. Given are logits, or
log-probs: a constant per row has no effect, as both distributions are renormalised over the K tokens. Only so is a
divergence never negative, and 0 where the models agree; with K the vocabulary it is the full one.

Every function returns ``[N]``, not reduced, in nats, differentiable once in ``policy_NK``. Its gradient is written out,
so that it is exactly 0 where the two rows have the same bits: a policy that starts as its reference does not move by
rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Past this, exp overflows fp32; the other factor is then 0.
LARGEST_EXPONENT = 80.0


def reverse_kl(policy_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Return ``KL(policy || teacher)``, mode-seeking: the Baichuan report's on SFT data; on-policy distillation."""
    log_p_NK, log_q_NK = policy_NK.detach().log_softmax(-1), teacher_NK.log_softmax(-1)
    p_NK, ratio_NK = log_p_NK.exp(), log_p_NK - log_q_NK
    value_N = (p_NK * ratio_NK).sum(-1)
    return _with_gradient(value_N, p_NK * (ratio_NK - value_N[:, None]), policy_NK)


def forward_kl(policy_NK: Tensor, teacher_NK: Tensor) -> Tensor:
    """Return ``KL(teacher || policy)``, mass-covering: cross-entropy with soft labels, less the teacher's entropy."""
    log_p_NK, log_q_NK = policy_NK.detach().log_softmax(-1), teacher_NK.log_softmax(-1)
    q_NK = log_q_NK.exp()
    value_N = (q_NK * (log_q_NK - log_p_NK)).sum(-1)
    return _with_gradient(value_N, log_p_NK.exp() - q_NK, policy_NK)


def js_divergence(policy_NK: Tensor, teacher_NK: Tensor, *, beta: float = 0.5) -> Tensor:
    """Return ``beta KL(teacher || m) + (1 - beta) KL(policy || m)``, ``m = (1 - beta) policy + beta teacher``.

    GKD's generalised Jensen-Shannon divergence, beta in (0, 1). Agarwal et al. 2023, arXiv:2306.13649, eq. 1. TRL's
    GKDTrainer takes beta 0 as the forward and 1 as the reverse KL: those are the functions above.
    """
    if not 0 < beta < 1:
        raise ValueError(f"js_divergence needs beta in (0, 1), got {beta}")
    log_p_NK, log_q_NK = policy_NK.detach().log_softmax(-1), teacher_NK.log_softmax(-1)
    p_NK, q_NK, gap_NK = log_p_NK.exp(), log_q_NK.exp(), log_q_NK - log_p_NK
    over_m_NK = -torch.log1p(beta * torch.expm1(gap_NK.clamp(max=LARGEST_EXPONENT)))  # log(p / m)
    teacher_over_m_NK = -torch.log1p((1 - beta) * torch.expm1((-gap_NK).clamp(max=LARGEST_EXPONENT)))
    policy_N = (p_NK * over_m_NK).sum(-1)
    value_N = beta * (q_NK * teacher_over_m_NK).sum(-1) + (1 - beta) * policy_N
    return _with_gradient(value_N, (1 - beta) * p_NK * (over_m_NK - policy_N[:, None]), policy_NK)


def _with_gradient(value_N: Tensor, gradient_NK: Tensor, policy_NK: Tensor) -> Tensor:
    """Return the value, with this gradient with respect to the policy's logits."""
    linear_N = (gradient_NK * policy_NK).sum(-1)
    return value_N + (linear_N - linear_N.detach())


TOP_K_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
}
