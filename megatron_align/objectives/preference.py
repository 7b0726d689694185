"""Objectives on judged completions: from the log-probs of whole pairs or examples to their share of the loss.

Shapes: N scored rows and C completions of some whole samples of a pack; P pairs of them (C = 2 P: chosen, rejected,
chosen, ...; of triples C = 3 P: chosen, rejected, gold, ...). ``_S``: the completions of a whole step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_align.config.objectives import (
    COUPLED,
    DPO_OPTIONS,
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    SimPOConfig,
    TPOConfig,
)
from megatron_align.losses.divergences import DIVERGENCES
from megatron_align.losses.dpo import dpo_losses
from megatron_align.losses.reference_free import CPO_LOSSES, TPO_LOSSES, orpo
from megatron_align.losses.responses import Responses, wpo_weights
from megatron_align.losses.unpaired import UNPAIRED_LOSSES, RunningMean, kto_baseline
from megatron_align.objectives.base import Objective, StepSums, Sums
from megatron_align.records import LossRows


def completion_sums(values_N: Tensor, rows: LossRows, *, rows_of_prompt: bool = False) -> Tensor:
    """Sum ``[N]`` over each completion, ``[C]``; rows of a prompt that is scored too count only if asked for.

    Adds row after row, so the result does not depend on what else is in the pack.
    """
    if not rows_of_prompt:
        values_N = values_N.masked_fill(rows.prompt_N, 0.0)
    return torch.segment_reduce(values_N, "sum", lengths=rows.completions.rows_C, unsafe=True, initial=0)


def shared_length_factors(rows: LossRows, ld_alpha: float) -> Tensor:
    """Return LD-DPO's factor of each row, ``[N]``: 1 up to the shorter completion's length of its pair, then alpha.

    Liu et al. 2024, arXiv:2409.06411.
    """
    length_C = rows.completions.length_C
    shared_C = length_C.view(-1, 2).amin(1).repeat_interleave(2)
    starts_C = length_C.cumsum(0) - length_C
    place_N = torch.arange(rows.row_N.shape[0], device=length_C.device) - starts_C[rows.sequence_N]
    return torch.where(place_N < shared_C[rows.sequence_N], 1.0, ld_alpha)


_PAIR_METRICS = (
    "reward_margin",
    "accuracy",
    "chosen_reward",
    "rejected_reward",
    "chosen_logps",
    "rejected_logps",
)


@dataclass(kw_only=True, eq=False)
class Pairs(Objective):
    """DPO and its relatives, CPO, SimPO, TPO, ORPO: losses of pairs, beside the likelihood of one completion.

    Args:
        losses: of the pairs, per pair.
        beta: factor from log-ratios (or log-probs) to the rewards among the metrics.
        compares: with a reference.
        likelihood: weight of minus the mean log-prob per token of the step's chosen (of triples: gold) completions.
        per_token: without a reference, rewards are of log-probs per token.
        margin_scale: factor on the data's margins, which the losses then read; None: they read none.
        ld_alpha: see :func:`shared_length_factors`; None: every row counts once.
        statistics: pairs weigh as WPO has it.
        score_prompt: the likelihood is of the prompt too.
        looks_ahead: own: the losses mix the pairs of a step.
        width: completions of a sample: 2, of triples 3.
    """

    losses: Callable[..., Tensor]
    beta: float
    compares: bool
    likelihood: float = 0.0
    per_token: bool = False
    margin_scale: float | None = None
    ld_alpha: float | None = None
    statistics: bool = False
    score_prompt: bool = False
    looks_ahead: Literal["own"] | None = None
    width: Literal[2, 3] = 2
    normalization: ClassVar[str] = "pair"

    def __post_init__(self) -> None:
        self._step_loss = 0.0
        self.metrics = (*_PAIR_METRICS, *(("nll",) if self.likelihood else ()))

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`."""
        known = rows.completions
        chosen, rejected = self._responses(completion_sums(self.weighted(logprobs_N, rows), rows), rows)
        weight_P = known.weight_C[:: self.width]
        if self.looks_ahead:
            loss = self._linear(torch.stack([chosen.policy_N, rejected.policy_N], 1), rows)
        else:
            loss_P = self.losses(chosen, rejected, **self._facts(rows))
            if self.statistics:
                loss_P = loss_P * self._wpo_weights(logprobs_N, rows, statistics)
            loss = (weight_P * loss_P).sum()
        sums = self._metrics(chosen, rejected, weight_P)
        if self.likelihood:
            nll_C = -completion_sums(logprobs_N, rows, rows_of_prompt=self.score_prompt)
            liked = 0 if self.width == 2 else 2
            nll = (nll_C * known.token_weight_C)[liked :: self.width].sum()
            loss, sums["nll"] = loss + self.likelihood * nll, nll.detach()
        return loss, sums

    def weighted(self, logprobs_N: Tensor, rows: LossRows) -> Tensor:
        """Return the log-probs as they enter the sums of policy and reference alike."""
        return (
            logprobs_N if self.ld_alpha is None else logprobs_N * shared_length_factors(rows, self.ld_alpha)
        )

    def look(self, sums: StepSums, *, training: bool) -> Tensor:
        """Take the gradient of a loss that sorts over the whole step."""
        policy_S = sums.policy_S.clone().requires_grad_()
        chosen, rejected = (
            Responses(policy_S[k::2], sums.length_S[k::2], sums.reference_S[k::2]) for k in (0, 1)
        )
        with torch.enable_grad():
            loss = self.losses(chosen, rejected).mean()
        self._step_loss = loss.item()
        return torch.autograd.grad(loss, policy_S)[0]

    def _linear(self, policy_P2: Tensor, rows: LossRows) -> Tensor:
        """Return this share of the step's loss: its value as it was seen ahead, its gradient by the coefficients."""
        moving = (policy_P2.flatten() * rows.completions.columns["loss_coefficients"]).sum()
        share = self._step_loss * rows.completions.weight_C[::2].sum()
        return moving - moving.detach() + share

    def _responses(self, policy_C: Tensor, rows: LossRows) -> tuple[Responses, Responses]:
        known = rows.completions
        length_C = known.length_C.to(policy_C.dtype)
        reference_C = known.columns["reference_logprobs"] if self.compares else None
        sides = (slice(k, None, self.width) for k in (0, 1))
        chosen, rejected = (
            Responses(policy_C[side], length_C[side], None if reference_C is None else reference_C[side])
            for side in sides
        )
        return chosen, rejected

    def _facts(self, rows: LossRows) -> dict[str, Tensor]:
        if self.margin_scale is None:
            return {}
        known = rows.completions
        scored_P = known.score_C[::2] - known.score_C[1::2]
        given_P = known.margin_C[::2]
        return {"margin_N": self.margin_scale * torch.where(given_P.isnan(), scored_P, given_P)}

    def _wpo_weights(self, logprobs_N: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]) -> Tensor:
        policy_C, square_C = (
            completion_sums(values_N, rows)
            for values_N in (logprobs_N.detach(), statistics["log_sum_square"])
        )
        length_C = rows.completions.length_C
        return wpo_weights(policy_C, square_C, length_C).view(-1, 2).prod(1)

    def _metrics(self, chosen: Responses, rejected: Responses, weight_P: Tensor) -> Sums:
        with torch.no_grad():
            rewards = [self.beta * self._raw_reward(side) for side in (chosen, rejected)]
            values = {
                "reward_margin": rewards[0] - rewards[1],
                "accuracy": (rewards[0] > rewards[1]).to(weight_P.dtype),
                "chosen_reward": rewards[0],
                "rejected_reward": rewards[1],
                "chosen_logps": chosen.policy_N,
                "rejected_logps": rejected.policy_N,
            }
            return {name: (weight_P * value_P).sum() for name, value_P in values.items()}

    def _raw_reward(self, side: Responses) -> Tensor:
        if self.compares:
            return side.log_ratio_N
        return side.mean_logprob_N if self.per_token else side.policy_N


def build_dpo(config: DPOConfig) -> Pairs:
    """Return the objective of ``objective.name: dpo``."""
    weights = config.loss_weights or [1.0] * len(config.loss_types)
    of_pairs = [
        (name, weight) for name, weight in zip(config.loss_types, weights, strict=True) if name != "sft"
    ]
    likelihood = sum(weights) - sum(weight for _, weight in of_pairs) + (config.rpo_alpha or 0.0)
    options: dict[str, Any] = {
        name: value
        for name in ("label_smoothing", "discopop_tau")
        if (value := getattr(config, name)) is not None
    }
    if config.f_divergence_type is not None:
        divergence = DIVERGENCES[config.f_divergence_type]
        if config.f_alpha_divergence_coef is not None:
            divergence = partial(divergence, alpha=config.f_alpha_divergence_coef)
        options["divergence"] = divergence
    losses = _only_likelihood
    if of_pairs:
        losses = dpo_losses(*zip(*of_pairs, strict=True), options={"beta": config.beta, **options})
    scaled = any("margin_scale" in DPO_OPTIONS[name] for name in config.loss_types)
    return Pairs(
        losses=losses,
        beta=config.beta,
        compares=True,
        likelihood=likelihood,
        margin_scale=(1.0 if config.margin_scale is None else config.margin_scale) if scaled else None,
        ld_alpha=config.ld_alpha,
        statistics=config.use_weighting,
        looks_ahead="own" if any(name in COUPLED for name in config.loss_types) else None,
    )


def _only_likelihood(chosen: Responses, rejected: Responses) -> Tensor:
    return torch.zeros_like(chosen.policy_N)


def build_cpo(config: CPOConfig) -> Pairs:
    """Return the objective of ``objective.name: cpo``."""
    names = ("label_smoothing", "simpo_gamma", "alpha")
    options = {name: value for name in names if (value := getattr(config, name)) is not None}
    loss = partial(CPO_LOSSES[config.loss_type], beta=config.beta, **options)
    standing = 0.0 if config.loss_type == "alphapo" else 1.0
    likelihood = standing if config.cpo_alpha is None else config.cpo_alpha
    return Pairs(
        losses=loss,
        beta=config.beta,
        compares=False,
        likelihood=likelihood,
        per_token=config.loss_type in ("ipo", "simpo", "alphapo"),
    )


def build_simpo(config: SimPOConfig) -> Pairs:
    """Return the objective of ``objective.name: simpo``."""
    options = {"simpo_gamma": config.simpo_gamma, "label_smoothing": config.label_smoothing}
    loss = partial(CPO_LOSSES["simpo"], beta=config.beta, **options)
    return Pairs(losses=loss, beta=config.beta, compares=False, per_token=True)


def build_tpo(config: TPOConfig) -> Pairs:
    """Return the objective of ``objective.name: tpo``."""
    names = ("label_smoothing", "tpo_l_gamma")
    options = {name: value for name in names if (value := getattr(config, name)) is not None}
    return Pairs(
        losses=partial(TPO_LOSSES[config.loss_type], beta=config.beta, **options),
        beta=config.beta,
        compares=False,
        likelihood=config.tpo_alpha,
        per_token=config.loss_type in ("ipo", "tpo-l"),
        width=3,
    )


def build_orpo(config: ORPOConfig) -> Pairs:
    """Return the objective of ``objective.name: orpo``."""
    return Pairs(
        losses=partial(orpo, beta=config.beta),
        beta=config.beta,
        compares=False,
        likelihood=1.0,
        per_token=True,
        score_prompt=config.nll_over == "prompt_and_chosen",
    )


class Unpaired(Objective):
    """KTO, APO-zero unpaired, BCO: single completions, desirable or not, against a reference."""

    normalization = "example"

    def __init__(self, loss: Callable[..., Tensor], beta: float):
        self.losses, self.beta = loss, beta
        self.facts: dict[str, float] = {}
        self.metrics: tuple[str, ...] = (
            "desirable",
            "chosen_reward",
            "rejected_reward",
            "chosen_logps",
            "rejected_logps",
        )

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`."""
        known = rows.completions
        responses = Responses(
            completion_sums(logprobs_N, rows),
            known.length_C.to(logprobs_N.dtype),
            known.columns["reference_logprobs"],
        )
        loss = (known.weight_C * self.losses(responses, known.desirable_C, **self.facts)).sum()
        with torch.no_grad():
            desirable_C = known.weight_C * known.desirable_C
            other_C = known.weight_C - desirable_C
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
        done = {"loss": totals["loss"], "desirable": totals["desirable"]}
        for name in self.metrics[1:]:
            part = share[name.partition("_")[0]]
            done[name] = totals[name] / part if part > 1e-9 else 0.0
        done["reward_margin"] = done["chosen_reward"] - done["rejected_reward"]
        return {**{k: v for k, v in totals.items() if k not in done}, **done, **self.facts}


class KTO(Unpaired):
    """KTO with its baseline over the step's global batch."""

    looks_ahead = "mismatched"

    def look(self, sums: StepSums, *, training: bool) -> None:
        """Take the baseline from every prompt with another prompt's completion."""
        mismatched = Responses(sums.policy_S, sums.length_S, sums.reference_S)
        self.facts = {"baseline": kto_baseline(mismatched).item()}


class BCO(Unpaired):
    """BCO with the running mean of all rewards so far, this step's among them."""

    looks_ahead = "own"

    def __init__(self, loss: Callable[..., Tensor], beta: float):
        super().__init__(loss, beta)
        self.running = RunningMean()

    def look(self, sums: StepSums, *, training: bool) -> None:
        """Take this step's rewards into the running mean; validation leaves it as it is."""
        if training:
            self.running = self.running.update(self.beta * (sums.policy_S - sums.reference_S))
        self.facts = {"delta": self.running.mean}

    def state(self) -> dict[str, Any]:
        """Return the running mean."""
        return {"mean": self.running.mean, "count": self.running.count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a running mean."""
        self.running = RunningMean(**state)


def build_kto(config: KTOConfig) -> Unpaired:
    """Return the objective of ``objective.name: kto``."""
    loss = partial(
        UNPAIRED_LOSSES[config.loss_type],
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    return (KTO if config.loss_type == "kto" else Unpaired)(loss, config.beta)


def build_bco(config: BCOConfig) -> BCO:
    """Return the objective of ``objective.name: bco``."""
    return BCO(partial(UNPAIRED_LOSSES["bco"], beta=config.beta), config.beta)
