"""Rewards that verify an answer: mathematics, texts, IFEval's instructions, tests of code."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from megatron_align.config.rewards import AnswerReward, InstructionReward, RewardConfig
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import Group, Values, checked, flat
from megatron_align.rollout.verifiers.checks import CHECKS
from megatron_align.rollout.verifiers.running import checking
from megatron_align.rollout.verifiers.sandbox import passes


class Verifier:
    """A check of ``rollout/verifiers``; what runs programs or may never end runs in processes of its own.

    Args:
        config: of kind math, exact_match, contains, ifeval or code.
        programs: run at once.

    Raises:
        InputError: a package is missing.
    """

    def __init__(self, config: RewardConfig, programs: int):
        self.name, self._check = config.label, CHECKS[config.kind]
        extract = config.extract if isinstance(config, AnswerReward) else None
        self._metric = config.metric if isinstance(config, InstructionReward) else self._check.metrics[0]
        self._check.require(f"reward {self.name}", extract)
        self._open = ExitStack()
        self._scoring = self._open.enter_context(checking(config.kind, extract, programs))

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Check that every record has what an answer is compared with, and that code can be run.

        Raises:
            InputError: a record lacks it, or the kernel cannot confine programs.
        """
        if self._check is CHECKS["code"]:
            passes("")
        for record in records:
            self._check.expected(record)

    def score(self, groups: Sequence[Group]) -> Values:
        """See :meth:`.Reward.score`."""
        expected = [self._check.expected(record) for record, completions in groups for _ in completions]
        texts = [completion.text for _, completion in flat(groups)]
        scores = self._scoring(list(zip(texts, expected, strict=True)))
        return checked(self.name, [score[self._metric] for score in scores], groups)

    def close(self) -> None:
        """End its processes."""
        self._open.close()
