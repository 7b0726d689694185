"""Direct preference optimisation and its relatives: pairs, against a reference.

Shapes: N scored rows and C completions of some complete pairs of a pack; P pairs of them (C = 2 P).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError, require, shown
from megatron_align.losses.divergences import DIVERGENCES
from megatron_align.losses.dpo import DPO_LOSSES
from megatron_align.losses.pair_loss import PairLoss, WeightedLosses
from megatron_align.losses.responses import wpo_weights
from megatron_align.objectives.base import Need, StepStatistics, StepSums, completion_sums
from megatron_align.objectives.metrics import NLL
from megatron_align.objectives.options import (
    ObjectiveOptions,
    require_loss_types,
    require_positive,
    require_smoothing,
    require_used,
)
from megatron_align.objectives.preference import BatchCoupledLoss, NLLTerm, PairObjective, ScoredPairs
from megatron_align.records import LossRows

LIKELIHOOD = "sft"  # the loss type that is no loss of pairs but the likelihood term


def _options_of(loss: PairLoss) -> tuple[str, ...]:
    """Return the options of a loss by their names in the configuration."""
    names = ("f_divergence_type" if name == "divergence" else name for name in loss.options)
    return (*names, "margin_scale") if loss.reads_margin else tuple(names)


DPO_OPTIONS = {name: _options_of(loss) for name, loss in DPO_LOSSES.items()} | {LIKELIHOOD: ()}
_COUPLED = [name for name, loss in DPO_LOSSES.items() if loss.batch_coupled]
_MARGIN_READERS = [name for name, loss in DPO_LOSSES.items() if loss.reads_margin]


@dataclass(frozen=True, kw_only=True)
class DPOOptions(ObjectiveOptions):
    """Direct preference optimisation and its relatives, on pairs, against a reference.

    Args:
        name: dpo
        loss_type: sigmoid, sigmoid_norm, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot,
            aot_unpaired, apo_zero, apo_down, discopop, sft, margin, reward_aware; or a list of them
        loss_weights: weight of each of several loss types; null: 1 each
        beta: KL coefficient (inverse temperature of the implicit reward)
        label_smoothing: assumed probability that a preference label is flipped (sigmoid, then conservative DPO;
            robust, exo_pair, aot, aot_unpaired); null: 0, for exo_pair 0.001
        f_divergence_type: divergence between policy and reference; null: reverse_kl
        f_alpha_divergence_coef: alpha of alpha_divergence; null: 0.5
        discopop_tau: temperature of discopop; null: 0.05
        ld_alpha: LD-DPO weight of the tokens past the shorter response's length; null: 1, plain
        use_weighting: WPO: weight pairs by how likely the policy is to generate them
        rpo_alpha: RPO weight of the chosen response's likelihood term; null: none
        margin_scale: margin, reward_aware: factor on the data's margins (or score differences); null: 1
    """

    name: Literal["dpo"] = "dpo"
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    beta: float = 0.1
    label_smoothing: float | None = None
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] | None = None
    f_alpha_divergence_coef: float | None = None
    discopop_tau: float | None = None
    ld_alpha: float | None = None
    use_weighting: bool = False
    rpo_alpha: float | None = None
    margin_scale: float | None = None

    def __post_init__(self) -> None:
        types = self.loss_types
        require_loss_types(types, DPO_OPTIONS)
        names = ("label_smoothing", "f_divergence_type", "discopop_tau", "margin_scale")
        require_used({name: getattr(self, name) for name in names}, types, DPO_OPTIONS)
        require_positive(beta=self.beta)
        require_smoothing(self.label_smoothing)
        require(
            self.loss_weights is None or len(self.loss_weights) == len(types),
            f"objective.loss_weights must be one for each of {len(types)} loss types, got {self.loss_weights}",
        )
        require(
            self.discopop_tau is None or self.discopop_tau > 0,
            f"objective.discopop_tau must be positive, got {self.discopop_tau}",
        )
        require(
            self.ld_alpha is None or 0 <= self.ld_alpha <= 1,
            f"objective.ld_alpha must be in [0, 1], got {self.ld_alpha}",
        )
        require(
            self.rpo_alpha is None or (self.rpo_alpha > 0 and LIKELIHOOD not in types),
            f"objective.rpo_alpha must be positive, and stands for loss_type sft; got {self.rpo_alpha} with "
            f"loss_type {', '.join(types)}",
        )
        self._require_one_divergence()
        self._require_unmixed_pairs()

    def _require_one_divergence(self) -> None:
        require(
            self.f_alpha_divergence_coef is None or self.f_divergence_type == "alpha_divergence",
            f"objective.f_alpha_divergence_coef belongs to f_divergence_type alpha_divergence, "
            f"got {self.f_alpha_divergence_coef} with {shown(self.f_divergence_type)}",
        )
        if self.f_divergence_type in (None, "reverse_kl"):
            return
        of_pairs = [name for name in self.loss_types if name != LIKELIHOOD]
        fixed = [name for name in of_pairs if "f_divergence_type" not in DPO_OPTIONS[name]]
        require(
            not fixed,
            f"objective.f_divergence_type {self.f_divergence_type} must suit every loss type, "
            f"and {', '.join(fixed)} takes none",
        )

    def _require_unmixed_pairs(self) -> None:
        coupled = [name for name in self.loss_types if name in _COUPLED]
        scaled = [name for name in self.loss_types if name in _MARGIN_READERS]
        require(
            not (coupled and scaled),
            f"objective.loss_type {', '.join(scaled)} reads a margin for each pair, and {', '.join(coupled)} mixes "
            "the step's pairs: not both",
        )
        mixing = [name for name in self.loss_types if name in (*_COUPLED, LIKELIHOOD)]
        mixing += ["rpo_alpha"] * (self.rpo_alpha is not None)
        require(
            not (mixing and self.use_weighting),
            f"objective.use_weighting weighs pairs, and {', '.join(mixing)} mixes the step's pairs: not both",
        )

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The loss types, one or several."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def weighted_types(self) -> list[tuple[str, float]]:
        """The loss types, each with its weight."""
        weights = self.loss_weights or [1.0] * len(self.loss_types)
        return list(zip(self.loss_types, weights, strict=True))


class DPO(PairObjective):
    """DPO and its relatives: one loss of pairs, or a weighted sum of several."""

    Options = DPOOptions
    metrics = (*PairObjective.metrics, NLL)
    options: DPOOptions

    def __init__(self, options: DPOOptions, store: TokenStore | None = None):
        likelihood = sum(weight for name, weight in options.weighted_types if name == LIKELIHOOD)
        super().__init__(options, store, NLLTerm(likelihood + (options.rpo_alpha or 0.0)))
        self.losses = _losses(options)
        coupled = any(loss.batch_coupled for loss in self.losses.losses)
        self.coupled = BatchCoupledLoss(self.losses) if coupled else None
        needs: set[Need] = {"reference_logprobs"}
        self.needs = frozenset(needs | {"batch_statistics"} if coupled else needs)
        self.row_statistics = options.use_weighting
        self.scoring_options = {"ld_alpha": options.ld_alpha}
        weighted = options.use_weighting or options.loss_weights not in (None, [1.0])
        plain = options.loss_types == ("sigmoid",) and options.rpo_alpha is None and not weighted
        self.loss_at_reference = math.log(2) if plain else None

    def pair_losses(self, pairs: ScoredPairs) -> Tensor:
        """See :class:`PairObjective`."""
        if not self.losses.losses:
            return torch.zeros_like(pairs.chosen.policy_N)
        loss_P = self.losses(pairs.chosen, pairs.rejected, self._margins(pairs.rows))
        return loss_P * _wpo_weights(pairs) if self.options.use_weighting else loss_P

    def share(self, pairs: ScoredPairs) -> Tensor:
        """See :class:`PairObjective`."""
        return super().share(pairs) if self.coupled is None else self.coupled.share(pairs)

    def observe_batch(self, seen: Mapping[Need, StepSums], *, training: bool) -> StepStatistics:
        """Return the gradient of a loss that sorts the step's pairs."""
        assert self.coupled is not None, "only a loss that sorts the pairs needs batch statistics"
        return self.coupled.observe(seen["batch_statistics"])

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics; the step's loss that was observed is among them already, as ``loss``."""
        return {name: value for name, value in totals.items() if name != "step_loss"}

    def weighted(self, logprobs_N: Tensor, rows: LossRows) -> Tensor:
        """Return the log-probs, with ``ld_alpha`` times LD-DPO's factors."""
        if self.options.ld_alpha is None:
            return logprobs_N
        return logprobs_N * shared_length_factors(rows, self.options.ld_alpha)

    def require_data(self, store: TokenStore, name: str) -> None:
        """Check that every pair has a margin where the loss reads it, and that mixed pairs weigh the same."""
        types = self.options.loss_types
        if any(loss.reads_margin for loss in self.losses.losses):
            scores = np.asarray(store.scores).reshape(-1, 2)
            bare = np.flatnonzero(np.isnan(store.margins) & np.isnan(scores).any(1))
            if len(bare):
                raise InputError(
                    f"{name}: loss_type {', '.join(types)} needs a margin, or both scores, in every pair; "
                    f"{len(bare)} of {len(scores)} have none, the first is sample {bare[0]}"
                )
        if self.coupled is not None and np.ptp(store.weights):
            coupled = [loss_type for loss_type in types if loss_type in _COUPLED]
            raise InputError(
                f"{name}: loss_type {', '.join(coupled)} mixes the pairs of a step, so that they must weigh the same; "
                f"got weights from {store.weights.min():g} to {store.weights.max():g}"
            )

    def _margins(self, rows: LossRows) -> Tensor | None:
        """Return by how much each chosen response is better, ``[P]``, in units of reward; None: no loss reads it."""
        if not any(loss.reads_margin for loss in self.losses.losses):
            return None
        scale = 1.0 if self.options.margin_scale is None else self.options.margin_scale
        scored_P = rows.completions.score_C[::2] - rows.completions.score_C[1::2]
        given_P = rows.completions.margin_C[::2]
        return scale * torch.where(given_P.isnan(), scored_P, given_P)


def _losses(options: DPOOptions) -> WeightedLosses:
    """Return the losses of pairs, without the likelihood, with their options."""
    of_pairs = [(name, weight) for name, weight in options.weighted_types if name != LIKELIHOOD]
    names = ("label_smoothing", "discopop_tau")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.f_divergence_type is not None:
        given["divergence"] = DIVERGENCES[options.f_divergence_type]
        if options.f_alpha_divergence_coef is not None:
            given["divergence"] = partial(given["divergence"], alpha=options.f_alpha_divergence_coef)
    losses, weights = tuple(DPO_LOSSES[name] for name, _ in of_pairs), tuple(weight for _, weight in of_pairs)
    return WeightedLosses(losses, weights, {"beta": options.beta, **given})


def _wpo_weights(pairs: ScoredPairs) -> Tensor:
    """Return WPO's weight of each pair, ``[P]``, see ``losses/responses.py``."""
    policy_C, square_C = (
        completion_sums(values_N, pairs.rows)
        for values_N in (pairs.logprobs_N.detach(), pairs.row_statistics["log_sum_square"])
    )
    length_C = pairs.rows.completions.length_C
    return wpo_weights(policy_C, square_C, length_C).view(-1, 2).prod(1)


def shared_length_factors(rows: LossRows, ld_alpha: float) -> Tensor:
    """Return LD-DPO's factor of each row, ``[N]``: 1 up to the shorter completion's length of its pair, then alpha.

    Liu et al. 2024, arXiv:2409.06411. TRL: ``ld_alpha`` (default None: off).
    """
    length_C = rows.completions.length_C
    shared_C = length_C.view(-1, 2).amin(1).repeat_interleave(2)
    starts_C = length_C.cumsum(0) - length_C
    index_N = torch.arange(rows.row_N.shape[0], device=length_C.device) - starts_C[rows.sequence_N]
    return torch.where(index_N < shared_C[rows.sequence_N], 1.0, ld_alpha)
