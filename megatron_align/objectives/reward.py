"""The reward model's objective: rewards of pairs or ranked lists to their share of the loss.

Shapes: C completions of a pack; N pairs or lists, K places of the longest list.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megatron_align.config.objectives import RewardConfig
from megatron_align.data.store import TokenStore
from megatron_align.losses.ranked import RANKED_LOSSES
from megatron_align.losses.reward import Rewards, reward_loss, score_error
from megatron_align.objectives.base import Objective, Sums
from megatron_align.records import Completions, LossRows

# Rewards in the metrics' histogram: bins of one from -8 to 8, and one for what lies beyond on each side.
EDGES = tuple(float(edge) for edge in range(-8, 9))


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


class RewardModel(Objective):
    """Bradley-Terry on pairs with the report's score term, or a loss of ranked lists.

    Args:
        config: the options.
        ranked: name of the loss of ranked lists; None: the data are pairs.
        scale: see :func:`score_scale`.
    """

    whole_samples = False  # it sees completions, not rows

    def __init__(self, config: RewardConfig, ranked: str | None, scale: tuple[float, float]):
        self.config, self.ranked, self.scale = config, ranked, scale
        self.normalization = "pair" if ranked is None else "example"
        self._bins = tuple(f"histogram_{i}" for i in range(len(EDGES) + 1))
        self.metrics: tuple[str, ...] = (
            "accuracy",
            "reward_margin",
            "chosen_reward",
            "rejected_reward",
            *self._bins,
        )

    def loss(
        self, rewards_C: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """Return the share of the loss, and the metric sums; of a list, best and worst stand for the pair."""
        known = rows.completions
        if self.ranked is None:
            weight_N, loss_N, best_N, worst_N = self._pairs(rewards_C, known)
        else:
            weight_N, loss_N, best_N, worst_N = self._lists(rewards_C, known, rows.ends)
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

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics, with the histogram's counts in one list."""
        kept = {name: value for name, value in totals.items() if name not in self._bins}
        counts = [totals[name] for name in self._bins]
        return {**kept, "reward_histogram": {"edges": list(EDGES), "counts": counts}}

    def _pairs(self, rewards_C: Tensor, known: Completions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        chosen, rejected = (Rewards(rewards_C[k::2], self._scores(known)[k::2]) for k in (0, 1))
        loss_N = reward_loss(
            chosen,
            rejected,
            margin_N=known.margin_C[::2].nan_to_num(0.0),
            alpha=self.config.alpha,
            center_rewards_coefficient=self.config.center_rewards_coefficient,
        )
        return known.weight_C[::2], loss_N, chosen.reward_N.detach(), rejected.reward_N.detach()

    def _lists(
        self, rewards_C: Tensor, known: Completions, ends: tuple[tuple[int, int], ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        stops = np.array([completions for _, completions in ends], dtype=np.int64)
        counts = np.diff(stops, prepend=0)
        longest = int(counts.max(initial=1))
        place_NK = (stops - counts)[:, None] + np.arange(longest)
        absent_NK = np.arange(longest) >= counts[:, None]
        place_NK, absent_NK = (
            torch.from_numpy(x).to(rewards_C.device) for x in (np.where(absent_NK, 0, place_NK), absent_NK)
        )
        reward_NK = rewards_C[place_NK]
        score_NK = known.score_C[place_NK].masked_fill(absent_NK, torch.nan)
        loss_N = RANKED_LOSSES[self.ranked](reward_NK, score_NK)
        if self.config.alpha:
            scores_NK = self._scores(known)[place_NK].masked_fill(absent_NK, torch.nan)
            loss_N = loss_N + self.config.alpha * score_error(Rewards(reward_NK, scores_NK)).sum(1)
        seen_NK = reward_NK.detach()
        best_N1 = score_NK.nan_to_num(-torch.inf).argmax(1, keepdim=True)
        worst_N1 = score_NK.nan_to_num(torch.inf).argmin(1, keepdim=True)
        best_N, worst_N = (seen_NK.gather(1, at_N1)[:, 0] for at_N1 in (best_N1, worst_N1))
        return known.weight_C[place_NK[:, 0]], loss_N, best_N, worst_N

    def _scores(self, known: Completions) -> Tensor:
        shift, scale = self.scale
        return (known.score_C - shift) / scale

    def _histogram(self, rewards_C: Tensor) -> Sums:
        edges = torch.tensor(EDGES, device=rewards_C.device)
        bins_C = torch.bucketize(rewards_C, edges, right=True)
        counts = torch.zeros(len(self._bins), device=rewards_C.device).index_add_(
            0, bins_C, torch.ones_like(rewards_C)
        )
        return dict(zip(self._bins, counts, strict=True))


def build_reward(config: RewardConfig, store: TokenStore) -> RewardModel:
    """Return the objective of ``objective.name: reward`` for some training data."""
    ranked = (config.ranked_loss or "plackett_luce") if store.kind == "ranked" else None
    return RewardModel(config, ranked, score_scale(np.asarray(store.scores), config.score_normalization))
