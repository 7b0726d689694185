"""The places in the endless stream of the run's prompts at which each set of rollouts begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class PromptCursor:
    """The place in the stream of prompts of the first prompt of each set.

    A set takes ``prompts`` of them, and with dynamic sampling those that replaced others too, which is known when it is
    made: then the place of the next set is part of every checkpoint.

    Args:
        prompts: of a set.
    """

    def __init__(self, prompts: int):
        self._prompts = prompts
        self._first: dict[int, int] = {}  # by set: the present one and the next

    def first(self, rollout: int) -> int:
        """Return the place of the first prompt of a 0-based set; the sets before it were made, or none was replaced."""
        return self._first.get(rollout, rollout * self._prompts)

    def made(self, rollout: int, prompts: int) -> None:
        """Note that a set has taken a number of prompts."""
        first = self.first(rollout)
        self._first = {rollout: first, rollout + 1: first + prompts}

    def state(self, rollout: int) -> dict[str, int]:
        """Return what a checkpoint must hold whose last step trained on a set."""
        return {"rollout": rollout, "first": self.first(rollout), "next": self.first(rollout + 1)}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Restore what :meth:`state` returned; None, of older checkpoints: no prompt was replaced."""
        if state is not None:
            self._first = {state["rollout"]: state["first"], state["rollout"] + 1: state["next"]}
