"""Rollouts with their rewards, and the metrics of runs on them: of a set of rollouts, and of each step.

Shapes: C completions of G prompts, one prompt's after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_align.losses.segments import per_token, segment_sums
from megatron_align.objectives.metrics import Metric


def _metric(name: str, unit: str, meaning: str, trl: str = "") -> Metric:
    return Metric(name=name, unit=unit, meaning=meaning, trl=trl, section="Learning")


GROUPS_WITHOUT_SIGNAL = _metric(
    "groups_without_signal",
    "share",
    "prompts whose completions all have the same reward: they teach nothing",
    "frac_reward_zero_std",
)
OF_ROLLOUTS = (
    _metric("rollout", "", "number of the rollouts that the step trained on, from 1"),
    _metric(
        "reward",
        "reward",
        "mean reward of the rollouts' completions: the weighted sum of all rewards",
        "reward",
    ),
    _metric(
        "reward_std",
        "reward",
        "deviation of the rewards of all completions of the rollouts",
        "reward_std",
    ),
    _metric(
        "completion_length", "tokens", "mean length of the rollouts' completions", "completions/mean_length"
    ),
    _metric(
        "truncated",
        "share",
        "completions that were cut off at rollout.max_tokens",
        "completions/clipped_ratio",
    ),
    GROUPS_WITHOUT_SIGNAL,
    _metric(
        "staleness",
        "steps",
        "steps between the weights that generated the rollouts and those that the step starts from",
    ),
    _metric(
        "groups_replaced",
        "prompts",
        "prompts without signal that were answered for the rollouts and replaced (rollout.dynamic_sampling)",
    ),
    _metric(
        "generation_batches",
        "batches",
        "batches of prompts that were answered for the rollouts, the first included (rollout.dynamic_sampling)",
    ),
    _metric(
        "reward_sampled",
        "reward",
        "mean reward of all completions that were generated for the rollouts, also of replaced prompts "
        "(rollout.dynamic_sampling)",
    ),
    Metric(
        name="rollout_seconds",
        unit="seconds",
        meaning="generation and rewards, in the step that needed new rollouts",
        section="Speed",
    ),
    Metric(
        name="sync_seconds",
        unit="seconds",
        meaning="giving the engines the weights, in the step that needed new rollouts",
        section="Speed",
    ),
)
KL = _metric(
    "kl",
    "nats per token",
    "mean estimate of the KL divergence from the reference, weighed by the ratio where the loss weighs it",
    "kl",
)
ENTROPY_THRESHOLD = _metric(
    "entropy_threshold",
    "nats",
    "lowest entropy of a token that keeps its policy loss (top_entropy_quantile below 1)",
)
OF_STEPS = (
    KL,
    _metric("entropy", "nats", "mean entropy of the policy at the trained tokens", "entropy"),
    _metric(
        "clip_fraction",
        "share",
        "tokens whose ratio is outside the clip (TRL, level sequence: completions)",
        "clip_ratio/region_mean",
    ),
    _metric("ratio_max", "ratio", "largest ratio of the policy to the policy that sampled"),
    _metric(
        "mismatch_mean",
        "nats per token",
        "mean absolute difference of log-probs, trainer against engine",
        "sampling/sampling_logp_difference/mean",
    ),
    _metric(
        "mismatch_max",
        "nats per token",
        "largest absolute difference of log-probs, trainer against engine",
        "sampling/sampling_logp_difference/max",
    ),
    _metric(
        "mismatch_k3", "nats per token", "k3 estimate of the KL divergence of the engine from the trainer"
    ),
    _metric(
        "ess",
        "share",
        "effective sample size under the weights rollout.correction, over the number of tokens",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ScoredRollouts:
    """Rollouts with their rewards, before advantages. On the host.

    Args:
        reward_C: fp64; anything where a completion was not scored
        scored_C: bool: a reward function scored it
        size_G: completions of each prompt, int64
        weight_G: of each prompt in the loss, fp64
        minibatch_G: which minibatch of the rollouts each prompt is in, int64
        length_C: tokens of each completion, int64
        truncated_C: bool: it was cut off
    """

    reward_C: Tensor
    scored_C: Tensor
    size_G: Tensor
    weight_G: Tensor
    minibatch_G: Tensor
    length_C: Tensor
    truncated_C: Tensor


def rollout_metrics(rollouts: ScoredRollouts) -> dict[str, float]:
    """Return the metrics of a set of rollouts, besides those of each reward, as TRL 1.16 defines them."""
    scored_C, size_G = rollouts.scored_C, rollouts.size_G
    reward_C = rollouts.reward_C.double().masked_fill(~scored_C, 0.0)
    [mean], [deviation] = _moments(reward_C, scored_C, size_G.sum()[None])
    return {
        "reward": float(mean),
        "reward_std": float(deviation),
        "completion_length": float(rollouts.length_C.double().mean()),
        "truncated": float(rollouts.truncated_C.double().mean()),
        "groups_without_signal": float((~groups_with_signal(reward_C, scored_C, size_G)).double().mean()),
    }


def groups_with_signal(reward_C: Tensor, scored_C: Tensor, size_G: Tensor) -> Tensor:
    """Return which prompts have completions of different rewards, ``[G]`` bool, among those that were scored."""
    reward_C = reward_C.double().masked_fill(~scored_C, 0.0)
    deviation_G = _moments(reward_C, scored_C, size_G)[1]
    return deviation_G > 1e-8  # equal rewards are not exactly their mean: 0.1 three times


def _moments(reward_C: Tensor, scored_C: Tensor, size_G: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased deviation of the rewards of each group, ``[G]``; rewards are 0 where not scored."""
    count_G = segment_sums(scored_C.double(), size_G)
    mean_G = segment_sums(reward_C, size_G) / count_G.clamp(min=1)
    off_C = (reward_C - per_token(mean_G, size_G)).masked_fill(~scored_C, 0.0)
    return mean_G, (segment_sums(off_C.square(), size_G) / (count_G - 1).clamp(min=1)).sqrt()
