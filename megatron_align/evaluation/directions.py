"""Which metrics are better when they are higher, which when they are lower; counts and shares of ties are neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_align.evaluation.config import (
    ChoiceTask,
    GenerateTask,
    JudgeTask,
    LossTask,
    PreferenceTask,
    Task,
)
from megatron_align.rollout.verifiers.checks import CHECKS

_OF_KINDS: dict[type[Task], dict[str, bool]] = {
    LossTask: {"loss": False, "perplexity": False},
    PreferenceTask: {"accuracy": True, "margin": True, "chosen": True, "rejected": False},
    ChoiceTask: {"accuracy": True, "accuracy_norm": True},
    JudgeTask: {
        "win_rate": True,
        "length_controlled_win_rate": True,
        "wins": True,
        "losses": False,
        "unjudged": False,
        "truncated": False,
    },
}
_OLDER = {
    "loss": False
}  # of results without directions; every other primary metric of theirs counts as higher


def directions_of(task: Task) -> dict[str, bool]:
    """Return for each metric of a task whether higher values are better; not for lm-eval's, which say so themselves."""
    if isinstance(task, GenerateTask):
        return {**dict.fromkeys(CHECKS[task.check].metrics, True), "truncated": False}
    return _OF_KINDS[type(task)]


def direction(results: Sequence[Mapping[str, object]], task: str, metric: str) -> bool | None:
    """Return whether higher values of a task's metric are better, by results that know it; None: nothing says so.

    Args:
        results: contents of ``results.json``.
        task: its name.
        metric: of the task.
    """
    recorded = [
        each["higher_is_better"] for each in results if isinstance(each.get("higher_is_better"), dict)
    ]
    if not recorded:
        return _OLDER.get(metric, True)
    found = {
        of[task].get(metric) for of in recorded if isinstance(of, dict) and isinstance(of.get(task), dict)
    }
    found -= {None}
    return found.pop() if len(found) == 1 else None
