"""Is the run healthy? Numbers that are not finite, losses and gradient norms far above those of the last steps.

Every rank sees the same reduced numbers and keeps the same history, so all of them decide alike without asking.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

from megatron_align.errors import TrainingFault

WINDOW = 64  # healthy steps that a new one is compared with
AT_LEAST = 16  # of them before anything is called an outlier
DEVIATIONS = 8.0  # above the median, in standard deviations estimated from the median absolute deviation
LEAST_RISE = 0.05  # of the median: a curve without noise would make an outlier of any change
IN_A_ROW = 10  # steps without finite numbers, after which skipping does not help
_TO_DEVIATION = 1.4826  # times the median absolute deviation: the standard deviation of normal noise

COUNTS = ("skipped_steps", "loss_spikes", "grad_norm_outliers")


class Health:
    """Counts a run's troubles.

    Args:
        on_nonfinite: ``train.on_nonfinite``: stop, or go on without the step's update.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"]):
        self._skips = on_nonfinite == "skip"
        self._history = {name: deque[float](maxlen=WINDOW) for name in ("loss", "grad_norm")}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._in_a_row = 0

    @property
    def counts(self) -> dict[str, int]:
        """How often each trouble was met since the run began: metrics of every row."""
        return dict(self._counts)

    def judge(self, loss: float, grad_norm: float) -> list[str]:
        """Take in a step's numbers; return what is wrong with them, in words, or nothing."""
        seen = {"loss": loss, "grad_norm": grad_norm}
        if not all(map(math.isfinite, seen.values())):
            self._in_a_row += 1
            self._counts["skipped_steps"] += self._skips
            return [f"loss {loss}, gradient norm {grad_norm}"]
        self._in_a_row = 0
        troubles = []
        for (name, value), count in zip(seen.items(), COUNTS[1:], strict=True):
            history = self._history[name]
            if len(history) >= AT_LEAST and value > (limit := outlier_limit(history)):
                self._counts[count] += 1
                troubles.append(
                    f"{name} {value:.4g} is far above the {median(history):.4g} of the last {len(history)} "
                    f"healthy steps (limit {limit:.4g})"
                )
            else:
                history.append(value)
        return troubles

    def require_going_on(self, step: int, troubles: list[str], suspects: str) -> None:
        """Stop the run if its policy, or too many skipped steps in a row, ask for it.

        Raises:
            TrainingFault: saying what was found at ``step``, and in which samples.
        """
        if self._in_a_row and not self._skips:
            raise TrainingFault(
                f"training needs finite numbers, got {troubles[0]} at step {step}; {suspects}. Weights and "
                "optimizer are as before the step (train.on_nonfinite: skip would go on without it)"
            )
        if self._in_a_row >= IN_A_ROW:
            raise TrainingFault(
                f"skipping must help, got {IN_A_ROW} steps in a row without finite numbers, the last is step "
                f"{step}: {troubles[0]}; {suspects}"
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on."""
        return {
            "counts": self.counts,
            "in_a_row": self._in_a_row,
            "history": {name: list(values) for name, values in self._history.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        self._counts.update(state["counts"])
        self._in_a_row = state["in_a_row"]
        for name, values in state["history"].items():
            self._history[name].extend(values)


def outlier_limit(history: deque[float]) -> float:
    """Return the value above which a number does not belong to those before it.

    The median and the median absolute deviation, unlike mean and variance, are not moved by outliers.
    """
    middle = median(history)
    deviation = _TO_DEVIATION * median(abs(value - middle) for value in history)
    return middle + max(DEVIATIONS * deviation, LEAST_RISE * abs(middle))
