"""Rewards by a function of a user's file: ``f(prompts, completions, **columns) -> list of numbers or None``."""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

from megatron_align.config.rewards import FunctionReward
from megatron_align.config.user_files import parameters_of, raised_at, user_function
from megatron_align.errors import InputError, TrainingFault, listed, nearest
from megatron_align.rollout.endpoint import backoff
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import Group, Values, background, checked, flat
from megatron_align.rollout.rewards.columns import RESERVED, arguments, column_names

FIRST_WAIT = 1.0  # seconds before the second try


class _TookTooLong(Exception):
    """A coroutine was cancelled at its timeout."""


class Function:
    """A function, plain or async. It is given the parameters that it names, all columns if it has ``**kwargs``.

    Args:
        config: path, timeout and retries.

    Raises:
        InputError: there is no such file or function, or the file raises when it is imported.
    """

    def __init__(self, config: FunctionReward):
        self.name, self.config = config.label, config
        option = f"reward {self.name}: path"
        self.file, self._function = user_function(config.path, option)
        self._parameters, self._takes_all = parameters_of(self._function, option)
        self._columns: tuple[str, ...] = ()
        self._random = random.Random()

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Check that the data have every field that the function needs, and note them.

        Raises:
            InputError: a parameter without a default is no field of any record.
        """
        self._columns = column_names(records, self.name)
        known = (*RESERVED, *self._columns)
        for name, required in self._parameters.items():
            if required and name not in known:
                raise InputError(
                    f"reward {self.name}: the function needs '{name}', which no prompt's record has as a field; its "
                    f"fields are {listed(self._columns) or 'none'}{nearest(name, known)}"
                )

    def score(self, groups: Sequence[Group]) -> Values:
        """Call the function once with all completions; see :meth:`.Reward.score`."""
        scored = flat(groups)
        failure: InputError | TrainingFault
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(backoff(attempt - 1, FIRST_WAIT, self._random))
            given, columns = arguments(scored, self._columns)
            every = {**columns, **given}
            kept = every if self._takes_all else {k: v for k, v in every.items() if k in self._parameters}
            call = background(lambda kept=kept: self._call(kept))  # type: ignore[misc]  # bound at once
            try:
                return checked(self.name, call.result(self.config.timeout), groups)
            except InputError:
                raise
            except (Exception, SystemExit) as error:  # a user's function may raise anything
                if isinstance(error, _TookTooLong) or (isinstance(error, FutureTimeout) and not call.done()):
                    line = f"reward {self.name} took longer than its timeout of {self.config.timeout:g} s"
                    failure = TrainingFault(f"{line} for {len(scored)} completions")
                else:
                    failure = self._raised(error)
        tries = self.config.retries + 1
        line = f"{failure}, in each of {tries} tries" if tries > 1 else str(failure)
        raise type(failure)(line) from failure.__cause__

    def close(self) -> None:
        """Nothing is held."""

    def _call(self, given: dict[str, Any]) -> Any:
        result = self._function(**given)
        if not inspect.isawaitable(result):
            return result

        async def awaited() -> Any:
            task = asyncio.ensure_future(result)
            if not (await asyncio.wait({task}, timeout=self.config.timeout))[0]:
                task.cancel()
                raise _TookTooLong
            return task.result()

        return asyncio.run(awaited())

    def _raised(self, error: BaseException) -> InputError:
        """Return one line with the user's own line of code that raised."""
        failure = InputError(f"reward {self.name} {raised_at(error, self.file)}")
        failure.__cause__ = error
        return failure
