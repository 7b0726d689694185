"""The interface between a run and its ``validation.tasks``: evaluations are on a floor above, and provide it.

``megatron_align.validation_tasks``, an entry point of the package, prepares them: a run without tasks imports no
evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_align.errors import nearest, require
from megatron_align.model.policy import Policy
from megatron_align.objectives.base import Objective
from megatron_align.rollout.engine import Engine
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.training.watchdog import Watchdog

SPLIT = "validation"


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The results of all tasks at a step, on every rank.

    Args:
        metrics: ``TASK/METRIC`` with its value; NaN for a task that could not be finished.
        warnings: one line each: what could not be finished or written.
    """

    metrics: dict[str, float]
    warnings: list[str]


class TrainedModel(Protocol):
    """The model that is trained, as tasks use it: the trainer."""

    step: int
    groups: ProcessGroupCollection
    watchdog: Watchdog

    @property
    def chunks(self) -> list[Policy]:
        """This rank's model chunks, their weights gathered."""
        ...

    def live_engine(self) -> TransformersEngine:
        """Build a generation engine of the model, on this rank."""
        ...

    def update_engine(self, engine: Engine | None) -> None:
        """Give the ranks' engines the current weights. Collective."""
        ...


class ValidationTasks(Protocol):
    """The tasks of a run, checked and with their data."""

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """Of each ``TASK/METRIC`` that is better in one direction."""
        ...

    def start(self, model: TrainedModel) -> None:
        """Compute once what does not change with training, such as scores of references. Collective."""
        ...

    def run(self, model: TrainedModel) -> TaskReport:
        """Run all tasks with the current weights, and write their results. Collective.

        Raises:
            TrainingFault: on every rank: a task failed for another reason than a server that does not answer.
        """
        ...


def lower_is_better(
    objective: Objective | type[Objective], has_data: bool, tasks: ValidationTasks | None
) -> dict[str, bool]:
    """Return the metrics of a run's validations that can be followed, and whether lower values are better.

    Args:
        objective: of the run.
        has_data: whether the run has validation data.
        tasks: of the run; None: it has none.
    """
    lower: dict[str, bool] = {}
    if has_data:
        lower |= {metric.name: metric.lower_is_better for metric in objective.metrics if metric.curve}
        lower["loss"] = True
    if tasks is not None:
        lower |= {name: not higher for name, higher in tasks.higher_is_better.items()}
    return lower


def followed_metric(option: str, metric: str, lower: Mapping[str, Any]) -> str:
    """Return the key of a metric in the rows of validations; ``validation/`` may come before it.

    Args:
        option: that names the metric.
        metric: as it is given.
        lower: from :func:`lower_is_better`.

    Raises:
        InputError: there is no such metric.
    """
    name = metric.removeprefix(f"{SPLIT}/")
    require(
        name in lower,
        f"{option} must name a metric of the validation ({', '.join(sorted(lower))}), got '{name}'"
        f"{nearest(name, list(lower))}",
    )
    return name
