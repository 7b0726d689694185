"""The costs that a plan adds for a run's other models, whose shapes are read from their folders."""

from __future__ import annotations

from megatron_align.config import RunConfig
from megatron_align.config.rewards import ModelReward
from megatron_align.cost.online import OnlineCosts, RewardModelCost
from megatron_align.cost.placement import SecondShapes
from megatron_align.cost.work import WorkOf
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.objectives.registry import has_critic
from megatron_align.training.critic_start import has_shape_of
from megatron_align.training.reference_model import reference_shape, takes_teacher
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


def second_shapes(config: RunConfig, policy: ModelShape) -> SecondShapes:
    """Return the shapes of a run's reference and critic where they are not the policy's; only config.json is read.

    Raises:
        InputError: there is no model, or none that the objective takes.
    """
    reference, critic = None, None
    if config.reference.path is not None and takes_teacher(config):
        found = reference_shape(config, policy, locate(config.reference.path, weights=False)[1])
        reference = found if found != policy else None
    if has_critic(config) and config.critic.path is not None:
        found = read_shape(locate(config.critic.path, weights=False)[1]).as_reward()
        critic = None if has_shape_of(policy, found) else found
    return SecondShapes(reference, critic)
