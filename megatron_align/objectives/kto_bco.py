"""KTO, APO-zero unpaired and BCO: single completions, desirable or not, against a reference.

Shapes: N scored rows and C completions of some complete samples of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_align.data.store import TokenStore
from megatron_align.losses.kto_bco import UNPAIRED_LOSSES, RunningMean, bco, kto_baseline
from megatron_align.losses.responses import Responses
from megatron_align.objectives.base import (
    Need,
    Objective,
    StepStatistics,
    StepSums,
    Sums,
    completion_sums,
)
from megatron_align.objectives.metrics import (
    CHOSEN_LOGPS,
    CHOSEN_REWARD,
    REJECTED_LOGPS,
    REJECTED_REWARD,
    REWARD_MARGIN,
    Metric,
)
from megatron_align.objectives.options import ObjectiveOptions, require_positive
from megatron_align.records import LossRows

DESIRABLE = Metric(name="desirable", unit="share", meaning="examples of the step labelled desirable")
BASELINE = Metric(
    name="baseline",
    unit="nats",
    meaning="KTO's z: mean log-ratio of mismatched prompts and responses, at least 0",
    trl="kl",
)
DELTA = Metric(name="delta", unit="reward", meaning="BCO's reward shift: running mean of all rewards so far")
_MEANS = ("chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps")


class UnpairedObjective(Objective):
    """An objective on single completions: subclasses give :meth:`losses`, and options with ``beta``."""

    data = ("unpaired",)
    metrics: ClassVar[tuple[Metric, ...]] = (
        REWARD_MARGIN,
        CHOSEN_REWARD,
        REJECTED_REWARD,
        CHOSEN_LOGPS,
        REJECTED_LOGPS,
        DESIRABLE,
    )
    needs = frozenset({"reference_logprobs"})
    normalization = "example"

    def __init__(self, options: Any, store: TokenStore | None = None):
        super().__init__(options, store)
        self.beta: float = options.beta
        self.sum_names = ("desirable", *_MEANS)

    def losses(self, responses: Responses, rows: LossRows) -> Tensor:
        """Return the loss of each completion, ``[C]`` fp32, not reduced and not weighted."""
        raise NotImplementedError

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`."""
        completions = rows.completions
        policy_C, length_C = completion_sums(logprobs_N, rows), completions.length_C.to(logprobs_N.dtype)
        responses = Responses(policy_C, length_C, completions.columns["reference_logprobs"])
        loss = (completions.weight_C * self.losses(responses, rows)).sum()
        with torch.no_grad():
            desirable_C = completions.weight_C * completions.desirable_C
            other_C = completions.weight_C - desirable_C
            reward_C = self.beta * responses.log_ratio_N
            sums = {
                "desirable": desirable_C.sum(),
                "chosen_reward": (desirable_C * reward_C).sum(),
                "rejected_reward": (other_C * reward_C).sum(),
                "chosen_logps": (desirable_C * responses.policy_N).sum(),
                "rejected_logps": (other_C * responses.policy_N).sum(),
            }
        return loss, sums

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Turn the sums over desirable and other examples into their means; a step may lack one of the two."""
        share = {"chosen": totals["desirable"], "rejected": 1.0 - totals["desirable"]}
        metrics = dict(totals)
        for name in _MEANS:
            part = share[name.partition("_")[0]]
            metrics[name] = totals[name] / part if part > 1e-9 else 0.0
        metrics["reward_margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
        return metrics


@dataclass(frozen=True, kw_only=True)
class KTOOptions(ObjectiveOptions):
    """KTO: single responses marked desirable or not, against a reference.

    Args:
        name: kto
        loss_type: kto: with a baseline over the step's global batch; apo_zero_unpaired: without
        beta: KL coefficient (inverse temperature of the implicit reward)
        desirable_weight: factor on the losses of desirable responses
        undesirable_weight: factor on the losses of the others
    """

    name: Literal["kto"] = "kto"
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive(
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


class KTO(UnpairedObjective):
    """KTO with its baseline over the step's global batch, or APO-zero unpaired."""

    Options = KTOOptions
    metrics = (*UnpairedObjective.metrics, BASELINE)
    options: KTOOptions

    def __init__(self, options: KTOOptions, store: TokenStore | None = None):
        super().__init__(options, store)
        if options.loss_type == "kto":
            self.needs = frozenset({"reference_logprobs", "mismatched_logprobs"})

    def losses(self, responses: Responses, rows: LossRows) -> Tensor:
        """See :class:`UnpairedObjective`."""
        return UNPAIRED_LOSSES[self.options.loss_type](
            responses,
            rows.completions.desirable_C,
            beta=self.beta,
            desirable_weight=self.options.desirable_weight,
            undesirable_weight=self.options.undesirable_weight,
            **rows.step_statistics,
        )

    def observe_batch(self, seen: Mapping[Need, StepSums], *, training: bool) -> StepStatistics:
        """Return the baseline, from every prompt with another prompt's completion."""
        sums = seen["mismatched_logprobs"]
        baseline = kto_baseline(Responses(sums.policy_S, sums.length_S, sums.reference_S))
        return StepStatistics({"baseline": baseline.item()})


@dataclass(frozen=True, kw_only=True)
class BCOOptions(ObjectiveOptions):
    """Binary classifier optimisation: single responses, against a reference; rewards are centred by a running mean.

    Args:
        name: bco
        beta: KL coefficient (inverse temperature of the implicit reward)
    """

    name: Literal["bco"] = "bco"
    beta: float = 0.1

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)


class BCO(UnpairedObjective):
    """BCO with the running mean of all rewards so far, including this step's."""

    Options = BCOOptions
    metrics = (*UnpairedObjective.metrics, DELTA)
    needs = frozenset({"reference_logprobs", "batch_statistics"})
    options: BCOOptions

    def __init__(self, options: BCOOptions, store: TokenStore | None = None):
        super().__init__(options, store)
        self.running = RunningMean()

    def losses(self, responses: Responses, rows: LossRows) -> Tensor:
        """See :class:`UnpairedObjective`."""
        return bco(responses, rows.completions.desirable_C, beta=self.beta, **rows.step_statistics)

    def observe_batch(self, seen: Mapping[Need, StepSums], *, training: bool) -> StepStatistics:
        """Return the running mean with this step's rewards; validation leaves it as it is."""
        if training:
            sums = seen["batch_statistics"]
            self.running = self.running.update(self.beta * (sums.policy_S - sums.reference_S))
        return StepStatistics({"delta": self.running.mean})

    def state(self) -> dict[str, Any]:
        """Return the running mean."""
        return {"mean": self.running.mean, "count": self.running.count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the running mean."""
        self.running = RunningMean(**state)
