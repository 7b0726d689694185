"""The trainer: policy, optimizer, objective and reference of a run on this rank, and the operations on them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_align.checkpoint.card import make_checkpoint_metadata, metadata_of_critic
from megatron_align.checkpoint.folder import clean_up_after_kill, step_folder
from megatron_align.checkpoint.load import load_checkpoint, load_critic
from megatron_align.checkpoint.save_plan import SavedCritic
from megatron_align.checkpoint.saver import CheckpointContent, Saved, Saver
from megatron_align.config import RunConfig, to_dict
from megatron_align.data.batching.prefetch import Prefetcher
from megatron_align.data.batching.sampler import passes_per_epoch
from megatron_align.data.batching.step_batches import Step, StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.hf.adapter import export_adapter
from megatron_align.hf.export import export_model
from megatron_align.hf.hub import is_hub_name
from megatron_align.hf.model_card import model_card
from megatron_align.model import parallel
from megatron_align.model.head import set_temperature
from megatron_align.model.lora import reduce_bases
from megatron_align.model.policy import Policy, build_policy
from megatron_align.monitoring.health import Health
from megatron_align.monitoring.metrics_file import METRICS, last_rows
from megatron_align.objectives.base import Objective
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.objectives.registry import build_objective
from megatron_align.records import PackedBatch
from megatron_align.rollout.engine import Engine
from megatron_align.rollout.live_weights import live_engine, update_engine
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.training.adapter import AdapterBase, adapter_base
from megatron_align.training.batches import batches_of_split, pin_step
from megatron_align.training.critic import Critic
from megatron_align.training.finished import remove_finished_marker
from megatron_align.training.learning_rate import learning_rate
from megatron_align.training.online import RolloutSteps
from megatron_align.training.optimizer import (
    Optimizer,
    build_optimizer,
    gather_parameters,
    set_learning_rate,
    set_updates,
    wrap_data_parallel,
)
from megatron_align.training.prepass import PrePass
from megatron_align.training.ptx import PTXSteps
from megatron_align.training.reference.builder import ReferenceBuilder, References
from megatron_align.training.resume import ResumePoint, verified_resume_point
from megatron_align.training.run_context import joined_ranks, prepared_run
from megatron_align.training.scoring import Scorer
from megatron_align.training.setup import RunSetup
from megatron_align.training.step import ExtraLoss, Stepper, StepResult
from megatron_align.training.stop import remove_requeue_marker
from megatron_align.training.validation_tasks import TaskReport
from megatron_align.training.watchdog import Watchdog
from megatron_align.training.weights import load_model_weights, load_start_weights, require_finite_weights


@dataclass(slots=True, kw_only=True)
class StepReport:
    """Result of a training step.

    Args:
        step: 1-based.
        data: the step's samples and packs.
        batches: its micro-batches on this rank, as they were trained on.
        result: global sums, gradient norm, and whether weights were updated.
        metrics: the objective's metrics, ``loss`` first; global.
        lr: learning rate of the update.
        seconds: duration, from :meth:`Trainer.begin_step` on, without time spent in ``before_update``.
        columns: further columns of the step's row, from hooks.
    """

    step: int
    data: Step
    batches: list[PackedBatch]
    result: StepResult
    metrics: dict[str, Any]
    lr: float
    seconds: float
    columns: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Trains one model. ``Trainer.open(config)`` builds it; ``training.loop.fit`` runs all steps with hooks.

    Every method is collective: all ranks call it, in the same order.

    Args:
        setup: the checked run.
        watchdog: of this rank.
        objective: what is optimised.
        model: this rank's chunks.
        optimizer: of the model.
        references: what the objective compares the policy with.

    Attributes:
        groups: process groups of this rank.
        train_batches: the steps of the training data.
        step: training steps made so far, over all starts of the run.
        steps: training steps of the complete run; early stopping lowers it.
        base: what an adapter is trained on; None: the run trains the model's weights.
        resumed: the checkpoint that the run resumed from; None: it started at step 1.
        health: non-finite steps and outliers; part of every checkpoint.
        ptx: the supervised part of each step (``objective.ptx``); None: there is none.
        critic: trained in the same steps; None: the objective has none.
        validated: the metrics of the newest validation that this process made, by its step.
        interrupted: Ctrl-C stopped the run, after it saved.
    """

    def __init__(
        self,
        setup: RunSetup,
        watchdog: Watchdog,
        objective: Objective,
        model: list[DistributedDataParallel],
        optimizer: Optimizer,
        references: References,
    ):
        self.setup, self.config, self.watchdog = setup, setup.config, watchdog
        self.groups = groups = parallel.groups()
        self.objective, self.model, self.optimizer = objective, model, optimizer
        self.references = references
        self.base: AdapterBase | None = None
        self.health = Health(self.config.train.on_nonfinite)
        self.stepper = Stepper(model, objective, groups, optimizer, watchdog.detail)
        self.train_batches = self.batches_of("train")
        self.step, self.steps = 0, self.train_batches.steps
        self.resumed: ResumePoint | None = None
        self.validated: dict[int, dict[str, Any]] = {}
        self.interrupted = False
        self._prepass = self._prepass_of("train")
        self.ptx: PTXSteps | None = None
        self.critic: Critic | None = None
        self._rollouts: RolloutSteps | None = None
        if isinstance(objective, PolicyGradientObjective):
            self._rollouts = RolloutSteps(self, objective)
        self._began: float | None = None
        self._refusal: str | None = None

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig) -> Iterator[Trainer]:
        """Check a run, tokenise its data, join the ranks and build the trainer; leave the ranks after the with-block.

        Under ``torchrun`` every process calls this; alone, one process is the only rank.

        Raises:
            InputError: for anything that the user can correct.
        """
        with (
            prepared_run(config, parallel.RankInfo.from_environment()) as setup,
            joined_ranks(setup) as watchdog,
        ):
            yield cls.build(setup, watchdog)

    @classmethod
    def build(cls, setup: RunSetup, watchdog: Watchdog) -> Trainer:
        """Build and load everything, once the ranks have met; resume from the run's newest intact checkpoint."""
        config, groups = setup.config, parallel.groups()
        _clean_run_folder(setup)
        parallel.require_agreement(
            {
                "data.train": setup.train.path.name,
                "data.validation": setup.validation and setup.validation.path.name,
            },
            "the data must be the same for all ranks",
        )
        with watchdog.patient("reading the checkpoint"):
            resume = verified_resume_point(
                config, setup.folder, setup.shape, setup.data_key, setup.assets, setup.steps
            )
        objective = build_objective(
            config.objective, setup.train if isinstance(setup.train, TokenStore) else None
        )
        temperature = 1.0
        if isinstance(objective, PolicyGradientObjective):
            objective.rollout, temperature = config.rollout, config.rollout.temperature
        reference = ReferenceBuilder(setup, objective, groups, watchdog)
        reference_hash = reference.frozen_weights_hash(resume)
        with watchdog.patient("hashing the adapter's base"):
            base = adapter_base(setup, resume, reference_hash)
        batches_of = partial(batches_of_split, setup=setup, objective=objective, groups=groups)
        columns = reference.cached_columns(batches_of, reference_hash, resume.step if resume else 0)
        ptx = None
        if setup.ptx is not None:
            ptx = PTXSteps(setup, config.objective.ptx, groups)
            ptx.read_reference(reference_hash, watchdog, resume.step if resume else 0)
        chunks = build_policy(setup.megatron, setup.shape, groups, setup.adapter, setup.frozen)
        set_temperature(chunks, temperature)
        with watchdog.patient("loading weights"):
            if resume is None or setup.adapter is not None:  # an adapter's checkpoint holds no base
                load_start_weights(chunks, setup, groups, resumes=resume is not None)
            model = wrap_data_parallel(chunks, config.parallel)
            optimizer = build_optimizer(model, config.optimizer, groups)
            live = reference.live_model(model)
            if live is not None:
                set_temperature(live.scorer.chunks, temperature)
            references = References(
                mode=reference.mode,
                columns=columns,
                live=live,
                sync_steps=config.reference.sync_steps,
                mixup_alpha=config.reference.mixup_alpha,
                weights_hash=reference_hash,
            )
            trainer = cls(setup, watchdog, objective, model, optimizer, references)
            trainer.base, trainer.ptx = base, ptx
            trainer.critic = Critic.build(setup, groups, watchdog, resumes=resume is not None)
            if trainer.critic is not None:
                trainer.critic.stepper.clock = trainer.stepper.clock
            if resume is not None:
                trainer.resume(resume)
        return trainer

    @property
    def chunks(self) -> list[Policy]:
        """This rank's model chunks, without their data-parallel wrappers."""
        return [chunk.module for chunk in self.model]

    def batches_of(self, split: str) -> StepBatches:
        """Return the steps of ``train`` or ``validation``, with the reference's cached columns where there are any."""
        column = self.references.columns.get(split)
        add = column.added_to if column else None
        return batches_of_split(split, self.setup, self.objective, self.groups, add)

    @contextmanager
    def prefetched(self) -> Iterator[Iterator[Step]]:
        """Give the data of the remaining training steps inside a with-block.

        They are made in a background thread; rollouts, which need the policy of their step, when they are taken.
        """
        if self._rollouts is not None:
            with closing(self._rollouts):
                yield self._rollouts.steps(self.step, self.steps)
            return
        make = self.train_batches.step
        with Prefetcher(range(self.step, self.steps), lambda step: pin_step(make(step))) as steps:
            yield steps

    def begin_step(self, timed: bool = False) -> None:
        """Start the next step's clock, before its data are waited for; ``timed`` measures its phases too."""
        self._began = time.perf_counter()
        self.watchdog.report(f"step {self.step + 1}")
        self.stepper.clock.start(timed)
        self.watchdog.detail("data")

    def train_step(self, data: Step, before_update: Callable[[], None] = lambda: None) -> StepReport:
        """Make one update with a step's data; an update with non-finite numbers is left out.

        Args:
            data: the step's samples, from :meth:`prefetched` or :attr:`train_batches`.
            before_update: called when gradients are computed and nothing has been updated yet.
        """
        if self._began is None:
            self.begin_step()
        began, self._began = self._began, None
        assert began is not None, "begin_step sets it"
        self.step += 1
        lr = learning_rate(self.config.optimizer, self.step, self.steps)
        set_learning_rate(self.optimizer, lr)
        self.stepper.clock.mark("data")
        state = self.objective.state()
        self.watchdog.detail("reference and statistics")
        batches = self._prepass.batches(data, training=True)
        extra = None
        if self.ptx is not None:
            extra = ExtraLoss(self.ptx.objective, self.ptx.batches(self.step - 1))
        critic = None
        if self.critic is not None:
            self.critic.begin_step(self.step, self.steps)
            critic = self.critic.stepper
        result = self.stepper.train(batches, before_update, extra, critic)
        if not result.updated:
            self.objective.load_state(state)
        if self.references.is_synced_after(self.step):
            gather_parameters(self.model)
            self.references.sync(self.chunks)
        metrics = self.objective.finish(result.sums)
        if self.critic is not None and result.critic is not None:
            metrics |= self.critic.metrics(result.critic)
        if self._rollouts is not None:
            self._rollouts.require_match(self.step, metrics)
        return StepReport(
            step=self.step,
            data=data,
            batches=batches,
            result=result,
            metrics=metrics,
            lr=lr,
            seconds=time.perf_counter() - began - result.paused_seconds,
        )

    def evaluate(self, split: str = "validation") -> dict[str, Any]:
        """Return the objective's metrics over all samples of a split, weighted as in training."""
        batches, prepass = self.batches_of(split), self._prepass_of(split)
        totals: dict[str, float] = {}
        weight_sum = 0.0
        with Prefetcher(range(batches.steps), lambda step: pin_step(batches.step(step))) as steps:
            for data in steps:
                self.watchdog.report(f"{split} batch {data.number + 1}")
                weight_sum += data.counts.weight
                result = self.stepper.evaluate(prepass.batches(data, training=False))
                for name, value in result.sums.items():
                    totals[name] = totals.get(name, 0.0) + value * data.counts.weight
        return self.objective.finish({name: value / weight_sum for name, value in totals.items()})

    def run_tasks(self) -> TaskReport:
        """Run ``validation.tasks`` with the current weights; results are in ``checkpoint.dir/validation/step_NNNNNN``.

        Raises:
            TrainingFault: on every rank: a task failed.
        """
        if self.setup.tasks is None:
            return TaskReport({}, [])
        gather_parameters(self.model)
        return self.setup.tasks.run(self)

    def load(self, path: str) -> None:
        """Load the weights of a Hugging Face folder or a checkpoint into the policy, and into the fp32 masters.

        Raises:
            InputError: the weights are incomplete, corrupt, or of another shape.
        """
        with self.watchdog.patient(f"loading {path}"):
            gather_parameters(self.model)
            load_model_weights(self.chunks, path, self.setup, self.groups)
            reduce_bases(self.chunks)
            self.optimizer.reload_model_params()

    def resume(self, point: ResumePoint) -> None:
        """Load weights, optimizer, reference and the states of objective and health from a checkpoint of this run.

        The state of another objective or reference, which ``checkpoint.resume_allow`` accepted, is left out.
        """
        saved = point.metadata["config"]
        reference = self.references.synced_chunks() if saved["reference"].get("sync_steps") else None
        load_checkpoint(point.folder, self.model, self.optimizer, reference)
        if self.critic is not None:
            load_critic(point.folder, self.critic.model, self.critic.optimizer)
            require_finite_weights(self.critic.chunks, point.folder)
        reduce_bases(self.chunks)
        require_finite_weights(self.chunks, point.folder)
        if "health_state" in point.metadata:  # older checkpoints have none
            self.health.load_state(point.metadata["health_state"])
        if saved["objective"]["name"] == self.config.objective.name:
            self.objective.load_state(point.metadata["objective_state"])
        if self._rollouts is not None:
            self._rollouts.load_state(point.metadata)
        self.step, self.resumed = point.step, point
        updates = self.step - self.health.counts["skipped_steps"]
        for optimizer in (self.optimizer, *([self.critic.optimizer] if self.critic else [])):
            set_updates(optimizer, updates)

    def save(self) -> Saved:
        """Write ``checkpoint.dir/step_NNNNNN`` and wait until it is complete.

        Raises:
            SaveFailed: on every rank, if any of them could not write its part.
            TrainingFault: on every rank, if another process took the run's folder.
        """
        saver = Saver(taken_by=self.setup.taken_by)
        with self.watchdog.patient(f"saving step {self.step}"):
            self.begin_save(saver)
            return saver.finish()

    def begin_save(self, saver: Saver) -> None:
        """Hand the state after the current step to ``saver``, which may write it in the background."""
        if self._rollouts is not None:
            self._rollouts.settle()
        metadata = self._metadata()
        target = step_folder(self.setup.folder, self.step)
        gather_parameters(self.model)
        critic = None
        if self.critic is not None:
            gather_parameters(self.critic.model)
            critic = SavedCritic(self.critic.model, self.critic.optimizer)
        content = CheckpointContent(
            model=self.model,
            optimizer=self.optimizer,
            metadata=metadata,
            assets=self.setup.assets,
            reference=self.references.synced_chunks(),
            critic=critic,
            changes=self.setup.changes,
        )
        saver.begin(target, content)

    def export(self, folder: Path | str) -> None:
        """Write the model as a Hugging Face folder, an adapter merged; one that exists is replaced at the end."""
        self.setup.require_folder()
        with self.watchdog.patient("export"):
            gather_parameters(self.model)
            card = model_card(self._metadata(), last_rows(self.setup.folder / METRICS, self.step))
            export_model(self.chunks, Path(folder), self.setup.assets, True, self.setup.changes, card)

    def live_engine(self) -> TransformersEngine:
        """Build a transformers engine of the model, on this rank; :meth:`update_engine` gives it weights."""
        return live_engine(self.chunks, self.setup.assets, self.setup.changes)

    def update_engine(self, engine: Engine | None) -> None:
        """Give the ranks' generation engines the current weights; their version is the step.

        Of an adapter they receive A and B alone; where one cannot load it, merged weights, and a line says why.

        Args:
            engine: of this rank; None: it has none.

        Raises:
            InputError: on every rank: an engine could not take the weights.
        """
        with self.watchdog.patient("giving the engine new weights"):
            gather_parameters(self.model)
            refusal = update_engine(engine, self.chunks, self.step)
        if refusal is not None and refusal != self._refusal and dist.get_rank() == 0:
            print(f"the engine receives merged weights, not the adapter alone: {refusal}", flush=True)
        self._refusal = refusal

    def export_adapter(self, folder: Path | str) -> None:
        """Write the adapter as a PEFT folder; one that exists is replaced at the end."""
        assert self.base is not None, "the run trains an adapter"
        self.setup.require_folder()
        with self.watchdog.patient("export"):
            gather_parameters(self.model)
            export_adapter(self.chunks, Path(folder), self.base.base, self.base.weights)

    def export_critic(self, folder: Path | str) -> None:
        """Write the critic as a Hugging Face folder of a reward model; one that exists is replaced at the end."""
        assert self.critic is not None, "the run trains a critic"
        self.setup.require_folder()
        with self.watchdog.patient("export of the critic"):
            metadata = metadata_of_critic(self._metadata())
            card = model_card(metadata, last_rows(self.setup.folder / METRICS, self.step))
            self.critic.export(Path(folder), card)

    def _prepass_of(self, split: str) -> PrePass:
        reference = self.references.of_split(split)
        return PrePass(Scorer(self.model, self.objective), self.objective, self.groups, reference)

    def _metadata(self) -> dict[str, Any]:
        return make_checkpoint_metadata(
            self.step,
            self.setup.shape,
            self.setup.megatron.params_dtype,
            world_size=self.setup.rank_info.world_size,
            config=to_dict(self.config),
            hub_models=_hub_models(self.config),
            steps=self.train_batches.steps,  # as planned: the schedule's
            data=self._data_metadata(),
            reference_weights=self.references.weights_hash,
            objective_state=self.objective.state(),
            health_state=self.health.state(),
            **self._adapter_metadata(),
            **({"critic": self.critic.start.metadata()} if self.critic else {}),
            **(self._rollouts.state() if self._rollouts else {}),
        )

    def _adapter_metadata(self) -> dict[str, Any]:
        if self.base is None or (adapter := self.setup.adapter) is None:
            return {}
        names = ("rank", "alpha", "rslora", "dropout", "dora", "init")
        options = {name: getattr(adapter, name) for name in names}
        return {"adapter": {**dataclasses.asdict(self.base), **options}}

    def _data_metadata(self) -> Mapping[str, Any]:
        return {
            "key": self.setup.train.path.name,
            "passes_per_epoch": list(passes_per_epoch(self.config.data.train)),
            **self.setup.train.manifest,
        }


def _hub_models(config: RunConfig) -> list[str]:
    """Return which models of a run are names on the hub: a path may look like one."""
    paths = (config.model.path, config.reference.path, config.critic.path)
    return [path for path in paths if path and is_hub_name(path)]


def _clean_run_folder(setup: RunSetup) -> None:
    """Remove what a killed run left unfinished, and the markers of how it ended: this run continues it."""
    setup.require_folder()
    if dist.get_rank() == 0:
        clean_up_after_kill(setup.folder)
        remove_requeue_marker(setup.folder)
        remove_finished_marker(setup.folder)
    dist.barrier()
