"""Policy gradients on sampled completions: GRPO, RLOO, PPO. The loss of a step, and the columns that it reads.

A set of rollouts is scored once (:meth:`PolicyGradientObjective.columns`): advantages and weights become columns of its
tokens, which then travel with the packs. So a step's loss is a plain sum over rows, on any layout.

Shapes: C completions of G prompts, one prompt's after the other; N tokens of them, one completion after the other. In
the loss, those of some complete samples of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_align.config.rollout import RolloutConfig
from megatron_align.data.store import TokenStore
from megatron_align.errors import require
from megatron_align.losses.advantage_estimator import COMPARING, Experience
from megatron_align.losses.engine_mismatch import engine_correction
from megatron_align.losses.kl import KL_ESTIMATORS
from megatron_align.losses.policy_gradient import PolicyTerms, PolicyTokens
from megatron_align.losses.segments import per_token, suffix_sums
from megatron_align.objectives.base import DataKind, Need, Objective, Sums
from megatron_align.objectives.metrics import Metric
from megatron_align.objectives.policy_gradient_options import PolicyGradientOptions
from megatron_align.objectives.ptx import PTX_LOSS
from megatron_align.objectives.scored_rollouts import (
    ENTROPY_THRESHOLD,
    KL,
    OF_ROLLOUTS,
    OF_STEPS,
    ScoredRollouts,
)
from megatron_align.records import LossRows


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(PolicyGradientOptions):
    """Group relative policy optimisation: completions are compared with those of the same prompt."""

    name: Literal["grpo"] = "grpo"


@dataclass(frozen=True, kw_only=True)
class RLOOOptions(PolicyGradientOptions):
    """REINFORCE leave-one-out: the mean reward of a prompt's other completions is the baseline; KL in the reward."""

    usual_kl_place: ClassVar[Literal["loss", "token_reward", "sequence_reward"]] = "sequence_reward"
    usual_sequence_ratio: ClassVar[Literal["mean", "sum"]] = "sum"

    name: Literal["rloo"] = "rloo"
    loss_type: str = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "sequence"
    advantage: Literal["group", "rloo", "opo", "reinforce", "reinforce_baseline", "gae"] = "rloo"
    beta: float = 0.05


class PolicyGradientObjective(Objective):
    """GRPO and its relatives on rollouts.

    Attributes:
        rollout: the run's section ``rollout``, of which correction and max_tokens are read.
        has_critic: the run trains a critic too, whose values the advantages read.
    """

    data: ClassVar[tuple[DataKind, ...]] = ("prompt", "ranked")
    metrics: ClassVar[tuple[Metric, ...]] = (*OF_ROLLOUTS, *OF_STEPS, ENTROPY_THRESHOLD, PTX_LOSS)
    options: PolicyGradientOptions
    normalization = "sample"
    row_statistics = True
    usual_reference = "live"
    has_critic: ClassVar[bool] = False

    def __init__(self, options: PolicyGradientOptions, store: TokenStore | None = None):
        super().__init__(options, store)
        require(
            options.advantage != "gae" or self.has_critic,
            f"objective.advantage gae needs a critic, which objective.name ppo trains; got gae with {options.name}",
        )
        self.rollout = RolloutConfig()
        self._loss, self._estimator = options.policy_gradient(), options.advantage_estimator()
        needs: dict[Need, bool] = {
            "reference_token_logprobs": options.beta > 0,
            "old_logprobs": self._needs_old(),
            "token_entropies": options.top_entropy_quantile < 1,
            "values": self.has_critic,
        }
        self.needs = frozenset(need for need, needed in needs.items() if needed)
        self.entropy_gradient = options.entropy_coef != 0
        steps = [metric.name for metric in OF_STEPS if metric is not KL or options.beta > 0]
        self.sum_names = (*(name for name in steps if name != "ess"), "correction", "squared_correction")

    def _needs_old(self) -> bool:
        """Return whether log-probs of the policy that sampled must be computed before the loss.

        Otherwise the loss takes them from its own forward pass: on the first and only pass over the rollouts they are
        the same numbers.
        """
        options = self.options
        return options.steps_of_rollouts > 1 or (options.beta > 0 and not self._penalty_in_loss)

    @property
    def _penalty_in_loss(self) -> bool:
        """Whether the KL penalty of a token can be taken from its advantage after rewards were compared."""
        options = self.options
        compares = options.advantage in COMPARING and not options.whitens
        gamma = options.gamma is None or options.gamma == 1
        return options.kl_place == "loss" or (options.kl_place == "token_reward" and compares and gamma)

    def columns(
        self,
        rollouts: ScoredRollouts,
        old_N: Tensor | None,
        reference_N: Tensor | None,
        value_N: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the columns of the rollouts' tokens that the loss reads besides given log-probs, ``[N]`` fp64.

        ``advantages``; ``loss_weights``, which hold the normaliser of the token's minibatch; ``shares``, which sum to 1
        over the minibatch's tokens that count, for metrics. With a critic also ``returns``, and ``value_weights``, of a
        token in the critic's loss: the mean over the tokens of its minibatch.

        Args:
            rollouts: of all ranks, in the order of the step.
            old_N: log-prob under the policy that sampled, where ``needs`` has old_logprobs.
            reference_N: log-prob under the reference, where ``needs`` has reference_token_logprobs.
            value_N: the critic's value of what comes before the token, where ``needs`` has values.

        Raises:
            InputError: a reward is NaN or infinite, or completions cannot be compared.
        """
        options, length_C = self.options, rollouts.length_C
        groups = options.scored_groups(
            rollouts.reward_C,
            rollouts.size_G,
            length_C=length_C,
            truncated_C=rollouts.truncated_C,
            limit=self.rollout.max_tokens,
            scored_C=rollouts.scored_C,
        )
        mask_N = options.loss_mask(rollouts.truncated_C, length_C)
        experience = Experience(
            groups=groups,
            length_C=length_C,
            mask_N=mask_N,
            old_N=old_N,
            reference_N=reference_N,
            value_N=value_N,
        )
        in_loss = self._penalty_in_loss and old_N is None
        estimator = replace(self._estimator, beta=0.0) if in_loss else self._estimator
        advantage_N, return_N = estimator(experience)
        weight_N, share_N, value_weight_N = self._weights(rollouts, mask_N)
        columns = {"advantages": advantage_N, "loss_weights": weight_N, "shares": share_N}
        return (
            columns if return_N is None else {**columns, "returns": return_N, "value_weights": value_weight_N}
        )

    def _weights(self, rollouts: ScoredRollouts, mask_N: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return each token's weight in its minibatch's loss, share of the tokens that count, and weight in their mean.

        Unlike the shares, the last hold the weights of the prompts.
        """
        length_C = rollouts.length_C
        weight_C = per_token(rollouts.weight_G, rollouts.size_G)
        minibatch_C = per_token(rollouts.minibatch_G, rollouts.size_G)
        tokens = PolicyTokens(
            policy_N=torch.zeros(int(length_C.sum()), dtype=torch.float64),
            advantage_N=torch.zeros(0),
            length_C=length_C,
            mask_N=mask_N,
        )
        counted_C = tokens.counted_C()

        def of_minibatch(values_C: Tensor) -> Tensor:
            """Return the sum of each completion's minibatch, ``[C]``."""
            count = int(minibatch_C.max()) + 1
            sums = torch.zeros(count, dtype=torch.float64).index_add(0, minibatch_C, values_C.double())
            return sums[minibatch_C]

        tokens_C = of_minibatch(weight_C * counted_C).clamp(min=1e-300)
        per_rollout = weight_C * counted_C
        mean_C = token_weight_C = weight_C / tokens_C
        if self.options.weighs_rollout_tokens:
            # Every token of the rollouts weighs the same in each of the steps that train on them.
            minibatches = float(len(minibatch_C.unique()))
            token_weight_C = weight_C * minibatches / per_rollout.sum().clamp(min=1e-300)
        weight_N = self.options.token_weights(
            tokens,
            completion_weight=weight_C / of_minibatch(weight_C),
            token_weight=token_weight_C,
            limit=self.rollout.max_tokens,
        )
        counts_C = of_minibatch(counted_C).clamp(min=1)
        share_N = tokens.masked(per_token(1 / counts_C, length_C))
        return tokens.masked(weight_N), share_N, tokens.masked(per_token(mean_C, length_C))

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`."""
        columns = rows.columns
        engine_N = columns.get("engine_logprobs")
        old_N = columns.get("old_logprobs")
        length_C, share_N = rows.completions.rows_C, columns["shares"]
        difference_N = None
        if engine_N is not None:
            difference_N = (logprobs_N.detach() if old_N is None else old_N) - engine_N
        tokens = PolicyTokens(
            policy_N=logprobs_N,
            advantage_N=self._advantages(logprobs_N, rows),
            length_C=length_C,
            old_N=old_N,
            mask_N=share_N > 0,
            reference_N=columns["reference_logprobs"] if self.compares else None,
            correction_N=self._correction(difference_N, length_C, share_N > 0),
            sampler_N=engine_N,
        )
        entropy_share_N = columns["entropy_shares"] if "token_entropies" in self.needs else None
        terms = self._loss(
            replace(tokens, reference_N=None) if self._kl_elsewhere else tokens,
            None if entropy_share_N is None else entropy_share_N > 0,
        )
        loss = (columns["loss_weights"] * terms.loss_N).sum()
        if self.entropy_gradient:
            bonus_share_N = share_N if entropy_share_N is None else entropy_share_N
            loss = loss - self.options.entropy_coef * (bonus_share_N * row_statistics["entropy"]).sum()
        with torch.no_grad():
            sums = self._sums(tokens, terms, share_N, row_statistics["entropy"], difference_N)
        return loss, sums

    def entropy_bound(self, entropy_S: Tensor) -> float:
        """See :class:`Objective`."""
        return float(self.options.entropy_bound(entropy_S)) if len(entropy_S) else 0.0

    @property
    def _kl_elsewhere(self) -> bool:
        return self.options.kl_place != "loss"

    def _advantages(self, logprobs_N: Tensor, rows: LossRows) -> Tensor:
        """Return the advantages, less the KL penalty of the tokens from there on where it was not known before."""
        columns, options = rows.columns, self.options
        advantage_N = columns["advantages"].to(logprobs_N.dtype)
        if not (self.compares and options.kl_place == "token_reward") or "old_logprobs" in columns:
            return advantage_N
        log_N = logprobs_N.detach().double() - columns["reference_logprobs"].double()
        kl_N = KL_ESTIMATORS[self._estimator.kl_estimator](log_N).masked_fill(columns["shares"] == 0, 0.0)
        penalty_N = options.beta * suffix_sums(kl_N, rows.completions.rows_C)
        scored_N = per_token(rows.completions.columns["scored"], rows.completions.rows_C) > 0
        return advantage_N - penalty_N.to(logprobs_N.dtype).masked_fill(~scored_N, 0.0)

    def _correction(self, difference_N: Tensor | None, length_C: Tensor, mask_N: Tensor) -> Tensor | None:
        correction = self.rollout.correction
        if difference_N is None or correction is None:
            return None
        return engine_correction(
            difference_N,
            length_C,
            mode=correction.mode,
            cap=correction.cap,
            floor=correction.floor,
            mask_N=mask_N,
        )

    def _sums(
        self,
        tokens: PolicyTokens,
        terms: PolicyTerms,
        share_N: Tensor,
        entropy_N: Tensor,
        difference_N: Tensor | None,
    ) -> Sums:
        """Return this part's share of the step's metrics."""
        sums = {
            "entropy": (share_N * entropy_N).sum(),
            "clip_fraction": (share_N * terms.clipped_N).sum(),
            "ratio_max": _maximum(terms.ratio_N.masked_fill(share_N == 0, 0.0)),
        }
        if tokens.reference_N is not None:
            log_N = tokens.masked(tokens.policy_N.detach() - tokens.reference_N)
            estimator = self._loss.kl_estimator if not self._kl_elsewhere else self._estimator.kl_estimator
            kl_N = KL_ESTIMATORS[estimator](log_N)
            if not self._kl_elsewhere and self._loss.use_bias_correction_kl:
                kl_N = kl_N * tokens.masked(terms.ratio_N)  # as in the loss, and so in TRL
            sums["kl"] = (share_N * kl_N).sum()
        known_N = None if difference_N is None else tokens.masked(difference_N.nan_to_num(nan=0.0))
        zero = share_N.sum() * 0.0
        weight_N = torch.ones_like(share_N) if tokens.correction_N is None else tokens.correction_N
        sums |= {
            "mismatch_mean": zero if known_N is None else (share_N * known_N.abs()).sum(),
            "mismatch_max": zero if known_N is None else _maximum(known_N.abs()),
            "mismatch_k3": zero if known_N is None else (share_N * (known_N.exp() - known_N - 1)).sum(),
            "correction": (share_N * weight_N).sum(),
            "squared_correction": (share_N * weight_N.square()).sum(),
        }
        return sums

    def finish(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """See :class:`Objective`."""
        found = dict(totals)
        total, squares = found.pop("correction"), found.pop("squared_correction")
        found["ess"] = total**2 / squares if squares else 0.0
        return found


class GRPO(PolicyGradientObjective):
    """Group relative policy optimisation."""

    Options = GRPOOptions


class RLOO(PolicyGradientObjective):
    """REINFORCE leave-one-out."""

    Options = RLOOOptions


def _maximum(values_N: Tensor) -> Tensor:
    """Return the largest value, 0 of none; without reading it from a device."""
    return torch.cat([values_N, values_N.new_zeros(1)]).max()
