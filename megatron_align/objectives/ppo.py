"""Proximal policy optimisation: policy gradients whose baseline is a critic, and the critic's own objective.

The policy's side is :class:`.PolicyGradientObjective` with advantages by GAE. The critic's values are computed once for
a set of rollouts, before its first step; they and the returns are columns of the tokens, as advantages are.

Shapes: N tokens of some completions, one completion after the other; in the loss those of a pack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_align.data.store import TokenStore
from megatron_align.errors import require
from megatron_align.losses.value import clipped_values, value_loss
from megatron_align.objectives.base import DataKind, Objective, Sums
from megatron_align.objectives.metrics import Metric
from megatron_align.objectives.options import ObjectiveOptions, require_positive
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.objectives.policy_gradient_options import PolicyGradientOptions
from megatron_align.objectives.scored_rollouts import GROUPS_WITHOUT_SIGNAL
from megatron_align.records import LossRows


def _metric(name: str, unit: str, meaning: str, *, lower_is_better: bool = False) -> Metric:
    return Metric(name=name, unit=unit, meaning=meaning, section="Learning", lower_is_better=lower_is_better)


VALUE_LOSS = _metric(
    "value_loss",
    "reward squared",
    "the critic's loss before objective.vf_coef: half the squared error of its values to the returns, clipped; mean "
    "over the tokens",
    lower_is_better=True,
)
VALUE_METRICS = (
    VALUE_LOSS,
    _metric("value_mean", "reward", "mean value that the critic gives the trained tokens, before its update"),
    _metric("returns", "reward", "mean return of the trained tokens: what the critic learns to predict"),
    _metric(
        "explained_variance",
        "share",
        "1 - variance of (returns - values) / variance of the returns, over the trained tokens; 1: the critic is "
        "right, 0: no better than a constant; 0 where the returns do not vary",
    ),
    _metric(
        "value_clip_fraction",
        "share",
        "tokens whose critic's loss is that of the value clipped to cliprange_value around the one of the rollouts",
    ),
    Metric(
        name="critic_grad_norm",
        unit="norm",
        meaning="2-norm of all gradients of the critic, before clipping to critic.optimizer.clip_grad",
        section="Learning",
        written="training",
    ),
    Metric(
        name="critic_lr",
        unit="per step",
        meaning="learning rate of the critic's step",
        section="Learning",
        written="training",
    ),
)


@dataclass(frozen=True, kw_only=True)
class PPOOptions(PolicyGradientOptions):
    """Proximal policy optimisation: a critic's values are the baseline of every token (GAE).

    Args:
        gae_lambda: lambda of GAE; null: 0.95
        cliprange_value: the critic's loss is the larger of those of its value and of its value clipped to this distance
            from the one before the rollouts' first step; null: not clipped
        vf_coef: factor of the critic's loss. As the critic has its own optimizer, it matters for
            critic.optimizer.clip_grad and eps only
    """

    usual_kl_place: ClassVar[Literal["loss", "token_reward", "sequence_reward"]] = "token_reward"
    usual_gae_lambda: ClassVar[float] = 0.95

    name: Literal["ppo"] = "ppo"
    loss_type: str = "bnpo"
    advantage: Literal["group", "rloo", "opo", "reinforce", "reinforce_baseline", "gae"] = "gae"
    beta: float = 0.05
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1

    def __post_init__(self) -> None:
        PolicyGradientOptions.__post_init__(self)
        require(
            self.advantage == "gae",
            f"objective.advantage must be gae with objective ppo, whose critic it reads; got {self.advantage}, which "
            "objective grpo has",
        )
        require_positive(vf_coef=self.vf_coef)
        if self.cliprange_value is not None:
            require_positive(cliprange_value=self.cliprange_value)


class PPO(PolicyGradientObjective):
    """Proximal policy optimisation, the policy's side."""

    Options = PPOOptions
    metrics: ClassVar[tuple[Metric, ...]] = (
        *(metric for metric in PolicyGradientObjective.metrics if metric is not GROUPS_WITHOUT_SIGNAL),
        *VALUE_METRICS,
    )
    options: PPOOptions
    has_critic = True

    def finish(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """See :class:`Objective`; completions are not compared with those of their prompt."""
        found = super().finish(totals)
        found.pop(GROUPS_WITHOUT_SIGNAL.name, None)
        return found


class CriticObjective(Objective):
    """The critic's loss on its values ``[N]``, with the columns of the tokens that :meth:`PPO.columns` made.

    Args:
        options: of the run.
    """

    data: ClassVar[tuple[DataKind, ...]] = PPO.data
    normalization = "sample"
    whole_samples = False  # a sum over rows

    def __init__(self, options: PPOOptions, store: TokenStore | None = None):
        super().__init__(ObjectiveOptions(name="critic"), store)
        self._clip, self._coefficient = options.cliprange_value, options.vf_coef
        of_values = ("value_loss", "value_mean", "returns", "value_clip_fraction")
        self.sum_names = (*of_values, "error", "squared_error", "squared_return")

    def loss(
        self, value_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`; given are the critic's values."""
        columns = rows.columns
        old_N, return_N, share_N = columns["values"], columns["returns"], columns["shares"]
        loss_N = columns["value_weights"] * value_loss(value_N, old_N, return_N, clip=self._clip)
        loss = loss_N.sum()
        with torch.no_grad():
            error_N = (return_N - value_N).double()
            clipped_N = clipped_values(value_N, old_N, self._clip)
            further_N = (clipped_N - return_N).square() > (value_N - return_N).square()
            sums = {
                "value_loss": loss.detach(),
                "value_mean": (share_N * value_N).sum(),
                "returns": (share_N * return_N).sum(),
                "value_clip_fraction": (share_N * further_N).sum(),
                "error": (share_N * error_N).sum(),
                "squared_error": (share_N * error_N.square()).sum(),
                "squared_return": (share_N * return_N.double().square()).sum(),
            }
        return self._coefficient * loss, sums

    def finish(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """Return the critic's metrics of a step; ``loss``, which holds the coefficient, is left out."""
        names = ("value_loss", "value_mean", "returns", "value_clip_fraction")
        unexplained = totals["squared_error"] - totals["error"] ** 2
        variance = totals["squared_return"] - totals["returns"] ** 2
        # Equal returns have a variance of rounding noise: of fp32 columns, squared.
        varies = variance > 1e-12 * max(totals["squared_return"], 1e-300)
        explained = 1 - unexplained / variance if varies else 0.0
        return {**{name: totals[name] for name in names}, "explained_variance": explained}
