"""Rewards of a completion's text alone: its length, and whether it matches a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from megatron_align.config.rewards import LengthReward, RegexReward
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import Group, Values
from megatron_align.rollout.types import Completion


class TextReward:
    """A pure function of each completion.

    Args:
        name: of the reward.
        value: of a completion.
    """

    def __init__(self, name: str, value: Callable[[Completion], float]):
        self.name, self._value = name, value

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Read nothing of the records."""

    def score(self, groups: Sequence[Group]) -> Values:
        """See :meth:`.Reward.score`."""
        return [[self._value(completion) for completion in completions] for _, completions in groups]

    def close(self) -> None:
        """Nothing is held."""


def length_reward(config: LengthReward) -> TextReward:
    """Return ``-min(1, distance of the length to [min, max] / ramp)``."""

    def value(completion: Completion) -> float:
        length = {
            "tokens": len(completion.token_ids),
            "words": len(completion.text.split()),
            "characters": len(completion.text),
        }[config.unit]
        above = 0 if config.max is None else max(0, length - config.max)
        distance = max(config.min - length, above, 0)
        return -min(1.0, distance / config.ramp) if distance else 0.0

    return TextReward(config.label, value)


def regex_reward(config: RegexReward) -> TextReward:
    """Return 1 where the pattern is found in the completion, or matches all of it, else 0."""
    pattern = re.compile(config.pattern)
    matches = pattern.fullmatch if config.fullmatch else pattern.search
    return TextReward(config.label, lambda completion: float(matches(completion.text) is not None))
