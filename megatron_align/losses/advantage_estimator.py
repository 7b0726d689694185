"""From a step's rewards to the advantage of each token: an estimator with its options, KL penalties included.

Shapes: C completions, N tokens of them, one completion after the other. All of the step's global batch in one call, on
one host: whitening and batch statistics then need no exchange between ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_align.losses.advantages import (
    Moments,
    ScoredGroups,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    optimal_baseline_advantages,
    token_rewards,
    whiten,
)
from megatron_align.losses.kl import KL_ESTIMATORS
from megatron_align.losses.segments import backward_sums, per_token, segment_sums

Advantage = Literal["group", "rloo", "opo", "reinforce", "reinforce_baseline", "gae"]
KLPlace = Literal["loss", "token_reward", "sequence_reward"]
# Estimators that have one advantage for each completion, from comparing those of a prompt; the others have one a token
COMPARING: tuple[Advantage, ...] = ("group", "rloo", "opo", "reinforce_baseline")
WHITENED: tuple[Advantage, ...] = ("reinforce", "reinforce_baseline", "gae")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """The rollouts of a step, as advantages read them.

    Args:
        groups: rewards
        length_C: tokens of each completion, int64, at least 1
        mask_N: bool: tokens that count in statistics over tokens and in KL sums; None: all
        old_N: log-prob under the policy that sampled; for a KL penalty in the reward
        reference_N: log-prob under the reference; for the same
        value_N: the critic's value of what comes before each token; for gae
    """

    groups: ScoredGroups
    length_C: Tensor
    mask_N: Tensor | None = None
    old_N: Tensor | None = None
    reference_N: Tensor | None = None
    value_N: Tensor | None = None

    def counting(self) -> Tensor:
        """Return the tokens that count and whose completion was scored, ``[N]`` bool."""
        scored_N = per_token(self.groups.scored_C, self.length_C)
        return scored_N if self.mask_N is None else scored_N & self.mask_N


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageEstimator:
    """An estimator with its options; called on a step's experience it returns advantages and returns of each token.

    Args:
        advantage: group (GRPO), rloo, opo, reinforce (REINFORCE++), reinforce_baseline (of scores minus their group's
            mean) or gae
        scale_rewards: of group, see :func:`.advantages.group_advantages`
        std_eps: added to every deviation that divides
        unbiased_std: deviations by ``n - 1``
        normalize_advantages: whiten: over completions for group, rloo and opo (as TRL's RLOOTrainer), over tokens for
            the others
        beta: coefficient of a KL penalty in the reward
        kl_in: token_reward: each token's penalty lowers the advantages of the tokens up to it, after scores were
            compared in their group (the report's); sequence_reward: a completion's summed penalty lowers its score
            before that; loss: no penalty here
        kl_estimator: of the penalty
        gamma: discount of token rewards
        gae_lambda: of gae
        reward_clip_range: scores are clamped to it first; None: not
    """

    advantage: Advantage = "group"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    std_eps: float = 1e-4
    unbiased_std: bool = True
    normalize_advantages: bool = False
    beta: float = 0.0
    kl_in: KLPlace = "loss"
    kl_estimator: str = "k1"
    gamma: float = 1.0
    gae_lambda: float = 1.0
    reward_clip_range: tuple[float, float] | None = None

    def __call__(self, experience: Experience) -> tuple[Tensor, Tensor | None]:
        """Return advantages ``[N]`` fp64, 0 where a completion was not scored, and for gae the returns.

        The return of a completion that was not scored is the critic's own value: nothing to learn.
        """
        penalty_N = self._penalty(experience)
        groups = self._scores(experience, penalty_N)
        penalty_N = penalty_N if self.kl_in == "token_reward" else None
        returns_N = None
        if self.advantage == "gae":
            if experience.value_N is None:
                raise ValueError("advantage gae needs the critic's values, got none")
            rewards_N = token_rewards(groups.reward_C, experience.length_C, penalty_N)
            advantage_N, returns_N = generalised_advantages(
                rewards_N,
                experience.value_N,
                experience.length_C,
                gamma=self.gamma,
                gae_lambda=self.gae_lambda,
            )
        elif self.advantage == "reinforce":
            rewards_N = token_rewards(groups.reward_C, experience.length_C, penalty_N)
            advantage_N = backward_sums(rewards_N, experience.length_C, self.gamma)
        else:
            advantage_N = per_token(self._compared(groups, experience), experience.length_C)
            if penalty_N is not None:
                advantage_N = advantage_N - backward_sums(penalty_N, experience.length_C, self.gamma)
        counting_N = experience.counting()
        if self.normalize_advantages and self.advantage in WHITENED:
            advantage_N = self._whiten(advantage_N, counting_N)
        scored_N = per_token(groups.scored_C, experience.length_C)
        if returns_N is not None and experience.value_N is not None:
            returns_N = torch.where(scored_N, returns_N, experience.value_N.double())
        return advantage_N.masked_fill(~scored_N, 0.0), returns_N

    def _penalty(self, experience: Experience) -> Tensor | None:
        """Return beta x the KL estimate, ``[N]`` fp64, 0 where a token does not count; None: no penalty."""
        if self.beta == 0 or self.kl_in == "loss":
            return None
        if experience.old_N is None or experience.reference_N is None:
            raise ValueError(f"kl_in {self.kl_in} needs log-probs of the policy and the reference, got none")
        log_N = experience.old_N.double() - experience.reference_N.double()
        kl_N = KL_ESTIMATORS[self.kl_estimator](log_N)
        return self.beta * kl_N.masked_fill(~experience.counting(), 0.0)

    def _scores(self, experience: Experience, penalty_N: Tensor | None) -> ScoredGroups:
        """Return the groups with clipped scores, less the penalty of each completion if it is in the score."""
        groups = experience.groups
        reward_C = groups.reward_C
        if self.reward_clip_range is not None:
            reward_C = reward_C.clamp(*self.reward_clip_range)
        if penalty_N is not None and self.kl_in == "sequence_reward":
            reward_C = reward_C - segment_sums(penalty_N, experience.length_C)
        return ScoredGroups.of(reward_C, groups.size_G, scored_C=groups.scored_C, counted_C=groups.counted_C)

    def _compared(self, groups: ScoredGroups, experience: Experience) -> Tensor:
        """Return the advantage of each completion among those of its prompt, ``[C]``."""
        if self.advantage == "group":
            advantage_C = group_advantages(
                groups, self.scale_rewards, std_eps=self.std_eps, unbiased=self.unbiased_std
            )
        elif self.advantage == "rloo":
            advantage_C = leave_one_out_advantages(groups)
        elif self.advantage == "opo":
            counted_C = segment_sums(experience.counting().double(), experience.length_C)
            advantage_C = optimal_baseline_advantages(groups, counted_C)
        else:
            groups.require_several("reinforce_baseline")
            return groups.centred()
        return self._whiten(advantage_C, groups.comparable()) if self.normalize_advantages else advantage_C

    def _whiten(self, values: Tensor, counted: Tensor) -> Tensor:
        """Whiten the values by the moments of those that count; the others become 0."""
        moments = Moments.of(values, counted)
        white = whiten(values, moments, std_eps=self.std_eps, unbiased=self.unbiased_std)
        return torch.where(counted, white, 0.0)
