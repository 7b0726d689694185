"""Dynamic sampling: prompts whose completions all have the same reward are replaced by the next prompts.

DAPO, arXiv:2503.14476. The rewards decide, which are the same on every rank, so every rank decides alike.

Shapes: G prompts, C completions of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megatron_align.config.rollout import DynamicSamplingConfig
from megatron_align.errors import TrainingFault
from megatron_align.objectives.scored_rollouts import groups_with_signal
from megatron_align.rollout.rollouts import Rollouts, joined

REPLACED = "groups_replaced"  # the metric: so many prompts more than those of a set were taken


def replaced_without_signal(
    first: Rollouts, options: DynamicSamplingConfig, more: Callable[[int, int], Rollouts]
) -> Rollouts:
    """Return as many prompts as the first batch has, those with signal before others, in the order in which they came.

    Args:
        first: the first batch, scored.
        options: of the run.
        more: answers and scores prompts of the stream: ``more(place, count)``, the place counted from the first batch's
            first prompt.

    Raises:
        TrainingFault: the batches are exhausted, and the options say stop.
    """
    wanted = drawn = len(first.completions)
    batches, signals = [first], [_with_signal(first, options.reward)]
    while (missing := wanted - sum(int(signal_G.sum()) for signal_G in signals)) and len(
        batches
    ) < options.max_batches:
        batches.append(more(drawn, missing))
        signals.append(_with_signal(batches[-1], options.reward))
        drawn += missing
    if missing and options.exhausted == "stop":
        raise TrainingFault(
            f"{wanted - missing} of {wanted} prompts have completions of different rewards after "
            f"rollout.dynamic_sampling.max_batches = {options.max_batches} batches of {drawn} prompts: raise it, set "
            "exhausted: keep, or give prompts that are neither too easy nor too hard"
        )
    everything, signal_G = joined(batches), np.concatenate(signals)
    fillers = np.flatnonzero(~signal_G)[:missing]
    rollouts = everything.of_groups(np.sort(np.concatenate([np.flatnonzero(signal_G), fillers])))
    scored_C = everything.scored_C
    rollouts.sampled = {
        REPLACED: float(drawn - wanted),
        "generation_batches": float(len(batches)),
        "reward_sampled": float(everything.reward_C[scored_C].mean()) if scored_C.any() else 0.0,
    }
    return rollouts


def _with_signal(rollouts: Rollouts, reward: str | None) -> np.ndarray:
    """Return which prompts have completions of different rewards, ``[G]`` bool; ``reward``: None: of their sum."""
    reward_C, scored_C = rollouts.reward_C, rollouts.scored_C
    if reward is not None:
        values = rollouts.rewards[reward]
        reward_C = torch.tensor([0.0 if value is None else value for value in values], dtype=torch.float64)
        scored_C = torch.tensor([value is not None for value in values])
    return groups_with_signal(reward_C, scored_C, rollouts.size_G).numpy()
