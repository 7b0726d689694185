"""Reward-model losses: pairs of rewards, with absolute scores where annotators gave them.

Shapes: N pairs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rewards:
    """The model's rewards of N responses and the annotators' scores. Tensors are ``[N]`` fp32.

    Args:
        reward_N: the model's rewards; carry the gradient
        score_N: absolute scores, on the scale that the reward is trained to have; NaN: none was given
    """

    reward_N: Tensor
    score_N: Tensor


def bradley_terry(chosen_N: Tensor, rejected_N: Tensor, margin_N: Tensor | None = None) -> Tensor:
    """Return ``-log sigmoid(chosen - rejected - margin)`` of rewards, ``[N]``.

    Bradley and Terry 1952; the margin (how much better, in units of reward) is Llama 2's, arXiv:2307.09288, eq. 2.
    """
    difference_N = chosen_N - rejected_N
    return -F.logsigmoid(difference_N if margin_N is None else difference_N - margin_N)


def score_error(rewards: Rewards) -> Tensor:
    """Return ``(reward - score)^2``, ``[N]``; 0 with gradient 0 where there is no score."""
    # Replace NaN before subtracting: NaN times 0 would still be NaN in the gradient
    score_N = torch.where(rewards.score_N.isnan(), rewards.reward_N.detach(), rewards.score_N)
    return (rewards.reward_N - score_N) ** 2


def reward_loss(
    chosen: Rewards,
    rejected: Rewards,
    *,
    margin_N: Tensor | None = None,
    alpha: float = 0.0,
    center_rewards_coefficient: float = 0.0,
) -> Tensor:
    """Return ``BT + alpha ((w - w^)^2 + (l - l^)^2) + c (w + l)^2`` of each pair, ``[N]``, not reduced.

    w and l are the rewards, w^ and l^ the absolute scores. BT and alpha are the objective of the Baichuan Alignment
    report (arXiv:2410.14940, section 2.1), whose alpha is 0 for samples without scores; here each response without a
    score drops its own term. c is TRL's ``center_rewards_coefficient`` (default None: off), which keeps rewards around
    0: Eisenstein et al. 2023, arXiv:2312.09244. Alpha 0 and c 0 are Bradley-Terry.
    """
    loss_N = bradley_terry(chosen.reward_N, rejected.reward_N, margin_N)
    if alpha:
        loss_N = loss_N + alpha * (score_error(chosen) + score_error(rejected))
    if center_rewards_coefficient:
        loss_N = loss_N + center_rewards_coefficient * (chosen.reward_N + rejected.reward_N) ** 2
    return loss_N
