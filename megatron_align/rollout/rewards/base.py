"""The protocol of rewards: prompts with their completions in, a number or None for each completion out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any, Protocol, TypeVar

from megatron_align.errors import InputError, shown
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.types import Completion

Group = tuple[PromptRecord, Sequence[Completion]]
Values = list[list[float | None]]  # of each prompt's completions; None: not scored
_Result = TypeVar("_Result")


class Reward(Protocol):
    """Scores completions. A value depends on its prompt and completion alone, so that no rank changes it.

    Attributes:
        name: of its metric, ``reward/NAME``.
    """

    name: str

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Check all prompts that it will score, before anything is generated.

        Raises:
            InputError: a record lacks what the reward reads.
        """
        ...

    def score(self, groups: Sequence[Group]) -> Values:
        """Return the reward of each completion.

        Raises:
            InputError: it cannot be computed, is not finite, or there are too many or too few values.
            TrainingFault: it failed or took too long in every try.
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def checked(name: str, given: Any, groups: Sequence[tuple[PromptRecord, Sequence[Any]]]) -> Values:
    """Return the values of a reward, one for each completion in order, by prompt.

    Args:
        name: of the reward.
        given: list, tuple, array or tensor of numbers; of a list elements may be None.
        groups: that were scored.

    Raises:
        InputError: there is not one number or None for each completion, or one is not finite.
    """
    count = sum(len(completions) for _, completions in groups)
    if hasattr(given, "tolist"):  # an array, a tensor
        given = given.tolist()
    if not isinstance(given, (list, tuple)):
        raise InputError(
            f"reward {name} must return a list of {count} numbers or None, one for each completion, got {shown(given)}"
        )
    if len(given) != count:
        raise InputError(
            f"reward {name} must return a number or None for each of {count} completions, got {len(given)}"
        )
    values = iter(given)
    return [
        [_number(name, next(values), record, index) for index in range(len(completions))]
        for record, completions in groups
    ]


def _number(name: str, value: Any, record: PromptRecord, index: int) -> float | None:
    """Return a value as a float; ``index``: of the completion, for errors."""
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "size", None) is not None:  # of numpy or torch
        with suppress(RuntimeError, ValueError):  # several elements
            value = value.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(
            f"reward {name} must return a finite number or None, got {shown(value)} for completion {index} of "
            f"{record.where} (counting from 0)"
        )
    return float(value)


def background(call: Callable[[], _Result]) -> Future[_Result]:
    """Make a call in a thread that the end of the program does not wait for; its result or error is the future's."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # it is raised where the result is read
            future.set_exception(error)
        else:
            future.set_result(result)

    Thread(target=run, daemon=True).start()
    return future


def flat(groups: Sequence[Group]) -> list[tuple[PromptRecord, Completion]]:
    """Return each completion with its prompt."""
    return [(record, completion) for record, completions in groups for completion in completions]
