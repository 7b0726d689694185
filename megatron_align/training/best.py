"""The best validation of a run by a metric: early stopping, and the checkpoint that is kept.

What is known about earlier validations is read from metrics.jsonl, so a killed run decides as if it had not been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_align.checkpoint.folder import list_steps
from megatron_align.config.validation import EarlyStoppingConfig
from megatron_align.errors import InputError
from megatron_align.model import parallel
from megatron_align.monitoring.logger import RunLog
from megatron_align.monitoring.metrics_file import METRICS
from megatron_align.storage.atomic_write import write_file
from megatron_align.storage.resumable_lines import read_rows
from megatron_align.training.hooks import Hook
from megatron_align.training.trainer import Trainer
from megatron_align.training.validation_tasks import (
    SPLIT,
    ValidationTasks,
    followed_metric,
    lower_is_better,
)

BEST = "best.json"  # in the run's folder: which checkpoint is the best
Mode = Literal["min", "max"]


class History:
    """The values of a metric in the validations of a run, by step.

    Args:
        metric: its name.
        mode: min: lower is better; max: higher is.
    """

    def __init__(self, metric: str, mode: Mode):
        self.metric, self.values = metric, dict[int, float]()
        self._sign = -1.0 if mode == "min" else 1.0

    def read(self, file: Path, until: int) -> None:
        """Take over the validations that an earlier process wrote, up to a step."""
        for row in read_rows(file) if file.is_file() else ():
            if row.get("split") == SPLIT and row["step"] <= until:
                self.add(row["step"], row)

    def add(self, step: int, row: Mapping[str, Any]) -> None:
        """Note the metric of a validation; one that is not finite never is the best."""
        value = row.get(self.metric)
        self.values[step] = -math.inf
        if isinstance(value, (int, float)) and math.isfinite(value):  # metrics.jsonl has null for others
            self.values[step] = self._sign * value

    def best(self, among: Iterable[int] | None = None) -> int | None:
        """Return the step of the best validation, the first of equal ones; None: there is none."""
        steps = sorted(self.values if among is None else self.values.keys() & set(among))
        finite = [step for step in steps if self.values[step] > -math.inf]
        return max(finite, key=lambda step: self.values[step], default=None)

    def value(self, step: int) -> float:
        """Return the metric of a step."""
        return self._sign * self.values[step]

    def without_improvement(self) -> int:
        """Return how many validations came after the best one; all of them if none was finite."""
        best = self.best()
        return sum(best is None or step > best for step in self.values)


class _Tracking(Hook):
    """Follows a metric of the validations.

    Args:
        option: that names the metric.
        metric: its name.
        mode: min: lower is better; max: higher is; None: as ``tasks`` or the metric's description says.
        tasks: whose metrics can be followed too; None: the run has none.
        has_data: whether the objective's metrics can be followed: the run has validation data.
    """

    _history: History

    def __init__(
        self,
        option: str,
        metric: str,
        mode: Mode | None = None,
        tasks: ValidationTasks | None = None,
        has_data: bool = True,
    ):
        self._option, self._metric, self._mode = option, metric, mode
        self._tasks, self._has_data = tasks, has_data

    def start(self, trainer: Trainer) -> None:
        """Check the metric's name, and read the validations of earlier processes."""
        super().start(trainer)
        lower = lower_is_better(trainer.objective, self._has_data, self._tasks)
        self._metric = followed_metric(self._option, self._metric, lower)
        self._history = History(self._metric, self._mode or ("min" if lower[self._metric] else "max"))
        if dist.get_rank() == 0:
            self._history.read(trainer.setup.folder / METRICS, trainer.step)

    def end_step(self, step: int) -> bool:
        """Note the step's validation, if there was one.

        Raises:
            InputError: on every rank: these options or data have no such metric.
        """
        if (row := self.trainer.validated.get(step)) is not None:
            if self._metric not in row:
                raise InputError(
                    f"{self._option}: this run's validation has no {self._metric}; it has {', '.join(row)}"
                )
            # Through JSON, as a resumed run reads it.
            self._history.add(step, json.loads(json.dumps(row)))
        return False


class EarlyStopping(_Tracking):
    """Makes this step the run's last one once the metric has not improved for ``patience`` validations."""

    def __init__(
        self,
        log: RunLog,
        config: EarlyStoppingConfig,
        tasks: ValidationTasks | None = None,
        has_data: bool = True,
    ):
        super().__init__("train.early_stopping.metric", config.metric, config.mode, tasks, has_data)
        self._log, self._patience = log, config.patience

    def start(self, trainer: Trainer) -> None:
        """See :class:`_Tracking`; a run that was killed after its last step makes none."""
        super().start(trainer)
        self._stop_if_due(trainer.step)

    def end_step(self, step: int) -> bool:
        """See :class:`_Tracking`."""
        super().end_step(step)
        if step in self.trainer.validated:
            self._stop_if_due(step)
        return False

    def _stop_if_due(self, step: int) -> None:
        """Decide on rank 0, for all ranks. Collective."""
        history = self._history
        due = dist.get_rank() == 0 and history.without_improvement() >= self._patience
        [stops] = parallel.all_reduce_sum([float(due)])
        if not stops or step >= self.trainer.steps:
            return
        best = history.best() if dist.get_rank() == 0 else None
        found = "it was never finite" if best is None else f"{history.value(best):.6g} at step {best}"
        self._log.message(
            f"early stopping after step {step}: validation {history.metric} did not improve in {self._patience} "
            f"validations, the best is {found}"
        )
        self.trainer.steps = step  # the last one: the run ends as a complete run does


class KeepBest(_Tracking):
    """Has the best validation's checkpoint saved and kept, and names it in best.json."""

    def __init__(self, log: RunLog, metric: str, tasks: ValidationTasks | None = None, has_data: bool = True):
        super().__init__("checkpoint.keep_best", metric, None, tasks, has_data)
        self._log = log
        self.is_due = False  # the last step is the best so far: Checkpointing saves it

    def end_step(self, step: int) -> bool:
        """See :class:`_Tracking`."""
        super().end_step(step)
        best = dist.get_rank() == 0 and step in self.trainer.validated and self._history.best() == step
        [due] = parallel.all_reduce_sum([float(best)])
        self.is_due = due > 0
        return False

    def kept(self) -> int | None:
        """Return the best step among those that have a checkpoint; call it on rank 0."""
        return self._history.best(dict(list_steps(self.trainer.setup.folder)))

    def write(self) -> None:
        """Name the best checkpoint in best.json; call it on rank 0. A full disk is a warning."""
        folder = self.trainer.setup.folder
        steps = dict(list_steps(folder))
        best = self._history.best(steps)
        if best is None:
            return
        found = {"step": best, "metric": self._history.metric, "value": self._history.value(best)}
        try:
            write_file(folder / BEST, json.dumps({**found, "checkpoint": steps[best].name}) + "\n")
        except OSError as error:
            self._log.message(
                f"warning: {BEST} could not be written: {error.strerror}; the checkpoint of step {best} is kept"
            )

    def finish(self) -> None:
        """Say which checkpoint is the best."""
        best = self._history.best() if dist.get_rank() == 0 else None
        if best is not None:
            shown = f"validation {self._history.metric} {self._history.value(best):.6g}"
            self._log.message(f"the best checkpoint is of step {best} ({shown})")
