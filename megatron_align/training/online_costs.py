"""The costs that a run on rollouts adds to a plan; the shapes of its reward models are read from their folders."""

from __future__ import annotations

from megatron_align.config import RunConfig
from megatron_align.config.rewards import ModelReward
from megatron_align.cost.online import OnlineCosts, RewardModelCost
from megatron_align.cost.work import WorkOf
from megatron_align.model.families import read_shape
from megatron_align.training.setup import locate


def online_costs(config: RunConfig, ptx: WorkOf | None) -> OnlineCosts:
    """Return what a run adds to training steps; of reward models only config.json is read.

    Args:
        config: of the run.
        ptx: the work of its supervised samples; None: it has none.

    Raises:
        InputError: there is no model at the path of a reward.
    """
    models = [
        RewardModelCost(
            reward.label,
            read_shape(locate(reward.path, weights=False)[1]),
            reward.precision or config.train.precision,
        )
        for reward in config.rewards
        if isinstance(reward, ModelReward)
    ]
    return OnlineCosts(tuple(models), ptx)
