"""Ranked lists: K responses to one prompt, ordered by score.

Shapes: N lists, K places in the longest. ``reward_NK`` is a reward model's rewards, or DPO's implicit ones (beta times
the log-ratio). ``score_NK`` ranks them, higher is better, NaN where a list is shorter than K. Places may come in any
order. Each loss returns ``[N]`` fp32, not reduced, lists never mixed. With K = 2 both are Bradley-Terry.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def plackett_luce(reward_NK: Tensor, score_NK: Tensor) -> Tensor:
    """Return minus the log-probability of the ranking when places are filled from the best down by softmax, ``[N]``.

    ``sum over k of (logsumexp of the rewards ranked at or below k) - reward_k``. Plackett 1975; for DPO Rafailov et al.
    2023, arXiv:2305.18290, appendix A.3. Tied scores each compete with their entire group and all
    below it (Breslow's rule), so their order does not matter.
    """
    present_NK = ~score_NK.isnan()
    reward_NK = torch.where(present_NK, reward_NK, 0.0)
    # [n, k, j]: is j still to be placed when k is? NaN compares false; k itself always is, so no row is empty
    remaining_NKK = score_NK[:, None, :] <= score_NK[:, :, None]
    remaining_NKK = remaining_NKK | torch.eye(score_NK.shape[1], dtype=torch.bool, device=score_NK.device)
    rivals_NKK = reward_NK[:, None, :].expand_as(remaining_NKK).masked_fill(~remaining_NKK, -torch.inf)
    return ((rivals_NKK.logsumexp(2) - reward_NK) * present_NK).sum(1)


def all_pairs(reward_NK: Tensor, score_NK: Tensor) -> Tensor:
    """Return the mean of ``-log sigmoid(better - worse)`` over all pairs of unequal score of a list, ``[N]``.

    A list without such a pair costs 0. Ouyang et al. 2022, arXiv:2203.02155, eq. 1: every prompt weighs the same.
    """
    reward_NK = torch.where(score_NK.isnan(), 0.0, reward_NK)
    better_NKK = score_NK[:, :, None] > score_NK[:, None, :]
    loss_NKK = -F.logsigmoid(reward_NK[:, :, None] - reward_NK[:, None, :]) * better_NKK
    return loss_NKK.sum((1, 2)) / better_NKK.sum((1, 2)).clamp(min=1)


RANKED_LOSSES: dict[str, Callable[..., Tensor]] = {"plackett_luce": plackett_luce, "all_pairs": all_pairs}
