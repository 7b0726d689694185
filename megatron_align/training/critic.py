"""The critic of a run: a second model on the policy's layout, with a value head, an optimizer and a loss of its own.

It is trained on the packs of the policy's steps, right after the policy's gradients are computed, and its values of a
set of rollouts come from the pre-pass that computes their log-probs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_align.hf.export import export_model
from megatron_align.model.head import score_rows
from megatron_align.model.policy import Policy, build_policy
from megatron_align.model.second_model import second_model_config
from megatron_align.objectives.ppo import CriticObjective
from megatron_align.training.critic_start import CriticStart
from megatron_align.training.learning_rate import learning_rate
from megatron_align.training.optimizer import (
    Optimizer,
    build_optimizer,
    gather_parameters,
    set_learning_rate,
    wrap_data_parallel,
)
from megatron_align.training.scoring import Scorer
from megatron_align.training.setup import RunSetup
from megatron_align.training.step import Stepper, StepResult
from megatron_align.training.watchdog import Watchdog
from megatron_align.training.weights import load_critic_weights


class Critic:
    """The critic of a run. Every method is collective.

    Args:
        start: the model that it started from.
        setup: of the run.
        model: this rank's chunks.
        optimizer: of the model.
        groups: process groups of this rank.
        watchdog: of this rank.

    Attributes:
        stepper: runs its steps.
        scorer: computes its values ``[N]``.
    """

    def __init__(
        self,
        start: CriticStart,
        setup: RunSetup,
        model: list[DistributedDataParallel],
        optimizer: Optimizer,
        groups: ProcessGroupCollection,
        watchdog: Watchdog,
    ):
        self.start, self.model, self.optimizer = start, model, optimizer
        self._setup = setup
        objective = CriticObjective(setup.config.objective)
        self.objective = objective
        self.stepper = Stepper(
            model, objective, groups, optimizer, lambda text: watchdog.detail(f"critic: {text}")
        )
        self.scorer = Scorer(model, objective)
        self._lr = 0.0

    @classmethod
    def build(
        cls, setup: RunSetup, groups: ProcessGroupCollection, watchdog: Watchdog, *, resumes: bool
    ) -> Critic | None:
        """Build the critic of a run and load its weights; None: the run has none.

        Args:
            setup: of the run.
            groups: process groups of this rank.
            watchdog: of this rank.
            resumes: its weights are those of a checkpoint, which is loaded next.
        """
        start, config = setup.critic, setup.config
        if start is None:
            return None
        megatron = second_model_config(
            "critic.path", start.shape, setup.shape, setup.megatron, config, trained=True
        )
        chunks = build_policy(megatron, start.shape, groups)
        score_rows(chunks)
        if not resumes:
            load_critic_weights(chunks, start, config.train.seed, groups)
        model = wrap_data_parallel(chunks, config.parallel)
        optimizer = build_optimizer(model, config.critic.optimizer, groups)
        return cls(start, setup, model, optimizer, groups, watchdog)

    @property
    def chunks(self) -> list[Policy]:
        """This rank's model chunks, without their data-parallel wrappers."""
        return [chunk.module for chunk in self.model]

    def begin_step(self, step: int, steps: int) -> None:
        """Set the learning rate of a 1-based step of a run of ``steps``."""
        self._lr = learning_rate(self._setup.config.critic.optimizer, step, steps)
        set_learning_rate(self.optimizer, self._lr)

    def metrics(self, result: StepResult) -> dict[str, Any]:
        """Return the metrics of its step."""
        return {
            **self.objective.finish(result.sums),
            "critic_grad_norm": result.grad_norm,
            "critic_lr": self._lr,
        }

    def export(self, folder: Path, readme: str) -> None:
        """Write it as a Hugging Face folder, a model for sequence classification with one label."""
        gather_parameters(self.model)
        export_model(self.chunks, folder, self._setup.assets, True, self.start.changes, readme)
