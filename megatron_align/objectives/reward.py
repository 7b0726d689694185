"""Reward modelling: a scalar on the last token of each response, from pairs or ranked lists.

Shapes: C completions of a pack; N pairs or lists, K responses of the longest list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError, require
from megatron_align.losses.ranked import RANKED_LOSSES
from megatron_align.losses.reward import Rewards, reward_loss, score_error
from megatron_align.model.transfer import to_device
from megatron_align.objectives.base import Objective, Sums
from megatron_align.objectives.metrics import (
    ACCURACY,
    CHOSEN_REWARD,
    REJECTED_REWARD,
    REWARD_MARGIN,
    Metric,
)
from megatron_align.objectives.options import ObjectiveOptions
from megatron_align.records import Completions, LossRows

HISTOGRAM = Metric(
    name="reward_histogram",
    unit="counts",
    meaning="responses by reward, between edges from -8 to 8 and beyond on both sides",
    curve=False,
)
# Edges of HISTOGRAM: bins of width 1 from -8 to 8, and one beyond on each side.
EDGES = tuple(float(edge) for edge in range(-8, 9))


@dataclass(frozen=True, kw_only=True)
class RewardOptions(ObjectiveOptions):
    """Reward model: a scalar on the last token of each response, from pairs or ranked lists.

    Args:
        name: reward
        alpha: weight of the squared error to absolute scores, where a sample has them (the report's objective)
        score_normalization: none: scores as they are; standard: mean 0 and deviation 1 over the training data;
            range: from -1 to 1; null: none
        center_rewards_coefficient: weight of the squared sum of a pair's rewards, which keeps them around 0
        ranked_loss: loss of ranked lists: plackett_luce or all_pairs; null: plackett_luce for ranked data
    """

    name: Literal["reward"] = "reward"
    alpha: float = 0.0
    score_normalization: Literal["none", "standard", "range"] | None = None
    center_rewards_coefficient: float = 0.0
    ranked_loss: Literal["plackett_luce", "all_pairs"] | None = None

    def __post_init__(self) -> None:
        require(self.alpha >= 0, f"objective.alpha must not be negative, got {self.alpha}")
        require(
            self.center_rewards_coefficient >= 0,
            f"objective.center_rewards_coefficient must not be negative, got {self.center_rewards_coefficient}",
        )
        require(
            self.score_normalization is None or self.alpha > 0,
            f"objective.score_normalization applies to the scores that alpha > 0 reads, "
            f"got {self.score_normalization} with alpha {self.alpha}",
        )


class RewardModel(Objective):
    """Bradley-Terry on pairs with the report's score term, or a loss of ranked lists."""

    Options = RewardOptions
    data = ("pair", "ranked")
    metrics = (REWARD_MARGIN, ACCURACY, CHOSEN_REWARD, REJECTED_REWARD, HISTOGRAM)
    trains_reward_model = True
    whole_samples = False  # it sees completions, not rows
    options: RewardOptions

    def __init__(self, options: RewardOptions, store: TokenStore | None = None):
        super().__init__(options, store)
        ranked = store is not None and store.kind == "ranked"
        self.ranked = (options.ranked_loss or "plackett_luce") if ranked else None
        self.scale = (0.0, 1.0)
        if store is not None:
            self.scale = score_scale(np.asarray(store.scores), options.score_normalization)
        self.normalization = "example" if ranked else "pair"
        self._bins = tuple(f"histogram_{i}" for i in range(len(EDGES) + 1))
        self.sum_names = ("accuracy", "reward_margin", "chosen_reward", "rejected_reward", *self._bins)

    def require_data(self, store: TokenStore, name: str) -> None:
        """Check that there are scores where alpha reads them, and that ranked lists have an order."""
        options = self.options
        if options.alpha and np.isnan(store.scores).all():
            raise InputError(
                f"{name}: objective.alpha {options.alpha:g} reads absolute scores; no sample has one"
            )
        if options.ranked_loss is not None and store.kind != "ranked":
            raise InputError(f"{name}: objective.ranked_loss needs ranked data, got {store.kind} data")
        if store.kind == "ranked":
            lists = np.split(np.asarray(store.scores), store.completion_offsets[1:-1])
            distinct = np.array([len(set(scores)) for scores in lists])
            if (level := np.flatnonzero(distinct < 2)).size:
                raise InputError(
                    f"{name}: a ranked list needs two different scores, sample {level[0]} has one"
                )
            if options.center_rewards_coefficient:
                raise InputError(f"{name}: objective.center_rewards_coefficient needs pairs, got ranked data")

    def loss(
        self, rewards_C: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`; of a list, the metrics' pair is its best and its worst response."""
        completions = rows.completions
        if self.ranked is None:
            weight_N, loss_N, best_N, worst_N = self._pairs(rewards_C, completions)
        else:
            ranked_loss = RANKED_LOSSES[self.ranked]
            weight_N, loss_N, best_N, worst_N = self._lists(ranked_loss, rewards_C, completions, rows.ends)
        with torch.no_grad():
            values = {
                "accuracy": (best_N > worst_N).to(weight_N.dtype),
                "reward_margin": best_N - worst_N,
                "chosen_reward": best_N,
                "rejected_reward": worst_N,
            }
            sums = {name: (weight_N * value_N).sum() for name, value_N in values.items()}
            sums |= self._histogram(rewards_C.detach())
        return (weight_N * loss_N).sum(), sums

    def finish(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """Return the metrics, with the histogram's counts in one list."""
        kept = {name: value for name, value in totals.items() if name not in self._bins}
        counts = [totals[name] for name in self._bins]
        return {**kept, "reward_histogram": {"edges": list(EDGES), "counts": counts}}

    def _pairs(self, rewards_C: Tensor, completions: Completions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen, rejected = (Rewards(rewards_C[k::2], self._scores(completions)[k::2]) for k in (0, 1))
        loss_N = reward_loss(
            chosen,
            rejected,
            margin_N=completions.margin_C[::2].nan_to_num(0.0),
            alpha=self.options.alpha,
            center_rewards_coefficient=self.options.center_rewards_coefficient,
        )
        return completions.weight_C[::2], loss_N, chosen.reward_N.detach(), rejected.reward_N.detach()

    def _lists(
        self,
        ranked_loss: Callable[..., Tensor],
        rewards_C: Tensor,
        completions: Completions,
        ends: tuple[tuple[int, int], ...],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stops = np.array([end for _, end in ends], dtype=np.int64)
        counts = np.diff(stops, prepend=0)
        longest = int(counts.max(initial=1))
        host_absent_NK = np.arange(longest) >= counts[:, None]
        host_index_NK = np.where(host_absent_NK, 0, (stops - counts)[:, None] + np.arange(longest))
        index_NK, absent_NK = (
            to_device(torch.from_numpy(x), rewards_C.device) for x in (host_index_NK, host_absent_NK)
        )
        reward_NK = rewards_C[index_NK]
        score_NK = completions.score_C[index_NK].masked_fill(absent_NK, torch.nan)
        loss_N = ranked_loss(reward_NK, score_NK)
        if self.options.alpha:
            scores_NK = self._scores(completions)[index_NK].masked_fill(absent_NK, torch.nan)
            loss_N = loss_N + self.options.alpha * score_error(Rewards(reward_NK, scores_NK)).sum(1)
        seen_NK = reward_NK.detach()
        best_N1 = score_NK.nan_to_num(-torch.inf).argmax(1, keepdim=True)
        worst_N1 = score_NK.nan_to_num(torch.inf).argmin(1, keepdim=True)
        best_N, worst_N = (seen_NK.gather(1, at_N1)[:, 0] for at_N1 in (best_N1, worst_N1))
        return completions.weight_C[index_NK[:, 0]], loss_N, best_N, worst_N

    def _scores(self, completions: Completions) -> Tensor:
        shift, scale = self.scale
        return (completions.score_C - shift) / scale

    def _histogram(self, rewards_C: Tensor) -> Sums:
        edges = to_device(torch.tensor(EDGES), rewards_C.device)
        bins_C = torch.bucketize(rewards_C, edges, right=True)
        counts = torch.zeros(len(self._bins), device=rewards_C.device).index_add_(
            0, bins_C, torch.ones_like(rewards_C)
        )
        return dict(zip(self._bins, counts, strict=True))


def score_scale(scores_C: np.ndarray, normalization: str | None) -> tuple[float, float]:
    """Return ``(shift, scale)``: a normalised score is ``(score - shift) / scale``. NaN scores do not count.

    Args:
        scores_C: of the training data.
        normalization: None or none: as they are; standard: mean 0 and deviation 1; range: from -1 to 1.
    """
    given = scores_C[~np.isnan(scores_C)]
    if normalization in (None, "none") or not len(given):
        return 0.0, 1.0
    if normalization == "standard":
        return float(given.mean()), float(given.std()) or 1.0
    low, high = float(given.min()), float(given.max())
    return (low + high) / 2, (high - low) / 2 or 1.0
