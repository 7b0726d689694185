"""Preference losses on single responses marked good or bad: KTO, APO-zero unpaired, BCO. Names are TRL's ``loss_type``.

Shapes: N responses. Every loss returns ``[N]`` fp32, not reduced, differentiable in the policy's sums. KTO and BCO
compare with a statistic of the step's global batch, a number without gradient that the caller computes first; given
it, responses are not mixed.

In the formulas, r is the log-ratio ``log policy - log reference`` and s is the sigmoid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.losses.responses import Responses


def _signed(margin_N: Tensor, desirable_N: Tensor) -> Tensor:
    """Return the margin of each desirable response and minus the margin of each other one."""
    return torch.where(desirable_N, margin_N, -margin_N)


def kto(
    responses: Responses,
    desirable_N: Tensor,
    *,
    baseline: float | Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: ``weight (1 - s(beta (r - z)))`` of a desirable response, ``weight (1 - s(beta (z - r)))`` of another.

    ``desirable_N`` is bool; ``baseline`` is z, in nats, of ``kto_baseline``. Ethayarajh et al. 2024, arXiv:2402.01306,
    eq. 7 and 8. Its advice: weights that bring (desirable weight x count) / (undesirable weight x count) to 1 to 4/3.
    """
    margin_N = _signed(beta * (responses.log_ratio_N - baseline), desirable_N)
    loss_N = torch.sigmoid(-margin_N)
    return torch.where(desirable_N, desirable_weight * loss_N, undesirable_weight * loss_N)


def kto_baseline(mismatched: Responses) -> Tensor:
    """Return KTO's z: the mean log-ratio of mismatched responses, at least 0; a scalar without gradient, in nats.

    Mismatched: each prompt with another prompt's response. Pass all of the step's global batch in one call; TRL
    takes one mean per micro-batch, averaged over ranks.
    """
    return mismatched.log_ratio_N.detach().mean().clamp(min=0)


def apo_zero_unpaired(
    responses: Responses,
    desirable_N: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero on single responses: KTO with baseline 0. D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7."""
    margin_N = _signed(beta * responses.log_ratio_N, desirable_N)
    loss_N = torch.sigmoid(-margin_N)
    return torch.where(desirable_N, desirable_weight * loss_N, undesirable_weight * loss_N)


def bco(responses: Responses, desirable_N: Tensor, *, delta: float | Tensor, beta: float = 0.1) -> Tensor:
    """BCO: ``-log s(beta r - delta)`` of a desirable response, ``-log s(delta - beta r)`` of another.

    ``delta`` is the running mean of the rewards ``beta r`` (``RunningMean``), including this step's. Jung et al. 2024,
    arXiv:2404.04656, without its weights for a shift between the two sets' prompts. Not in TRL 1.16.
    """
    return -F.logsigmoid(_signed(beta * responses.log_ratio_N - delta, desirable_N))


@dataclass(frozen=True)
class RunningMean:
    """Mean of all values so far, each weighing the same. A checkpoint holds its two numbers.

    Args:
        mean: of the values so far
        count: number of values so far
    """

    mean: float = 0.0
    count: int = 0

    def update(self, values_N: Tensor) -> "RunningMean":
        """Return the state after the step's values, all of its global batch in one call."""
        count = self.count + values_N.numel()
        gap = values_N.detach().double().sum().item() - values_N.numel() * self.mean
        return RunningMean(mean=self.mean + gap / count, count=count)


UNPAIRED_LOSSES: dict[str, Callable[..., Tensor]] = {
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
    "bco": bco,
}
