"""CPO, SimPO, TPO and ORPO: pairs (or triples) without a reference.

Shapes: P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from megatron_align.data.store import TokenStore
from megatron_align.errors import require
from megatron_align.losses.reference_free import CPO_LOSSES, TPO_LOSSES, orpo
from megatron_align.losses.responses import Responses
from megatron_align.objectives.metrics import NLL
from megatron_align.objectives.options import (
    ObjectiveOptions,
    require_positive,
    require_smoothing,
    require_used,
)
from megatron_align.objectives.preference import NLLTerm, PairObjective, ScoredPairs

_PER_TOKEN = ("ipo", "simpo", "alphapo", "tpo-l")  # loss types on mean log-probs rather than sums


@dataclass(frozen=True, kw_only=True)
class CPOOptions(ObjectiveOptions):
    """Contrastive preference optimisation: pairs without a reference, and the likelihood of the chosen response.

    Args:
        name: cpo
        loss_type: sigmoid, hinge, ipo, simpo (with cpo_alpha: CPO-SimPO), alphapo (without likelihood)
        beta: factor on the difference of log-probs
        label_smoothing: assumed probability that a preference label is flipped (sigmoid, simpo, alphapo); null: 0
        cpo_alpha: weight of the likelihood term; null: 1, for alphapo 0
        simpo_gamma: simpo, alphapo: target margin; null: 0.5
        alpha: exponent of AlphaPO's reward; null: 0, the log-prob itself
    """

    name: Literal["cpo"] = "cpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo", "alphapo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float | None = None
    cpo_alpha: float | None = None
    simpo_gamma: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        names = ("label_smoothing", "simpo_gamma", "alpha")
        options_of = {name: loss.options for name, loss in CPO_LOSSES.items()}
        require_used({name: getattr(self, name) for name in names}, (self.loss_type,), options_of)
        require_positive(beta=self.beta)
        require_smoothing(self.label_smoothing)
        require(
            self.cpo_alpha is None or (self.cpo_alpha >= 0 and self.loss_type != "alphapo"),
            f"objective.cpo_alpha must not be negative, and alphapo has no likelihood term; "
            f"got {self.cpo_alpha} with loss_type {self.loss_type}",
        )


class CPO(PairObjective):
    """Contrastive preference optimisation."""

    Options = CPOOptions
    metrics = (*PairObjective.metrics, NLL)
    options: CPOOptions

    def __init__(self, options: CPOOptions, store: TokenStore | None = None):
        default = 0.0 if options.loss_type == "alphapo" else 1.0
        super().__init__(options, store, NLLTerm(default if options.cpo_alpha is None else options.cpo_alpha))

    def pair_losses(self, pairs: ScoredPairs) -> Tensor:
        """See :class:`PairObjective`."""
        given = _given(self.options, "label_smoothing", "simpo_gamma", "alpha")
        return CPO_LOSSES[self.options.loss_type](pairs.chosen, pairs.rejected, beta=self.beta, **given)

    def reward(self, side: Responses) -> Tensor:
        """See :class:`PairObjective`."""
        return side.mean_logprob_N if self.options.loss_type in _PER_TOKEN else side.policy_N


@dataclass(frozen=True, kw_only=True)
class SimPOOptions(ObjectiveOptions):
    """SimPO: pairs without a reference, on log-probs per token.

    Args:
        name: simpo
        beta: factor on the difference of log-probs per token (the paper: 2 to 10; the default is TRL's)
        simpo_gamma: target margin (the paper: 0.3 to 1.6)
        label_smoothing: assumed probability that a preference label is flipped
    """

    name: Literal["simpo"] = "simpo"
    beta: float = 0.1
    simpo_gamma: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)
        require_smoothing(self.label_smoothing)


class SimPO(PairObjective):
    """SimPO."""

    Options = SimPOOptions
    options: SimPOOptions

    def pair_losses(self, pairs: ScoredPairs) -> Tensor:
        """See :class:`PairObjective`."""
        given = _given(self.options, "simpo_gamma", "label_smoothing")
        return CPO_LOSSES["simpo"](pairs.chosen, pairs.rejected, beta=self.beta, **given)

    def reward(self, side: Responses) -> Tensor:
        """See :class:`PairObjective`."""
        return side.mean_logprob_N


@dataclass(frozen=True, kw_only=True)
class TPOOptions(ObjectiveOptions):
    """Triple preference optimisation: pairs without a reference, and the likelihood of a third, gold response.

    Args:
        name: tpo
        loss_type: sigmoid, hinge, ipo, tpo-l (log-probs per token and a target margin)
        beta: factor on the difference of log-probs
        label_smoothing: assumed probability that a preference label is flipped (sigmoid, tpo-l); null: 0
        tpo_alpha: weight of the likelihood of the gold response
        tpo_l_gamma: tpo-l: target margin; null: 0.5
    """

    name: Literal["tpo"] = "tpo"
    loss_type: Literal["sigmoid", "hinge", "ipo", "tpo-l"] = "sigmoid"
    beta: float = 0.01
    label_smoothing: float | None = None
    tpo_alpha: float = 1.0
    tpo_l_gamma: float | None = None

    def __post_init__(self) -> None:
        names = ("label_smoothing", "tpo_l_gamma")
        options_of = {name: loss.options for name, loss in TPO_LOSSES.items()}
        require_used({name: getattr(self, name) for name in names}, (self.loss_type,), options_of)
        require_positive(beta=self.beta)
        require_smoothing(self.label_smoothing)
        require(
            self.tpo_alpha > 0,
            "objective.tpo_alpha must be positive (without the gold response use objective cpo), "
            f"got {self.tpo_alpha}",
        )


class TPO(PairObjective):
    """Triple preference optimisation."""

    Options = TPOOptions
    data = ("triple",)
    metrics = (*PairObjective.metrics, NLL)
    width = 3
    options: TPOOptions

    def __init__(self, options: TPOOptions, store: TokenStore | None = None):
        super().__init__(options, store, NLLTerm(options.tpo_alpha, completion=2))

    def pair_losses(self, pairs: ScoredPairs) -> Tensor:
        """See :class:`PairObjective`."""
        given = _given(self.options, "label_smoothing", "tpo_l_gamma")
        return TPO_LOSSES[self.options.loss_type](pairs.chosen, pairs.rejected, beta=self.beta, **given)

    def reward(self, side: Responses) -> Tensor:
        """See :class:`PairObjective`."""
        return side.mean_logprob_N if self.options.loss_type in _PER_TOKEN else side.policy_N


@dataclass(frozen=True, kw_only=True)
class ORPOOptions(ObjectiveOptions):
    """ORPO: likelihood of the chosen response and an odds-ratio term, without a reference.

    Args:
        name: orpo
        beta: weight of the odds-ratio term (the paper's lambda)
        nll_over: tokens of the likelihood term: prompt_and_chosen, as TRL, or chosen, as the paper
    """

    name: Literal["orpo"] = "orpo"
    beta: float = 0.1
    nll_over: Literal["prompt_and_chosen", "chosen"] = "prompt_and_chosen"

    def __post_init__(self) -> None:
        require_positive(beta=self.beta)


class ORPO(PairObjective):
    """ORPO."""

    Options = ORPOOptions
    metrics = (*PairObjective.metrics, NLL)
    options: ORPOOptions

    def __init__(self, options: ORPOOptions, store: TokenStore | None = None):
        with_prompt = options.nll_over == "prompt_and_chosen"
        super().__init__(options, store, NLLTerm(1.0, with_prompt=with_prompt))

    def pair_losses(self, pairs: ScoredPairs) -> Tensor:
        """See :class:`PairObjective`."""
        return orpo(pairs.chosen, pairs.rejected, beta=self.beta)

    def reward(self, side: Responses) -> Tensor:
        """See :class:`PairObjective`."""
        return side.mean_logprob_N


def _given(options: ObjectiveOptions, *names: str) -> dict[str, Any]:
    """Return the options that are not None: the loss has defaults for the others."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}
