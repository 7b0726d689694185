"""Preference losses on pairs without a reference model: CPO, SimPO, AlphaPO, TPO, ORPO. Names are TRL's ``loss_type``.

Shapes: N preference pairs. Every loss returns ``[N]`` fp32, not reduced, differentiable in the policy's sums, pairs
never mixed. The likelihood term that CPO, TPO and ORPO add (times ``cpo_alpha``, ``tpo_alpha``, 1) is ``NLLTerm`` of
objectives/preference.py.

In the formulas, w and l are the policy's log-probabilities of the chosen and the rejected response, summed or averaged
over tokens as each loss states, and s is the sigmoid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.losses.links import hinge_loss, logistic, squared_loss
from megatron_align.losses.pair_loss import PairLoss
from megatron_align.losses.responses import Responses


def alpha_reward(logprob_N: Tensor, alpha: float) -> Tensor:
    """Return AlphaPO's reward ``(1 - p^-alpha) / alpha``, ``[N]``; its limit at alpha = 0 is ``log p``.

    Gupta et al. 2025, arXiv:2501.03884. TRL: ``alpha`` (default 0) of every CPO loss type.
    """
    return logprob_N if alpha == 0 else -torch.expm1(-alpha * logprob_N) / alpha


def sigmoid(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """CPO: ``-log s(beta (w - l))`` of sums. Xu et al. 2024, arXiv:2401.08417, eq. 3."""
    margin_N = alpha_reward(chosen.policy_N, alpha) - alpha_reward(rejected.policy_N, alpha)
    return logistic(beta * margin_N, label_smoothing)


def hinge(chosen: Responses, rejected: Responses, *, beta: float = 0.1, alpha: float = 0.0) -> Tensor:
    """``max(0, 1 - beta (w - l))`` of sums: SLiC. Zhao et al. 2023, arXiv:2305.10425."""
    return hinge_loss(beta * (alpha_reward(chosen.policy_N, alpha) - alpha_reward(rejected.policy_N, alpha)))


def ipo(chosen: Responses, rejected: Responses, *, beta: float = 0.1, alpha: float = 0.0) -> Tensor:
    """``(w - l - 1 / (2 beta))^2`` of means. Azar et al. 2023, arXiv:2310.12036, eq. 17, without its reference."""
    margin_N = alpha_reward(chosen.mean_logprob_N, alpha) - alpha_reward(rejected.mean_logprob_N, alpha)
    return squared_loss(margin_N, beta=beta)


def simpo(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 0.1,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
) -> Tensor:
    """SimPO: ``-log s(beta (w - l) - gamma)`` of means. Meng et al. 2024, arXiv:2405.14734, eq. 6.

    The paper uses beta 2 to 10 and gamma 0.3 to 1.6; 0.1 and 0.5 are TRL's defaults. With ``alpha`` it is AlphaPO;
    with the likelihood term CPO-SimPO.
    """
    margin_N = alpha_reward(chosen.mean_logprob_N, alpha) - alpha_reward(rejected.mean_logprob_N, alpha)
    return logistic(beta * margin_N - simpo_gamma, label_smoothing)


# alphapo is simpo with its likelihood term off; TRL resolves the name the same way
CPO_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, ("label_smoothing", "alpha")),
    "hinge": PairLoss(hinge, ("alpha",)),
    "ipo": PairLoss(ipo, ("alpha",)),
    "simpo": PairLoss(simpo, ("simpo_gamma", "label_smoothing", "alpha")),
    "alphapo": PairLoss(simpo, ("simpo_gamma", "label_smoothing", "alpha")),
}


def tpo_l(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 0.01,
    tpo_l_gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """TPO-L: ``-log s(beta (w - l) - gamma)`` of means. Saeidi et al. 2024, arXiv:2405.16681.

    SimPO's loss; TPO adds a likelihood term on a third, gold response.
    """
    return simpo(chosen, rejected, beta=beta, simpo_gamma=tpo_l_gamma, label_smoothing=label_smoothing)


# CPO's functions without AlphaPO's reward
TPO_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, ("label_smoothing",)),
    "hinge": PairLoss(hinge),
    "ipo": PairLoss(ipo),
    "tpo-l": PairLoss(tpo_l, ("tpo_l_gamma", "label_smoothing")),
}


def log1mexp(x_N: Tensor) -> Tensor:
    """Return ``log(1 - exp(x))`` for ``x < 0``, ``[N]``, exact at both ends, gradient too.

    Each branch sees only values in its own range: the branch not selected would still put NaN into the gradient.
    """
    near_N = x_N > -0.6931471805599453  # -ln 2
    return torch.where(
        near_N,
        torch.log(-torch.expm1(torch.where(near_N, x_N, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_N, -1.0, x_N))),
    )


def orpo(chosen: Responses, rejected: Responses, *, beta: float = 0.1) -> Tensor:
    """ORPO's odds-ratio term: ``-beta log s(log odds(w) - log odds(l))`` of means. Hong et al. 2024, arXiv:2403.07691.

    ``odds(p) = p / (1 - p)``; beta is the paper's lambda. The full loss adds the likelihood term once: TRL takes it
    over prompt and chosen response, the paper over the response.
    """
    chosen_N, rejected_N = chosen.mean_logprob_N, rejected.mean_logprob_N
    log_odds_N = (chosen_N - rejected_N) - (log1mexp(chosen_N) - log1mexp(rejected_N))
    return -beta * F.logsigmoid(log_odds_N)
