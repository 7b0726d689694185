"""Options of policy gradients on sampled completions, with TRL's names and defaults where TRL has them.

Every option that the others leave without effect is refused, and each of the rest is read by a method: the order of the
methods is that of a step. Formulas: losses/policy_gradient.py and losses/advantage_estimator.py; docs/online.md has an
example and says where peers differ.

Shapes: C completions of G prompts, one prompt's after the other; N tokens of them, one completion after the other; S
tokens that count in the step, over all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megatron_align.config.rollout import CorrectionConfig, RolloutConfig
from megatron_align.errors import require
from megatron_align.losses.advantage_estimator import COMPARING, WHITENED, AdvantageEstimator
from megatron_align.losses.advantages import ScoredGroups
from megatron_align.losses.policy_gradient import (
    POLICY_LOSSES,
    PolicyGradient,
    PolicyTokens,
    cispo_bounds,
    entropy_threshold,
    token_weights,
)
from megatron_align.losses.rewards import overlong_penalty
from megatron_align.losses.segments import per_token
from megatron_align.objectives.options import (
    ObjectiveOptions,
    require_loss_types,
    require_positive,
    require_used,
)
from megatron_align.objectives.ptx import PTXOptions

_OPTIONS_OF = {name: loss.options for name, loss in POLICY_LOSSES.items()}
_LOSS_OPTIONS = sorted({option for options in _OPTIONS_OF.values() for option in options})


@dataclass(frozen=True, kw_only=True)
class PolicyGradientOptions(ObjectiveOptions):
    """Policy gradient on sampled completions: GRPO and its relatives.

    Args:
        loss_type: grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo
        epsilon: clip of the ratio below 1 (and above, without epsilon_high); null: 0.2. cispo: a lower bound of 1 -
            epsilon, below epsilon_high; null: none
        epsilon_high: clip of the ratio above 1; null: epsilon. cispo: the upper bound itself; null: 0.2
        delta: bound of the ratio where the advantage is negative (dual clip), above 1 + epsilon_high; null: none
        sapo_temperature_pos: sapo: temperature where the advantage is positive; null: 1
        sapo_temperature_neg: sapo: temperature elsewhere; null: 1.05
        vespo_k_pos: vespo: k where the advantage is not negative; null: 2
        vespo_lambda_pos: vespo: lambda there; null: 3
        vespo_k_neg: vespo: k where the advantage is negative; null: 3
        vespo_lambda_neg: vespo: lambda there; null: 2
        importance_sampling_level: ratio of each token, or of its completion (sequence: GSPO, with loss_type grpo)
        sequence_ratio: level sequence: exponential of the mean log-ratio or of its sum; null: mean
        log_ratio_bound: clamp log-ratios to plus and minus this before exponentials; null: not
        off_policy_mask_threshold: drop completions of negative advantage whose policy has drifted further, in nats per
            token; null: none
        max_completion_length: dr_grpo: tokens that its sums are divided by; null: the limit of generation
        mask_truncated_completions: answers that were cut off have no part in the loss
        truncated_in_baseline: rewards of answers that were cut off count in the means and deviations of group, rloo,
            opo and reinforce_baseline
        top_entropy_quantile: share of the step's tokens, those of highest entropy, whose policy loss is kept; below 1 a
            forward pass of each step finds them
        entropy_coef: entropy bonus: this times the mean entropy of the step's tokens (of those that
            top_entropy_quantile keeps) is subtracted from the loss
        advantage: group, rloo, opo, reinforce, reinforce_baseline or gae
        scale_rewards: group: deviation that divides: of the group, of the batch, or none; null: group
        std_eps: added to deviations that divide; null: 1e-4
        unbiased_std: deviations by n - 1, or by n; null: true
        normalize_advantages: whiten advantages; null: true for reinforce, reinforce_baseline and gae
        reward_clip_range: smallest and largest reward, overlong penalty included; null: not clipped
        gamma: discount of token rewards; null: 1
        gae_lambda: gae: lambda; null: 1 (ppo: 0.95)
        beta: KL coefficient; 0: no reference
        kl_in: loss, token_reward (the report's) or sequence_reward; null: loss (rloo: sequence_reward, ppo:
            token_reward)
        kl_estimator: k1, k2 or k3; null: k3 in the loss, k1 in a reward
        use_bias_correction_kl: weigh the KL term of the loss by the ratio; null: true
        correct_kl: weigh the KL term of the loss by the engine's correction too; null: false
        overlong_buffer: tokens before the limit of generation over which answers are penalised; null: none
        overlong_factor: penalty at the limit; null: 1
        iterations: passes over one set of rollouts
        minibatches: parts of one set of rollouts, each the batch of one step
        ptx: {data, coefficient, kind, top_k, samples}: a term on supervised data in each step; null: none
    """

    # Where an option is null; a subclass may have others.
    usual_kl_place: ClassVar[Literal["loss", "token_reward", "sequence_reward"]] = "loss"
    usual_sequence_ratio: ClassVar[Literal["mean", "sum"]] = "mean"
    usual_gae_lambda: ClassVar[float] = 1.0

    loss_type: str = "dapo"
    epsilon: float | None = None
    epsilon_high: float | None = None
    delta: float | None = None
    sapo_temperature_pos: float | None = None
    sapo_temperature_neg: float | None = None
    vespo_k_pos: float | None = None
    vespo_lambda_pos: float | None = None
    vespo_k_neg: float | None = None
    vespo_lambda_neg: float | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"
    sequence_ratio: Literal["mean", "sum"] | None = None
    log_ratio_bound: float | None = None
    off_policy_mask_threshold: float | None = None
    max_completion_length: int | None = None
    mask_truncated_completions: bool = False
    truncated_in_baseline: bool = True
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    advantage: Literal["group", "rloo", "opo", "reinforce", "reinforce_baseline", "gae"] = "group"
    scale_rewards: Literal["group", "batch", "none"] | None = None
    std_eps: float | None = None
    unbiased_std: bool | None = None
    normalize_advantages: bool | None = None
    reward_clip_range: list[float] | None = None
    gamma: float | None = None
    gae_lambda: float | None = None
    beta: float = 0.0
    kl_in: Literal["loss", "token_reward", "sequence_reward"] | None = None
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    use_bias_correction_kl: bool | None = None
    correct_kl: bool | None = None
    overlong_buffer: int | None = None
    overlong_factor: float | None = None
    iterations: int = 1
    minibatches: int = 1
    ptx: PTXOptions | None = None

    def __post_init__(self) -> None:
        require_loss_types([self.loss_type], POLICY_LOSSES)
        self._check_ratio()
        self._check_rewards()
        self._check_advantage()
        self._check_kl()
        require_positive(iterations=self.iterations, minibatches=self.minibatches)

    @property
    def steps_of_rollouts(self) -> int:
        """Steps that train on one set of rollouts."""
        return self.iterations * self.minibatches

    @property
    def weighs_rollout_tokens(self) -> bool:
        """Whether all tokens of the rollouts weigh the same, in whichever of their steps."""
        return POLICY_LOSSES[self.loss_type].aggregation == "rollout_token_mean"

    def scored_groups(
        self,
        reward_C: Tensor,
        size_G: Tensor,
        *,
        length_C: Tensor,
        truncated_C: Tensor,
        limit: int,
        scored_C: Tensor | None = None,
    ) -> ScoredGroups:
        """Return the rewards in their groups, less the overlong penalty.

        Args:
            reward_C: of each completion, see :meth:`.ScoredGroups.of`.
            size_G: completions of each prompt.
            length_C: tokens of each completion.
            truncated_C: bool: it was cut off, see :func:`.rewards.truncated`.
            limit: the limit of generation, in tokens.
            scored_C: bool; None: all were scored.

        Raises:
            InputError: a reward is NaN or infinite, or overlong_buffer is above the limit.
        """
        if self.overlong_buffer is not None:
            factor = 1.0 if self.overlong_factor is None else self.overlong_factor
            reward_C = reward_C + overlong_penalty(
                length_C, limit=limit, buffer=self.overlong_buffer, factor=factor
            )
        counted_C = None if self.truncated_in_baseline else ~truncated_C
        return ScoredGroups.of(reward_C, size_G, scored_C=scored_C, counted_C=counted_C)

    def loss_mask(self, truncated_C: Tensor, length_C: Tensor, mask_N: Tensor | None = None) -> Tensor | None:
        """Return which tokens count, ``[N]`` bool: of ``mask_N``, without truncated answers if so chosen; None: all.

        For the loss, and as in TRL for the experience too: then a masked answer's KL penalty is 0, and its weight in
        opo's baseline.
        """
        if not self.mask_truncated_completions:
            return mask_N
        complete_N = per_token(~truncated_C, length_C)
        return complete_N if mask_N is None else complete_N & mask_N

    def entropy_kept(self, entropy_N: Tensor, entropy_S: Tensor) -> Tensor | None:
        """Return which of some tokens keep their policy loss, ``[N]`` bool, by the entropies of the step; None: all."""
        return None if self.top_entropy_quantile == 1 else entropy_N >= self.entropy_bound(entropy_S)

    def entropy_bound(self, entropy_S: Tensor) -> Tensor:
        """Return the lowest entropy of a token of the step that keeps its policy loss, a scalar."""
        return entropy_threshold(entropy_S, self.top_entropy_quantile)

    def policy_gradient(self) -> PolicyGradient:
        """Return the loss that these options describe."""
        own = {option: getattr(self, option) for option in _OPTIONS_OF[self.loss_type]}
        return PolicyGradient(
            loss_type=self.loss_type,
            options={option: value for option, value in own.items() if value is not None},
            importance_sampling_level=self.importance_sampling_level,
            sequence_ratio=self.sequence_ratio or self.usual_sequence_ratio,
            log_ratio_bound=self.log_ratio_bound,
            beta=self.beta if self.kl_place == "loss" else 0.0,
            kl_estimator=self.kl_estimator or "k3",
            use_bias_correction_kl=self.use_bias_correction_kl is not False,
            correct_kl=bool(self.correct_kl),
            off_policy_mask_threshold=self.off_policy_mask_threshold,
        )

    def advantage_estimator(self) -> AdvantageEstimator:
        """Return the estimator of advantages that these options describe."""
        clip = self.reward_clip_range
        return AdvantageEstimator(
            advantage=self.advantage,
            scale_rewards=self.scale_rewards or "group",
            std_eps=1e-4 if self.std_eps is None else self.std_eps,
            unbiased_std=self.unbiased_std is not False,
            normalize_advantages=self.whitens,
            beta=0.0 if self.kl_place == "loss" else self.beta,
            kl_in=self.kl_place,
            kl_estimator=self.kl_estimator or "k1",
            gamma=1.0 if self.gamma is None else self.gamma,
            gae_lambda=self.usual_gae_lambda if self.gae_lambda is None else self.gae_lambda,
            reward_clip_range=None if clip is None else (clip[0], clip[1]),
        )

    def token_weights(
        self,
        tokens: PolicyTokens,
        *,
        completion_weight: float | Tensor,
        token_weight: float | Tensor,
        limit: int,
    ) -> Tensor:
        """Return the weight of each token in the step's loss, ``[N]``, see :func:`.policy_gradient.token_weights`.

        ``limit``: of generation, in tokens: dr_grpo divides by it where ``max_completion_length`` is null.
        """
        return token_weights(
            POLICY_LOSSES[self.loss_type].aggregation,
            tokens,
            completion_weight=completion_weight,
            token_weight=token_weight,
            max_completion_length=self.max_completion_length or limit,
        )

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        return self.advantage in WHITENED if self.normalize_advantages is None else self.normalize_advantages

    @property
    def kl_place(self) -> Literal["loss", "token_reward", "sequence_reward"]:
        """The place of the KL penalty: the loss, or the reward of tokens or answers."""
        return self.kl_in or self.usual_kl_place

    def require_rollouts(self, rollout: RolloutConfig) -> None:
        """Check that the options fit those of the rollouts: each has an effect.

        Raises:
            InputError: naming the option.
        """
        if rollout.completions is not None and self.advantage in COMPARING:
            require(
                rollout.completions > 1,
                f"objective.advantage {self.advantage} compares the completions of a prompt: rollout.completions must "
                f"be at least 2, got {rollout.completions}",
            )
        require(
            rollout.dynamic_sampling is None or self.advantage in COMPARING,
            "rollout.dynamic_sampling replaces prompts whose completions all have the same reward, which teach nothing "
            f"where they are compared (advantage {', '.join(COMPARING)}); got advantage {self.advantage}",
        )
        given = rollout.engine == "data"
        for name, usual in (("mask_truncated_completions", False), ("truncated_in_baseline", True)):
            require(
                not given or getattr(self, name) is usual,
                f"objective.{name} does not apply to rollout.engine data, whose completions are all complete; got "
                f"{getattr(self, name)}",
            )
        require(
            not self.correct_kl or (rollout.correction is not None and not given),
            "objective.correct_kl needs rollout.correction and an engine that generates, got "
            + ("rollout.engine data" if given else "rollout.correction null"),
        )
        require(
            not given or rollout.correction in (None, CorrectionConfig()),
            f"rollout.correction does not apply to rollout.engine data, got {rollout.correction}",
        )

    def _check_ratio(self) -> None:
        options = {option: getattr(self, option) for option in _LOSS_OPTIONS}
        require_used(options, [self.loss_type], _OPTIONS_OF)
        rest = {"off_policy_mask_threshold", "log_ratio_bound", "max_completion_length"}
        given = options | {option: getattr(self, option) for option in rest}
        require_positive(**{option: value for option, value in given.items() if value is not None})
        epsilon = 0.2 if self.epsilon is None else self.epsilon
        require(epsilon < 1, f"objective.epsilon must be below 1, got {self.epsilon}")
        lowest = 1 + (epsilon if self.epsilon_high is None else self.epsilon_high)
        require(
            self.delta is None or self.delta > lowest,
            f"objective.delta must be above 1 + epsilon_high = {lowest:g}, where the clip is; got {self.delta}",
        )
        if self.loss_type == "cispo":
            cispo_bounds(self.epsilon, self.epsilon_high)
        self._require_for("sequence_ratio", self.importance_sampling_level == "sequence", "level sequence")
        clamps_itself = self.loss_type == "vespo"
        require(
            not (clamps_itself and self.importance_sampling_level == "sequence"),
            "objective.importance_sampling_level must be token with loss_type vespo, whose ratio is that of the answer "
            "already; got sequence",
        )
        self._require_for(
            "log_ratio_bound", not clamps_itself, "every loss_type but vespo, which has its own"
        )
        self._require_for("max_completion_length", self.loss_type == "dr_grpo", "loss_type dr_grpo")
        require(
            0 < self.top_entropy_quantile <= 1,
            f"objective.top_entropy_quantile must be in (0, 1], got {self.top_entropy_quantile}",
        )
        require(
            math.isfinite(self.entropy_coef),
            f"objective.entropy_coef must be a number (negative: a penalty), got {self.entropy_coef}",
        )

    def _check_rewards(self) -> None:
        clip = self.reward_clip_range
        require(
            clip is None or (len(clip) == 2 and clip[0] < clip[1]),
            f"objective.reward_clip_range must be two rewards, the smaller first; got {clip}",
        )
        self._require_for("overlong_factor", self.overlong_buffer is not None, "an overlong_buffer")
        given = {name: getattr(self, name) for name in ("overlong_buffer", "overlong_factor")}
        require_positive(**{name: value for name, value in given.items() if value is not None})

    def _check_advantage(self) -> None:
        require(
            self.truncated_in_baseline or self.advantage in COMPARING,
            f"objective.truncated_in_baseline false belongs to advantage {', '.join(COMPARING)}, which compare "
            f"completions; got advantage {self.advantage}",
        )
        self._require_for("scale_rewards", self.advantage == "group", "advantage group")
        divides = self.whitens or (self.advantage == "group" and self.scale_rewards != "none")
        for name in ("std_eps", "unbiased_std"):
            self._require_for(name, divides, "advantages that a deviation divides")
        discounts = self.advantage in ("reinforce", "gae") or self.kl_place == "token_reward"
        self._require_for("gamma", discounts, "advantage reinforce or gae, or kl_in token_reward")
        self._require_for("gae_lambda", self.advantage == "gae", "advantage gae")
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"objective.{name} must be in [0, 1], got {value}")
        require(
            self.std_eps is None or self.std_eps >= 0,
            f"objective.std_eps must not be negative, got {self.std_eps}",
        )

    def _check_kl(self) -> None:
        require(self.beta >= 0, f"objective.beta must not be negative, got {self.beta}")
        for name in ("kl_in", "kl_estimator", "use_bias_correction_kl", "correct_kl"):
            self._require_for(name, self.beta > 0, "a KL penalty, beta above 0")
        for name in ("use_bias_correction_kl", "correct_kl"):
            self._require_for(name, self.kl_place == "loss", "kl_in loss")
        require(
            not (
                self.beta > 0
                and self.kl_place == "loss"
                and self.kl_estimator == "k1"
                and self.use_bias_correction_kl is False
            ),
            "objective.kl_estimator k1 in the loss needs use_bias_correction_kl: without the ratio its gradient is 0 "
            "in expectation, so beta would have no effect; got false",
        )

    def _require_for(self, name: str, used: bool, user: str) -> None:
        """Check that an option that was given (is not null) has an effect."""
        value = getattr(self, name)
        require(value is None or used, f"objective.{name} belongs to {user}; got {value} without it")
