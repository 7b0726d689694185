"""Health of a run: non-finite losses or gradient norms, and outliers far above those of recent steps.

Every rank sees the same reduced numbers and keeps the same history, so all ranks decide identically without
communication.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

from megatron_align.errors import TrainingFault

WINDOW = 64  # healthy steps that a new step is compared with
MIN_HISTORY = 16  # healthy steps before anything is called an outlier
# above the median; the standard deviation is estimated from the median absolute deviation
OUTLIER_DEVIATIONS = 8.0
MIN_RELATIVE_RISE = 0.05  # above the median: on a curve without noise any change would be an outlier
MAX_CONSECUTIVE_NONFINITE = 10  # steps after which skipping has not helped
_DEVIATION_PER_MAD = 1.4826  # standard deviation over median absolute deviation, for normal noise

COUNTS = ("skipped_steps", "loss_spikes", "grad_norm_outliers")


class Health:
    """Counts skipped steps and outliers of a run, and decides when it must stop.

    Args:
        on_nonfinite: ``train.on_nonfinite``: stop the run, or skip the step's update.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip"]):
        self._skips = on_nonfinite == "skip"
        self._history = {name: deque[float](maxlen=WINDOW) for name in ("loss", "grad_norm")}
        self._counts = dict.fromkeys(COUNTS, 0)
        self._consecutive = 0

    @property
    def counts(self) -> dict[str, int]:
        """Skipped steps and outliers since the run began; they are metrics of every row."""
        return dict(self._counts)

    def record(self, loss: float, grad_norm: float, further: Mapping[str, float] | None = None) -> list[str]:
        """Record a step's loss and gradient norm; return one message for each problem, none for a healthy step.

        Args:
            loss: of the step.
            grad_norm: of the step.
            further: numbers by name that must be finite too.
        """
        seen, further = {"loss": loss, "grad_norm": grad_norm}, further or {}
        if not all(map(math.isfinite, (*seen.values(), *further.values()))):
            self._consecutive += 1
            self._counts["skipped_steps"] += self._skips
            more = "".join(f", {name} {value}" for name, value in further.items())
            return [f"loss {loss}, gradient norm {grad_norm}{more}"]
        self._consecutive = 0
        problems = []
        for (name, value), count in zip(seen.items(), COUNTS[1:], strict=True):
            history = self._history[name]
            if len(history) >= MIN_HISTORY and value > (limit := outlier_limit(history)):
                self._counts[count] += 1
                problems.append(
                    f"{name} {value:.4g} is far above the {median(history):.4g} of the last {len(history)} "
                    f"healthy steps (limit {limit:.4g})"
                )
            else:
                history.append(value)
        return problems

    def require_can_continue(self, step: int, problems: list[str], suspects: str) -> None:
        """Stop the run at a non-finite step (``on_nonfinite: stop``), or after too many consecutive ones.

        Raises:
            TrainingFault: naming the problem at ``step`` and the samples that cause it.
        """
        if self._consecutive and not self._skips:
            raise TrainingFault(
                f"non-finite numbers at step {step}: {problems[0]}; {suspects}. Weights and optimizer are as before "
                "the step; train.on_nonfinite: skip would continue without it"
            )
        if self._consecutive >= MAX_CONSECUTIVE_NONFINITE:
            raise TrainingFault(
                f"{MAX_CONSECUTIVE_NONFINITE} consecutive non-finite steps, stopping at step {step}: {problems[0]}; "
                f"{suspects}"
            )

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {
            "counts": self.counts,
            "in_a_row": self._consecutive,
            "history": {name: list(values) for name, values in self._history.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._counts.update(state["counts"])
        self._consecutive = state["in_a_row"]
        for name, values in state["history"].items():
            self._history[name].extend(values)


def outlier_limit(history: deque[float]) -> float:
    """Return the value above which a number is an outlier among ``history``.

    The median and the median absolute deviation, unlike mean and variance, are not moved by outliers.
    """
    middle = median(history)
    deviation = _DEVIATION_PER_MAD * median(abs(value - middle) for value in history)
    return middle + max(OUTLIER_DEVIATIONS * deviation, MIN_RELATIVE_RISE * abs(middle))
