"""Rewards of a completion's text alone: its length, and whether it matches a regular expression."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_align.config.rewards import LengthReward, RegexReward
from megatron_align.errors import InputError
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import Group, Values
from megatron_align.rollout.types import Completion
from megatron_align.rollout.verifiers.patterns import SECONDS, PatternProcess


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


class PatternReward:
    """1 where a pattern is found in the completion, or matches all of it, else 0.

    Args:
        config: the pattern.
    """

    def __init__(self, config: RegexReward):
        self.name, self._pattern = config.label, config.pattern
        self._process = PatternProcess(config.pattern, config.fullmatch)

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Read nothing of the records."""

    def score(self, groups: Sequence[Group]) -> Values:
        """See :meth:`.Reward.score`."""
        return [
            [self._value(completion, f"{k} of {record.where}") for k, completion in enumerate(completions)]
            for record, completions in groups
        ]

    def close(self) -> None:
        """End its process."""
        self._process.close()

    def _value(self, completion: Completion, place: str) -> float:
        found = self._process.matches(completion.text)
        if found is None:
            raise InputError(
                f"reward {self.name}: the pattern must decide within {SECONDS:g} s of processor time, which it did not "
                f"for completion {place} (counting from 0): nested repetitions take exponential time, got "
                f"{self._pattern}"
            )
        return float(found)
