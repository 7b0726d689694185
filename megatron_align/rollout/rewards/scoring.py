"""The rewards of a run: built from its list, checked against all prompts, computed together, combined by weight.

Shapes: C completions of G prompts, one prompt's after the other; R rewards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_align.config.rewards import (
    DEFAULT_CATEGORY,
    EndpointReward,
    FunctionReward,
    LengthReward,
    ModelReward,
    RegexReward,
    RewardConfig,
)
from megatron_align.data.formats.fields import bad_field
from megatron_align.errors import InputError, nearest
from megatron_align.losses.rewards import combine_rewards
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import Group, Reward, Values, background
from megatron_align.rollout.rewards.endpoint import EndpointScorer
from megatron_align.rollout.rewards.function import Function
from megatron_align.rollout.rewards.texts import PatternReward, length_reward
from megatron_align.rollout.rewards.verifiers import Verifier


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """A reward with its options of the list.

    Args:
        config: its weight, category and normalisation.
        reward: what computes it.
    """

    config: RewardConfig
    reward: Reward

    @property
    def name(self) -> str:
        """Name of its metric, ``reward/NAME``."""
        return self.config.label

    def weight_of(self, record: PromptRecord) -> float | None:
        """Return the weight for a prompt; None: the reward does not score it.

        Raises:
            InputError: the weight depends on the prompt's category, and it has none.
        """
        if not isinstance(self.config.weight, dict):
            return self.config.weight
        field = self.config.category or DEFAULT_CATEGORY
        category = record.raw.get(field)
        if not isinstance(category, str):
            raise bad_field(
                record.where, field, f"a text: the weight of reward {self.name} depends on it", category
            )
        return self.config.weight.get(category)

    def start(self, groups: Sequence[Group]) -> Future[Values]:
        """Begin to score the prompts that it scores, in the background."""
        return background(lambda: self.score(groups))

    def score(self, groups: Sequence[Group]) -> Values:
        """Return the values of each prompt's completions: None for prompts that it does not score."""
        scored = [group for group in groups if self.weight_of(group[0]) is not None]
        values = iter(self.reward.score(scored) if scored else ())
        return [
            [None] * len(completions) if self.weight_of(record) is None else next(values)
            for record, completions in groups
        ]


def build_rewards(
    configs: Sequence[RewardConfig], programs: int = 1, models: Mapping[str, Reward] | None = None
) -> list[WeightedReward]:
    """Build the rewards of a list.

    Args:
        configs: the list.
        programs: of ``code``, run at once: this rank's share of the cores.
        models: by name, those of kind model, which need the run's layout.

    Raises:
        InputError: a file, a function or a package is missing.
    """
    return [
        WeightedReward(
            config, models[config.label] if models and config.kind == "model" else _built(config, programs)
        )
        for config in configs
    ]


def _built(config: RewardConfig, programs: int) -> Reward:
    if isinstance(config, FunctionReward):
        return Function(config)
    if isinstance(config, EndpointReward):
        return EndpointScorer(config)
    if isinstance(config, LengthReward):
        return length_reward(config)
    if isinstance(config, RegexReward):
        return PatternReward(config)
    if isinstance(config, ModelReward):
        raise ValueError("reward models need a run: see training.rewards.RunRewards")
    return Verifier(config, programs)


def check_rewards(rewards: Sequence[WeightedReward], records: Sequence[PromptRecord]) -> None:
    """Check all prompts against all rewards, before anything is generated.

    Raises:
        InputError: a record lacks what a reward reads, nothing scores it, or a weight's category occurs nowhere.
    """
    for record in records:
        if all(reward.weight_of(record) is None for reward in rewards):
            raise InputError(
                f"{record.where}: no reward scores this prompt, whose category none has a weight for: add it to a "
                "weight, or remove the prompt"
            )
    for reward in rewards:
        if isinstance(weights := reward.config.weight, dict):
            found = {str(record.raw[reward.config.category or DEFAULT_CATEGORY]) for record in records}
            for category in weights:
                if category not in found:
                    raise InputError(
                        f"reward {reward.name}: weight has the category '{category}', which no prompt has"
                        f"{nearest(category, sorted(found))}"
                    )
        reward.reward.check([record for record in records if reward.weight_of(record) is not None])


def score_rewards(rewards: Sequence[WeightedReward], groups: Sequence[Group]) -> dict[str, Values]:
    """Return the values of each reward by its name, all of them computed at the same time.

    Raises:
        InputError: a reward cannot be computed, is not finite, or there are too many or too few.
        TrainingFault: one failed or took too long in every try.
    """
    started = {reward.name: reward.start(groups) for reward in rewards}
    return {name: future.result() for name, future in started.items()}


def combine(
    rewards: Sequence[WeightedReward], values: Mapping[str, Values], records: Sequence[PromptRecord]
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of all rewards of each completion, and which were scored: ``[C]`` fp64 and bool.

    Args:
        rewards: of the run.
        values: of all of the step's prompts, as normalisation depends on them.
        records: the prompts, in the same order.
    """
    of_first = values[rewards[0].name]
    size_G = torch.tensor([len(of_prompt) for of_prompt in of_first])
    return combine_rewards(
        [[value for of_prompt in values[reward.name] for value in of_prompt] for reward in rewards],
        [
            [
                reward.weight_of(record) or 0.0
                for record, of_prompt in zip(records, of_first, strict=True)
                for _ in of_prompt
            ]
            for reward in rewards
        ],
        [reward.name for reward in rewards],
        normalize=[reward.config.normalize for reward in rewards],
        size_G=size_G,
    )


def mean_rewards(values: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Return ``reward/NAME``, the mean of each reward before weight and normalisation; NaN: it scored nothing.

    Args:
        values: of each completion, by the reward's name.
    """
    metrics = {}
    for name, of_completions in values.items():
        scored = [value for value in of_completions if value is not None]
        metrics[f"reward/{name}"] = sum(scored) / len(scored) if scored else math.nan
    return metrics
