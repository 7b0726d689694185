"""Objectives: from the log-probs of whole samples' scored rows to their share of the step's loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from megatron_align.data.batch import Normalization
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.losses.sft import sft_loss
from megatron_align.objectives import (
    COUPLED,
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
    SFTConfig,
    SimPOConfig,
)
from megatron_align.records import LossRows
from megatron_align.training.preference import (
    StepSums,
    build_bco,
    build_cpo,
    build_dpo,
    build_kto,
    build_orpo,
    build_simpo,
)
from megatron_align.training.reward import build_reward


class Objective(Protocol):
    """What a training step needs of an objective."""

    normalization: Normalization  # how the global batch is weighted; the data side turns it into weights
    metrics: tuple[str, ...]  # names of the sums that ``loss`` returns besides the loss
    whole_samples: bool  # the loss needs whole samples; False: it is a sum over rows
    statistics: bool  # the loss wants the rows' entropy and log sum p^2 too
    score_prompt: bool  # prompts are scored, see ``data.pack``
    ld_alpha: float | None  # how :meth:`weighted` weighs, for the key of a cached reference
    looks_ahead: Literal["own", "mismatched"] | None  # what must be scored before a step's loss is known

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return these samples' share of the global loss (a scalar to sum) and their metric sums, detached."""
        ...

    def weighted(self, logprobs_N: Tensor, rows: LossRows) -> Tensor:
        """Return the log-probs as they enter a completion's sum, of the policy and of the reference."""
        ...

    def look(self, sums: StepSums, *, training: bool) -> Tensor | None:
        """Take in what was scored ahead; return d loss / d summed log-prob where the loss mixes samples."""
        ...

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return a step's metrics from ``loss`` and the metric sums over all ranks."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        ...


class SFT:
    """Supervised fine-tuning."""

    metrics: tuple[str, ...] = ()
    whole_samples = False
    statistics = False
    score_prompt = False
    ld_alpha = None
    looks_ahead = None

    def __init__(self, config: SFTConfig):
        self.normalization = config.normalization

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`."""
        return sft_loss(logprobs_N, rows.weight_N).sum(), {}

    def weighted(self, logprobs_N: Tensor, rows: LossRows) -> Tensor:
        """See :class:`Objective`."""
        return logprobs_N

    def look(self, sums: StepSums, *, training: bool) -> None:
        """See :class:`Objective`."""

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """See :class:`Objective`."""
        return dict(totals)

    def state(self) -> dict[str, Any]:
        """See :class:`Objective`."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`Objective`."""


_BUILDERS = {
    SFTConfig: SFT,
    DPOConfig: build_dpo,
    KTOConfig: build_kto,
    BCOConfig: build_bco,
    CPOConfig: build_cpo,
    SimPOConfig: build_simpo,
    ORPOConfig: build_orpo,
}


def build_objective(config: Any, store: TokenStore) -> Objective:
    """Return the objective of a configuration section (one of ``config.OBJECTIVES``) for some training data."""
    if isinstance(config, RewardConfig):
        return build_reward(config, store)
    return _BUILDERS[type(config)](config)


def need_facts(config: Any, store: TokenStore, name: str) -> None:
    """Check that the data say what an objective's options ask for.

    Raises:
        InputError: naming ``name`` (the data) and what is missing.
    """
    if isinstance(config, RewardConfig):
        _need_reward_facts(config, store, name)
    if not isinstance(config, DPOConfig):
        return
    if any(loss_type in ("margin", "reward_aware") for loss_type in config.loss_types):
        scores = np.asarray(store.scores).reshape(-1, 2)
        bare = np.flatnonzero(np.isnan(store.margins) & np.isnan(scores).any(1))
        if len(bare):
            raise InputError(
                f"{name}: loss_type {', '.join(config.loss_types)} needs a margin, or both scores, in every pair; "
                f"{len(bare)} of {len(scores)} have none, the first is sample {bare[0]}"
            )
    coupled = [loss_type for loss_type in config.loss_types if loss_type in COUPLED]
    if coupled and np.ptp(store.weights):
        raise InputError(
            f"{name}: loss_type {', '.join(coupled)} mixes the pairs of a step, so that they must weigh the same; "
            f"got weights from {store.weights.min():g} to {store.weights.max():g}"
        )


def _need_reward_facts(config: RewardConfig, store: TokenStore, name: str) -> None:
    if config.alpha and np.isnan(store.scores).all():
        raise InputError(f"{name}: objective.alpha {config.alpha:g} reads absolute scores; no sample has one")
    if config.ranked_loss is not None and store.kind != "ranked":
        raise InputError(f"{name}: objective.ranked_loss is of ranked data, got {store.kind} data")
    if store.kind == "ranked":
        lists = np.split(np.asarray(store.scores), store.completion_offsets[1:-1])
        ranks = np.array([len(set(scores)) for scores in lists])
        if (level := np.flatnonzero(ranks < 2)).size:
            raise InputError(f"{name}: a ranked list needs two different scores, sample {level[0]} has one")
        if config.center_rewards_coefficient:
            raise InputError(f"{name}: objective.center_rewards_coefficient is of pairs, got ranked data")
