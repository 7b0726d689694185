"""Which prompts make each step where one set of rollouts serves several steps.

Shapes: G prompts of one set of rollouts, B of one step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_align.config import RunConfig, TrainConfig
from megatron_align.data.batching.sampler import SampleSteps, StepOrder, step_order
from megatron_align.data.sample_table import SampleTable
from megatron_align.errors import require


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a step among the steps of its rollouts; all count from 0."""

    rollout: int
    iteration: int
    minibatch: int


class RolloutOrder:
    """Steps on sets of rollouts: each of ``iterations`` passes trains on ``minibatches`` parts, one after the other.

    Args:
        rollouts: the prompts of each set, as steps.
        minibatches: parts of a set, in the order of its prompts, of equal size if it divides.
        iterations: passes over a set.
        steps: of the run; None: those of all sets.

    Raises:
        InputError: the last set of an epoch has fewer prompts than minibatches.
    """

    def __init__(
        self, rollouts: SampleSteps, minibatches: int = 1, iterations: int = 1, steps: int | None = None
    ):
        self.rollouts, self.minibatches, self.iterations = rollouts, minibatches, iterations
        self.steps_of_rollouts = minibatches * iterations
        self._steps = steps or rollouts.steps * self.steps_of_rollouts
        last = rollouts.size(rollouts.steps - 1)
        require(
            last >= minibatches,
            f"objective.minibatches must be at most the {last} prompts of the last rollouts of train.epochs, got "
            f"{minibatches}",
        )

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        return self._steps

    def place(self, step: int) -> Place:
        """Return where a 0-based step is."""
        rollout, within = divmod(step, self.steps_of_rollouts)
        return Place(rollout, *divmod(within, self.minibatches))

    def prompts(self, rollout: int) -> np.ndarray:
        """Return the indices (int64[G]) of the prompts of a set of rollouts."""
        return self.rollouts.samples(rollout)

    def stream(self, begin: int, end: int) -> np.ndarray:
        """Return prompts (int64) of the endless stream of epochs, from place ``begin`` up to ``end``."""
        return self.rollouts.order.between(begin, end)

    def minibatch_of(self, rollout: int) -> np.ndarray:
        """Return the minibatch (int64[G]) of each prompt of a set."""
        parts = np.array_split(np.arange(self.rollouts.size(rollout)), self.minibatches)
        return np.repeat(np.arange(self.minibatches), [len(part) for part in parts])

    def samples(self, step: int) -> np.ndarray:
        """Return the indices (int64[B]) of the prompts of a 0-based step."""
        place = self.place(step)
        return self.prompts(place.rollout)[self.minibatch_of(place.rollout) == place.minibatch]

    def size(self, step: int) -> int:
        """Return the number of prompts of a 0-based step."""
        place = self.place(step)
        return int((self.minibatch_of(place.rollout) == place.minibatch).sum())


def train_order(table: SampleTable, config: RunConfig) -> StepOrder:
    """Return which samples of a table make each training step of a run; the same on any layout.

    Args:
        table: training data.
        config: of the run.
    """
    sets = rollout_order(table, config)
    return sets or step_order(table, config.data, config.train, config.data.train)


def rollout_order(table: SampleTable, config: RunConfig) -> RolloutOrder | None:
    """Return the steps of a run on rollouts; None: its objective trains on given data.

    Raises:
        InputError: as :class:`RolloutOrder`.
    """
    minibatches = getattr(config.objective, "minibatches", None)
    if minibatches is None:
        return None
    train, iterations = config.train, config.objective.iterations
    rollouts = step_order(table, config.data, _sets(config, minibatches * iterations), config.data.train)
    assert isinstance(rollouts, SampleSteps), "a set of rollouts is a number of prompts"
    return RolloutOrder(rollouts, minibatches, iterations, train.steps)


def _sets(config: RunConfig, steps_of_rollouts: int) -> TrainConfig:
    """Return the section ``train`` whose steps are sets of rollouts."""
    steps = config.train.steps
    return replace(
        config.train,
        global_batch_size=config.rollout.prompts,
        steps=None if steps is None else -(-steps // steps_of_rollouts),
    )
