"""Shared parts of the objectives on pairs: completions to pairs, the likelihood term, losses that mix a step's pairs.

Shapes: N scored rows and C completions of some complete samples of a pack; P pairs of them (C = 2 P: chosen, rejected,
chosen, ...; of triples C = 3 P: chosen, rejected, gold, ...). ``_S``: the completions of a step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_align.data.store import TokenStore
from megatron_align.losses.responses import Responses
from megatron_align.objectives.base import (
    DataKind,
    Objective,
    StepStatistics,
    StepSums,
    Sums,
    completion_sums,
)
from megatron_align.objectives.metrics import (
    ACCURACY,
    CHOSEN_LOGPS,
    CHOSEN_REWARD,
    REJECTED_LOGPS,
    REJECTED_REWARD,
    REWARD_MARGIN,
    Metric,
)
from megatron_align.records import LossRows

PairLosses = Callable[[Responses, Responses], Tensor]


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Some complete pairs, as the loss is given them."""

    chosen: Responses  # [P] each
    rejected: Responses
    rows: LossRows
    logprobs_N: Tensor
    row_statistics: Mapping[str, Tensor]  # [N] each, where Objective.row_statistics
    weight_P: Tensor  # of each pair; holds the global normaliser


@dataclass(frozen=True, slots=True)
class NLLTerm:
    """Minus the mean log-prob per token of one completion of each sample, over the step: the likelihood term.

    Args:
        weight: factor on it in the loss.
        completion: index of the completion in its sample: 0 chosen, of triples 2 gold.
        with_prompt: the prompt's tokens count too (``Objective.score_prompt``).
    """

    weight: float
    completion: Literal[0, 2] = 0
    with_prompt: bool = False

    def __call__(self, logprobs_N: Tensor, rows: LossRows, width: int) -> Tensor:
        """Return these samples' share of the term, a scalar in nats per token; ``width``: completions of a sample."""
        nll_C = -completion_sums(logprobs_N, rows, with_prompt=self.with_prompt)
        return (nll_C * rows.completions.token_weight_C)[self.completion :: width].sum()


@dataclass(frozen=True, slots=True)
class BatchCoupledLoss:
    """A loss that mixes all pairs of a step: differentiated once over the step, then a sum over packs.

    Args:
        losses: ``(chosen, rejected) -> [P]``, of all pairs of the step in one call.
    """

    losses: PairLosses

    def observe(self, sums: StepSums) -> StepStatistics:
        """Return the step's loss and its gradient."""
        policy_S = sums.policy_S.clone().requires_grad_()
        chosen, rejected = (
            Responses(policy_S[k::2], sums.length_S[k::2], sums.reference_S[k::2]) for k in (0, 1)
        )
        with torch.enable_grad():
            loss = self.losses(chosen, rejected).mean()
        coefficient_S = torch.autograd.grad(loss, policy_S)[0]
        return StepStatistics({"step_loss": loss.item()}, {"loss_coefficients": coefficient_S})

    def share(self, pairs: ScoredPairs) -> Tensor:
        """Return these pairs' share of the step's loss: the value that was observed, the gradient by coefficients."""
        policy_P2 = torch.stack([pairs.chosen.policy_N, pairs.rejected.policy_N], 1)
        linear = (policy_P2.flatten() * pairs.rows.completions.columns["loss_coefficients"]).sum()
        share = pairs.rows.step_statistics["step_loss"] * pairs.weight_P.sum()
        return linear - linear.detach() + share


class PairObjective(Objective):
    """An objective on pairs: subclasses give :meth:`pair_losses`, and options with ``beta`` for the rewards.

    Attributes:
        nll: the likelihood term; None: the loss has none.
        width: completions of a sample: 2, of triples 3.
    """

    data: ClassVar[tuple[DataKind, ...]] = ("pair",)
    metrics: ClassVar[tuple[Metric, ...]] = (
        REWARD_MARGIN,
        ACCURACY,
        CHOSEN_REWARD,
        REJECTED_REWARD,
        CHOSEN_LOGPS,
        REJECTED_LOGPS,
    )
    normalization = "pair"
    width: Literal[2, 3] = 2

    def __init__(self, options: Any, store: TokenStore | None = None, nll: NLLTerm | None = None):
        super().__init__(options, store)
        self.beta: float = options.beta
        self.nll = nll if nll and nll.weight else None
        self.score_prompt = self.nll is not None and self.nll.with_prompt
        pairs = tuple(metric.name for metric in PairObjective.metrics)
        self.sum_names = (*pairs, *(("nll",) if self.nll else ()))

    def pair_losses(self, pairs: ScoredPairs) -> Tensor:
        """Return the loss of each pair, ``[P]`` fp32, not reduced and not weighted."""
        raise NotImplementedError

    def reward(self, side: Responses) -> Tensor:
        """Return the implicit reward of each response over beta, ``[P]``: what the metrics report times beta."""
        return side.log_ratio_N if self.compares else side.policy_N

    def share(self, pairs: ScoredPairs) -> Tensor:
        """Return these pairs' share of the step's loss without its likelihood term."""
        return (pairs.weight_P * self.pair_losses(pairs)).sum()

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`."""
        pairs = self._pairs(logprobs_N, rows, row_statistics)
        loss, sums = self.share(pairs), self._metric_sums(pairs)
        if self.nll:
            nll = self.nll(logprobs_N, rows, self.width)
            loss, sums["nll"] = loss + self.nll.weight * nll, nll.detach()
        return loss, sums

    def _pairs(self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]) -> ScoredPairs:
        policy_C = completion_sums(self.weighted(logprobs_N, rows), rows)
        completions = rows.completions
        length_C = completions.length_C.to(policy_C.dtype)
        reference_C = completions.columns["reference_logprobs"] if self.compares else None
        chosen, rejected = (
            Responses(policy_C[side], length_C[side], None if reference_C is None else reference_C[side])
            for side in (slice(k, None, self.width) for k in (0, 1))
        )
        weight_P = completions.weight_C[:: self.width]
        return ScoredPairs(chosen, rejected, rows, logprobs_N, row_statistics, weight_P)

    @torch.no_grad()
    def _metric_sums(self, pairs: ScoredPairs) -> Sums:
        chosen_P, rejected_P = (self.beta * self.reward(side) for side in (pairs.chosen, pairs.rejected))
        values = {
            "reward_margin": chosen_P - rejected_P,
            "accuracy": (chosen_P > rejected_P).to(pairs.weight_P.dtype),
            "chosen_reward": chosen_P,
            "rejected_reward": rejected_P,
            "chosen_logps": pairs.chosen.policy_N,
            "rejected_logps": pairs.rejected.policy_N,
        }
        return {name: (pairs.weight_P * value_P).sum() for name, value_P in values.items()}
