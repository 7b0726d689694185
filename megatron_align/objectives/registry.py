"""From a configuration's objective to the one that trains, and what it asks of the data."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_align.config.objectives import (
    COUPLED,
    DPO_OPTIONS,
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
    SFTConfig,
    SimPOConfig,
    TPOConfig,
)
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.objectives.base import SFT, Objective
from megatron_align.objectives.preference import (
    build_bco,
    build_cpo,
    build_dpo,
    build_kto,
    build_orpo,
    build_simpo,
    build_tpo,
)
from megatron_align.objectives.reward import build_reward

_BUILDERS = {
    SFTConfig: SFT,
    DPOConfig: build_dpo,
    KTOConfig: build_kto,
    BCOConfig: build_bco,
    CPOConfig: build_cpo,
    SimPOConfig: build_simpo,
    TPOConfig: build_tpo,
    ORPOConfig: build_orpo,
}


def build_objective(config: Any, store: TokenStore) -> Objective:
    """Return the objective of a configuration section (one of ``config.OBJECTIVES``) for some training data."""
    if isinstance(config, RewardConfig):
        return build_reward(config, store)
    return _BUILDERS[type(config)](config)


def require_facts(config: Any, store: TokenStore, name: str) -> None:
    """Check that the data say what an objective's options ask for.

    Raises:
        InputError: naming ``name`` (the data) and what is missing.
    """
    if isinstance(config, RewardConfig):
        _require_reward_facts(config, store, name)
    if not isinstance(config, DPOConfig):
        return
    if any("margin_scale" in DPO_OPTIONS[loss_type] for loss_type in config.loss_types):
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


def _require_reward_facts(config: RewardConfig, store: TokenStore, name: str) -> None:
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
