"""Advantages of sampled completions from their rewards: group, batch, leave-one-out, REINFORCE++, OPO, GAE.

Shapes: C completions of G groups (one prompt each), one group after the other; N tokens of the completions, one after
the other. All functions compute and return fp64, without gradient: these are numbers of a step, computed once, from the
step's global batch. Where they need a statistic over more completions than they are given, it is an argument
(:class:`Moments`), so that no result depends on how ranks share the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_align.errors import InputError, require
from megatron_align.losses.segments import backward_sums, next_in_segment, per_token, segment_sums


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, sum and sum of squares of some numbers; those of two ranks or packs add up."""

    count: float
    total: float
    squares: float

    @classmethod
    def of(cls, values: Tensor, counted: Tensor | None = None) -> Moments:
        """Return the moments of the values, of those that count if given (bool)."""
        values = values.detach().double()
        values = values.flatten() if counted is None else values[counted]
        return cls(float(values.numel()), values.sum().item(), values.square().sum().item())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> float:
        """Mean; 0 of none."""
        return self.total / self.count if self.count else 0.0

    def deviation(self, *, unbiased: bool = True) -> float:
        """Return the standard deviation; 0 of fewer than two values."""
        if self.count < 2:
            return 0.0
        squares = max(self.squares - self.count * self.mean**2, 0.0)
        return (squares / (self.count - int(unbiased))) ** 0.5


def whiten(
    values: Tensor, moments: Moments, *, std_eps: float = 1e-4, unbiased: bool = True, centre: bool = True
) -> Tensor:
    """Return ``(values - mean) / (deviation + std_eps)``, fp64.

    Args:
        values: any shape.
        moments: of the values of all ranks: those of one rank would whiten each rank's completions differently.
        std_eps: TRL 1e-4; verl and OpenRLHF add 1e-8 to the variance instead.
        unbiased: deviation by ``n - 1`` (TRL, verl) or by n (OpenRLHF).
        centre: False: only scale.
    """
    centred = values.double() - (moments.mean if centre else 0.0)
    return centred / (moments.deviation(unbiased=unbiased) + std_eps)


@dataclass(frozen=True, slots=True)
class ScoredGroups:
    """The rewards of completions in groups of one prompt each. Made by :meth:`of`, which checks them.

    Args:
        reward_C: fp64; 0 where a completion was not scored
        size_G: completions of each group, int64
        scored_C: bool: False: nothing scored it, so it has no advantage
        counted_C: bool: it enters the statistics of its group and of the batch
    """

    reward_C: Tensor
    size_G: Tensor
    scored_C: Tensor
    counted_C: Tensor

    @classmethod
    def of(
        cls,
        reward_C: Tensor,
        size_G: Tensor,
        *,
        scored_C: Tensor | None = None,
        counted_C: Tensor | None = None,
    ) -> ScoredGroups:
        """Check rewards and build the groups.

        Args:
            reward_C: of each completion; anything where it was not scored.
            size_G: completions of each group; they sum to C.
            scored_C: False where every reward function returned None; None: all were scored.
            counted_C: False: out of the statistics though scored (truncated answers, if so chosen); None: all are in.

        Raises:
            InputError: a reward is NaN or infinite; names the completion.
        """
        if int(size_G.sum()) != len(reward_C):
            raise ValueError(f"groups of {int(size_G.sum())} completions in all, {len(reward_C)} rewards")
        scored_C = torch.ones_like(reward_C, dtype=torch.bool) if scored_C is None else scored_C
        bad = (scored_C & ~reward_C.isfinite()).nonzero()
        if len(bad):
            c = int(bad[0])
            group = int((size_G.cumsum(0) <= c).sum())
            place = c - int(size_G[:group].sum())
            raise InputError(
                f"a reward must be a finite number, or None where nothing scores the completion; got "
                f"{reward_C[c].item()} for completion {place} of prompt {group} of the step (both count from 0)"
            )
        counted_C = scored_C if counted_C is None else scored_C & counted_C
        return cls(reward_C.double().masked_fill(~scored_C, 0.0), size_G, scored_C, counted_C)

    def require_several(self, estimator: str) -> None:
        """Check that every group has two completions at least.

        Raises:
            InputError: naming the first prompt with one.
        """
        alone = (self.size_G < 2).nonzero()
        require(
            not len(alone),
            f"advantage {estimator} compares the completions of a prompt: it needs at least 2 of each, got "
            f"{int(self.size_G[alone[0]]) if len(alone) else 0} for prompt {int(alone[0]) if len(alone) else 0} of the "
            "step (counting from 0)",
        )

    def sums(self, values_C: Tensor) -> Tensor:
        """Sum over the completions of each group that count, ``[G]``."""
        return segment_sums(values_C.masked_fill(~self.counted_C, 0.0), self.size_G)

    def counts(self) -> Tensor:
        """Return the number of completions of each group that count, ``[G]`` fp64."""
        return segment_sums(self.counted_C.double(), self.size_G)

    def spread(self, values_G: Tensor) -> Tensor:
        """Repeat each group's value for its completions, ``[C]``."""
        return per_token(values_G, self.size_G)

    def centred(self) -> Tensor:
        """Return ``reward - mean of the group``, ``[C]``; 0 where nothing counts in the group, or it was not scored."""
        counts_G = self.counts()
        mean_G = self.sums(self.reward_C) / counts_G.clamp(min=1)
        return self.finished(self.reward_C - self.spread(mean_G), counts_G > 0)

    def deviations(self, *, unbiased: bool = True) -> Tensor:
        """Return the standard deviation of each group, ``[G]``; 0 of fewer than two that count."""
        counts_G = self.counts()
        mean_G = self.sums(self.reward_C) / counts_G.clamp(min=1)
        squares_G = self.sums((self.reward_C - self.spread(mean_G)).square())
        deviation_G = (squares_G / (counts_G - int(unbiased)).clamp(min=1)).sqrt()
        return deviation_G.masked_fill(counts_G < 2, 0.0)

    def comparable(self) -> Tensor:
        """Return which completions were scored and have another one in their group that counts, ``[C]`` bool."""
        others_C = self.spread(self.counts()) - self.counted_C.double()
        return self.scored_C & (others_C >= 1)

    def with_signal(self) -> Tensor:
        """Return which groups have two different rewards, ``[G]`` bool: the others have no gradient (DAPO's filter)."""
        sizes = self.size_G.tolist()
        parts = zip(self.reward_C.split(sizes), self.counted_C.split(sizes), strict=True)
        return torch.tensor([len(rewards[counted].unique()) > 1 for rewards, counted in parts])

    def finished(self, advantage_C: Tensor, known_G: Tensor) -> Tensor:
        """Return the advantages with 0 where the completion was not scored or its group's statistic is unknown."""
        return advantage_C.masked_fill(~(self.scored_C & self.spread(known_G)), 0.0)


def group_advantages(
    groups: ScoredGroups,
    scale_rewards: Literal["group", "batch", "none"] = "group",
    *,
    std_eps: float = 1e-4,
    unbiased: bool = True,
    moments: Moments | None = None,
) -> Tensor:
    """GRPO: ``(reward - mean of the group) / (deviation + std_eps)``, ``[C]``. DeepSeekMath, arXiv:2402.03300.

    Args:
        groups: of the step.
        scale_rewards: deviation of the group, or of all rewards of the batch; none: no division (Dr. GRPO,
            arXiv:2503.20783).
        std_eps: TRL 1e-4, verl and NeMo-RL 1e-6, OpenRLHF 1e-9.
        unbiased: deviation by ``n - 1`` (TRL, verl), or by n.
        moments: of all rewards of the step that count, for scale_rewards batch; None: those of ``groups``.

    Raises:
        InputError: a group has one completion.
    """
    groups.require_several("group")
    centred_C = groups.centred()
    if scale_rewards == "none":
        return centred_C
    if scale_rewards == "batch":
        moments = moments or Moments.of(groups.reward_C, groups.counted_C)
        return centred_C / (moments.deviation(unbiased=unbiased) + std_eps)
    scaled_C = centred_C / (groups.spread(groups.deviations(unbiased=unbiased)) + std_eps)
    return groups.finished(scaled_C, groups.counts() > 1)


def leave_one_out_advantages(groups: ScoredGroups) -> Tensor:
    """RLOO: ``reward - mean reward of the group's others``, ``[C]``. Ahmadian et al. 2024, arXiv:2402.14740.

    Raises:
        InputError: a group has one completion.
    """
    groups.require_several("rloo")
    # a completion that does not count is not in the group's sum either
    own_C = groups.reward_C.masked_fill(~groups.counted_C, 0.0)
    others_C = groups.spread(groups.counts()) - groups.counted_C.double()
    baseline_C = (groups.spread(groups.sums(groups.reward_C)) - own_C) / others_C.clamp(min=1)
    return (groups.reward_C - baseline_C).masked_fill(~groups.comparable(), 0.0)


def optimal_baseline_advantages(groups: ScoredGroups, length_C: Tensor) -> Tensor:
    """OPO: ``reward - sum(length x reward) / sum(length)`` of the group, ``[C]``. Hao et al. 2025, arXiv:2505.23585.

    Args:
        groups: of the step.
        length_C: tokens of each completion that count.

    Raises:
        InputError: a group has one completion.
    """
    groups.require_several("opo")
    length_C = length_C.double()
    total_G = groups.sums(length_C)
    baseline_G = groups.sums(length_C * groups.reward_C) / total_G.clamp(min=1)
    return groups.finished(groups.reward_C - groups.spread(baseline_G), total_G > 0)


def token_rewards(score_C: Tensor, length_C: Tensor, penalty_N: Tensor | None = None) -> Tensor:
    """Return the reward of each token, ``[N]`` fp64: the score at a completion's last token, minus the penalty at each.

    Args:
        score_C: of each completion.
        length_C: its tokens, int64; all at least 1.
        penalty_N: coefficient x KL estimate; None: none.
    """
    if bool((length_C < 1).any()):
        raise ValueError("token_rewards needs completions of at least one token")
    last_C = length_C.cumsum(0) - 1
    reward_N = torch.zeros(int(length_C.sum()), dtype=torch.float64, device=score_C.device)
    reward_N[last_C] = score_C.double()
    return reward_N if penalty_N is None else reward_N - penalty_N.double()


def generalised_advantages(
    reward_N: Tensor, value_N: Tensor, length_C: Tensor, *, gamma: float = 1.0, gae_lambda: float = 1.0
) -> tuple[Tensor, Tensor]:
    """GAE on packed completions: advantages and returns, ``[N]`` fp64 each. Schulman et al. 2016, arXiv:1506.02438.

    ``A_t = sum over k of (gamma lambda)^k d_(t+k)``, ``d_t = r_t + gamma V_(t+1) - V_t``; the value after the last
    token is 0. Returns are ``A + V``, of unwhitened advantages. Tokens that are not scored (a tool's) have no
    row: the next scored one follows, without discount.

    Args:
        reward_N: of each token.
        value_N: the critic's value of what comes before the token: at the hidden row that predicts it.
        length_C: tokens of each completion, int64.
        gamma: discount.
        gae_lambda: lambda.
    """
    value_N = value_N.double()
    error_N = reward_N.double() + gamma * next_in_segment(value_N, length_C) - value_N
    advantage_N = backward_sums(error_N, length_C, gamma * gae_lambda)
    return advantage_N, advantage_N + value_N
