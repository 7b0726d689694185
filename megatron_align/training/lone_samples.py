"""Steps of one sample, for objectives that compare each prompt with the completion of another sample of its step."""

from __future__ import annotations

from megatron_align.config import RunConfig
from megatron_align.data.batching.sampler import StepOrder
from megatron_align.errors import require, warn_once
from megatron_align.objectives.registry import build_objective


def require_other_samples(config: RunConfig, split: str, order: StepOrder) -> None:
    """Check that steps have the several samples that KTO's baseline needs; warn of single ones that have not.

    In a step of one sample the neighbour is the sample itself: its baseline is that of its own completion.

    Args:
        config: of the run.
        split: ``train`` or ``validation``.
        order: its steps.

    Raises:
        InputError: no training step has a second sample.
    """
    if "mismatched_logprobs" not in build_objective(config.objective).needs:
        return
    lone = [step for step in range(order.steps) if order.size(step) == 1]
    name = config.objective.name
    size = "global_batch_tokens" if config.train.global_batch_tokens else "global_batch_size"
    require(
        split != "train" or len(lone) < order.steps,
        f"objective {name} compares each prompt with the completion of another sample of the step, and every step has "
        f"one sample, with train.{size} {getattr(config.train, size)}; set a larger one",
    )
    if lone:
        warn_once(
            f"{len(lone)} of the {order.steps} steps of data.{split} have one sample only, the first is step "
            f"{lone[0] + 1}: objective {name} compares a prompt with another sample's completion, and these with their "
            f"own; a larger train.{size} avoids it"
        )
