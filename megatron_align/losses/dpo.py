"""Preference losses of the DPO family: the policy against a reference, on pairs. Names are TRL's ``loss_type``.

Shapes: N preference pairs. Every loss returns ``[N]`` fp32, not reduced, and differentiable in the policy's sums: the
caller divides the sum by the step's global pair count. Only the batch-coupled losses of ``DPO_LOSSES`` mix pairs.

In the formulas, w and l are the log-ratios ``log policy - log reference`` of the chosen and the rejected response, s is
the sigmoid, and ``beta > 0`` (0.1 in TRL) is the KL coefficient. A loss with ``divergence`` applies it to w and l first
(losses/divergences.py). A loss has no parameters but the options that it uses; ``DPO_LOSSES`` lists them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.errors import InputError
from megatron_align.losses.divergences import Divergence, reverse_kl
from megatron_align.losses.links import hinge_loss, logistic, squared_loss
from megatron_align.losses.pair_loss import PairLoss
from megatron_align.losses.responses import Responses


def _margin(chosen: Responses, rejected: Responses, divergence: Divergence) -> Tensor:
    return divergence(chosen.log_ratio_N) - divergence(rejected.log_ratio_N)


def _margin_per_token(chosen: Responses, rejected: Responses, divergence: Divergence) -> Tensor:
    chosen_N = divergence(chosen.log_ratio_N) / chosen.length_N
    return chosen_N - divergence(rejected.log_ratio_N) / rejected.length_N


def sigmoid(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """DPO: ``-log s(beta (w - l))``. Rafailov et al. 2023, arXiv:2305.18290, eq. 7.

    With label smoothing it is conservative DPO (Mitchell 2023), which TRL's ``sigmoid`` does not offer.
    """
    return logistic(beta * _margin(chosen, rejected, divergence), label_smoothing)


def sigmoid_norm(
    chosen: Responses, rejected: Responses, *, beta: float = 0.1, divergence: Divergence = reverse_kl
) -> Tensor:
    """Length-normalised DPO: ``-log s(beta (w / |chosen| - l / |rejected|))``. Tulu 3, arXiv:2411.15124."""
    return logistic(beta * _margin_per_token(chosen, rejected, divergence))


def robust(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """Robust DPO: an unbiased estimate of the clean loss when a share e of labels is flipped.

    ``(-(1 - e) log s(m) + e log s(-m)) / (1 - 2 e)``, ``m = beta (w - l)``; e is ``label_smoothing`` in [0, 0.5).
    Chowdhury et al. 2024, arXiv:2403.00409.
    """
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    margin_N = beta * _margin(chosen, rejected, divergence)
    clean_N, flipped_N = -F.logsigmoid(margin_N), -F.logsigmoid(-margin_N)
    return ((1 - label_smoothing) * clean_N - label_smoothing * flipped_N) / (1 - 2 * label_smoothing)


def hinge(
    chosen: Responses, rejected: Responses, *, beta: float = 0.1, divergence: Divergence = reverse_kl
) -> Tensor:
    """``max(0, 1 - beta (w - l))``: SLiC's hinge on DPO's margin. Zhao et al. 2023, arXiv:2305.10425."""
    return hinge_loss(beta * _margin(chosen, rejected, divergence))


def ipo(
    chosen: Responses, rejected: Responses, *, beta: float = 0.1, divergence: Divergence = reverse_kl
) -> Tensor:
    """IPO: ``(w / |chosen| - l / |rejected| - 1 / (2 beta))^2``. Azar et al. 2023, arXiv:2310.12036, eq. 17.

    Beta is the paper's tau. Log-ratios are averaged over tokens, as in TRL, by agreement with the authors.
    """
    return squared_loss(_margin_per_token(chosen, rejected, divergence), beta=beta)


def exo_pair(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """EXO on pairs: ``KL((q, 1 - q) || (1 - e, e))``, ``q = s(beta (w - l))``.

    e is ``label_smoothing`` in (0, 0.5): at 0 the divergence is infinite. TRL's default is 0, which it then refuses;
    ours is the 1e-3 that it recommends. Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    if not 0 < label_smoothing < 0.5:
        raise InputError(f"exo_pair needs label_smoothing in (0, 0.5), got {label_smoothing}")
    margin_N = beta * _margin(chosen, rejected, divergence)
    win_N = torch.sigmoid(margin_N) * (F.logsigmoid(margin_N) - math.log1p(-label_smoothing))
    return win_N + torch.sigmoid(-margin_N) * (F.logsigmoid(-margin_N) - math.log(label_smoothing))


def nca_pair(chosen: Responses, rejected: Responses, *, beta: float = 0.1) -> Tensor:
    """NCA on pairs: ``-log s(beta w) - (log s(-beta w) + log s(-beta l)) / 2``.

    Holds the chosen response's likelihood up, where DPO may lower both. Chen et al. 2024, arXiv:2402.05369.
    """
    chosen_N, rejected_N = beta * chosen.log_ratio_N, beta * rejected.log_ratio_N
    return -F.logsigmoid(chosen_N) - 0.5 * (F.logsigmoid(-chosen_N) + F.logsigmoid(-rejected_N))


def bco_pair(chosen: Responses, rejected: Responses, *, beta: float = 0.1) -> Tensor:
    """BCO on pairs: ``-log s(beta w) - log s(-beta l)``. Jung et al. 2024, arXiv:2404.04656.

    Without the paper's reward shift delta, as in TRL 1.16; ``losses/kto_bco.py: bco`` has it.
    """
    return -F.logsigmoid(beta * chosen.log_ratio_N) - F.logsigmoid(-(beta * rejected.log_ratio_N))


def sppo_hard(chosen: Responses, rejected: Responses, *, beta: float = 0.1) -> Tensor:
    """SPPO, hard labels: ``(w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2``. Wu et al. 2024, arXiv:2405.00675, eq. 4.7."""
    return (chosen.log_ratio_N - 0.5 / beta) ** 2 + (rejected.log_ratio_N + 0.5 / beta) ** 2


def aot(chosen: Responses, rejected: Responses, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT, paired: pushes the distribution of the policy's margins above that of the reference's.

    Both are sorted over the batch, then compared rank by rank with the logistic loss. Element i of the result belongs
    to rank i, not to pair i; autograd takes the gradient back to the pairs. Melnyk et al., arXiv:2406.05882.
    """
    policy_N = torch.sort(chosen.policy_N - rejected.policy_N).values
    reference_N = torch.sort(chosen.require_reference() - rejected.require_reference()).values
    return logistic(beta * (policy_N - reference_N), label_smoothing)


def aot_unpaired(
    chosen: Responses, rejected: Responses, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """AOT, unpaired: pushes the distribution of chosen log-ratios above that of rejected ones. arXiv:2406.05882.

    Sorted over the batch, as in ``aot``.
    """
    margin_N = torch.sort(chosen.log_ratio_N).values - torch.sort(rejected.log_ratio_N).values
    return logistic(beta * margin_N, label_smoothing)


def apo_zero(chosen: Responses, rejected: Responses, *, beta: float = 0.1) -> Tensor:
    """APO-zero: ``1 - s(beta w) + s(beta l)``: chosen up, rejected down.

    For chosen responses better than the model's own. D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    return torch.sigmoid(-beta * chosen.log_ratio_N) + torch.sigmoid(beta * rejected.log_ratio_N)


def apo_down(chosen: Responses, rejected: Responses, *, beta: float = 0.1) -> Tensor:
    """APO-down: ``s(beta w) + 1 - s(beta (w - l))``: both down, the rejected more. arXiv:2408.06266, eq. 8.

    For chosen responses worse than the model's own.
    """
    margin_N = chosen.log_ratio_N - rejected.log_ratio_N
    return torch.sigmoid(beta * chosen.log_ratio_N) + torch.sigmoid(-beta * margin_N)


def discopop(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """DiscoPOP: ``(1 - g) (-log s(m)) + g exp(-m)``, ``m = beta (w - l)``, ``g = s(m / tau)``.

    A blend, found by search, of the logistic and the exponential loss. Lu et al. 2024, arXiv:2406.08414, eq. 5.
    """
    margin_N = beta * _margin(chosen, rejected, divergence)
    # g exp(-m) in one exponential: as a product, 0 times infinity is NaN at very negative margins
    exponential_N = torch.exp(F.logsigmoid(margin_N / discopop_tau) - margin_N)
    return torch.sigmoid(-margin_N / discopop_tau) * -F.logsigmoid(margin_N) + exponential_N


def margin(
    chosen: Responses,
    rejected: Responses,
    *,
    margin_N: Tensor,
    beta: float = 0.1,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """DPO with an offset: ``-log s(beta (w - l) - margin)``. Amini et al. 2024, arXiv:2402.10571.

    ``margin_N`` is by how much the chosen response is better, in units of reward. Not in TRL.
    """
    return logistic(beta * _margin(chosen, rejected, divergence) - margin_N)


def reward_aware(
    chosen: Responses,
    rejected: Responses,
    *,
    margin_N: Tensor,
    beta: float = 0.1,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """Reward-aware preference optimisation: ``KL(p || q)``, ``p = s(margin)``, ``q = s(beta (w - l))``, Bernoulli.

    Regresses the implicit margin to the given one, so that it does not grow without bound. Adler et al. 2024
    (Nemotron-4), arXiv:2406.11704, with its eta absorbed into the margin. Not in TRL.
    """
    implicit_N = beta * _margin(chosen, rejected, divergence)
    win_N = torch.sigmoid(margin_N) * (F.logsigmoid(margin_N) - F.logsigmoid(implicit_N))
    return win_N + torch.sigmoid(-margin_N) * (F.logsigmoid(-margin_N) - F.logsigmoid(-implicit_N))


# All take beta as well. Losses without ``divergence`` have no form for another f-divergence than the reverse KL.
DPO_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, ("label_smoothing", "divergence")),
    "sigmoid_norm": PairLoss(sigmoid_norm, ("divergence",)),
    "robust": PairLoss(robust, ("label_smoothing", "divergence")),
    "hinge": PairLoss(hinge, ("divergence",)),
    "ipo": PairLoss(ipo, ("divergence",)),
    "exo_pair": PairLoss(exo_pair, ("label_smoothing", "divergence")),
    "nca_pair": PairLoss(nca_pair),
    "bco_pair": PairLoss(bco_pair),
    "sppo_hard": PairLoss(sppo_hard),
    "aot": PairLoss(aot, ("label_smoothing",), batch_coupled=True),
    "aot_unpaired": PairLoss(aot_unpaired, ("label_smoothing",), batch_coupled=True),
    "apo_zero": PairLoss(apo_zero),
    "apo_down": PairLoss(apo_down),
    "discopop": PairLoss(discopop, ("discopop_tau", "divergence")),
    "margin": PairLoss(margin, ("divergence",), reads_margin=True),
    "reward_aware": PairLoss(reward_aware, ("divergence",), reads_margin=True),
}
