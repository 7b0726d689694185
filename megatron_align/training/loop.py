"""A run from a checked plan to the exported model: load, train, validate, save, export."""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.distributed as dist
import yaml

from megatron_align import faults
from megatron_align.checkpoint import folder as sharded
from megatron_align.checkpoint.saver import Saver
from megatron_align.config import RunConfig, TrainConfig, to_dict
from megatron_align.data.batching.context_parts import ContextShare
from megatron_align.data.batching.prefetch import Prefetcher
from megatron_align.data.batching.sampler import passes_per_epoch
from megatron_align.data.batching.step_batches import Share, Step, StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.errors import TrainingFault
from megatron_align.hf.export import export_model
from megatron_align.hf.load import load_weights
from megatron_align.model import parallel
from megatron_align.model.context_kind import kind_of
from megatron_align.model.policy import Policy, build_policy
from megatron_align.monitoring import flight_recorder
from megatron_align.monitoring.health import Health
from megatron_align.monitoring.logger import NoSinks, Sinks
from megatron_align.monitoring.memory import explaining_out_of_memory, peak_memory_gb
from megatron_align.monitoring.mfu import Utilisation
from megatron_align.monitoring.profiling import Tracer
from megatron_align.monitoring.timing import timing_row
from megatron_align.objectives.registry import build_objective
from megatron_align.records import PackedBatch
from megatron_align.training import self_check
from megatron_align.training.checkpointing import Saves
from megatron_align.training.optimizer import (
    build_optimizer,
    gather_parameters,
    set_learning_rate,
    set_updates,
    wrap_data_parallel,
)
from megatron_align.training.prepass import Live, PrePass, Reference, Scorer, ZeroReference
from megatron_align.training.reference_cache import ReferenceColumns, hash_of_rank_0
from megatron_align.training.resume import ResumePoint, settle
from megatron_align.training.resume_compatibility import require_same_reference
from megatron_align.training.schedule import learning_rate
from megatron_align.training.setup import Plan, locate, one_epoch, prepare
from megatron_align.training.step import Stepper, StepResult
from megatron_align.training.stop import StopRequests, leave_marker
from megatron_align.training.summary import facts_of_run
from megatron_align.training.suspects import Suspects
from megatron_align.training.watchdog import Watchdog, join_watched

REWARD_WEIGHT = "reward_head.weight"
REWARD_DEVIATION = 0.02  # of a fresh reward head: what transformers draws one with


def run(config: RunConfig, rank_info: parallel.RankInfo) -> bool:
    """Train as configured, on this rank; return whether all is done, or the run was asked to stop and saved.

    Raises:
        InputError: for anything the user can mend.
        TrainingFault: if training itself fails.
    """
    plan = prepare(config, rank_info)
    if torch.cuda.is_available():
        flight_recorder.switch_on(plan.folder)
    watchdog = join_watched(rank_info, config.parallel)
    if torch.cuda.is_available():
        watchdog.before_end = partial(flight_recorder.write, plan.folder, rank_info)
    explaining = explaining_out_of_memory(config, plan.folder, rank_info.rank, lambda: watchdog.doing)
    with watchdog.watching(), explaining:
        done = _Run(plan, watchdog).go()
    parallel.leave()
    return done


def _data_keys(train: TokenStore, validation: TokenStore | None) -> dict[str, str | None]:
    """Return what tells stores apart by content."""
    return {"data.train": train.path.name, "data.validation": validation and validation.path.name}


class _Run:
    """The run on this rank, once the ranks have met."""

    def __init__(self, plan: Plan, watchdog: Watchdog):
        self.plan, self.config, self.watchdog = plan, plan.config, watchdog
        self.groups = parallel.groups()
        parallel.require_agreement(
            {"the newest step": plan.resume and plan.resume.step, **_data_keys(plan.train, plan.validation)},
            "checkpoint.dir and the data must be the same for all ranks",
        )
        with watchdog.patient("reading the checkpoint"):
            self.resume = settle(plan.resume, self.config, plan.shape, plan.train.path.name, plan.assets)
        self.objective = build_objective(self.config.objective, plan.train)
        self.reference_weights = self._resting_reference()
        self.utilisation = Utilisation(self.config, plan.shape, plan.rank_info.world_size)
        self.health = Health(self.config.train.on_nonfinite)
        self.done = self.resume.step if self.resume else 0
        chunks = build_policy(plan.megatron, plan.shape, self.groups)
        self.references: dict[str, ReferenceColumns] = {}
        self.references = self._cached_references(chunks)
        with watchdog.patient("loading weights"):
            if self.resume is None:
                self._load(chunks, self.config.model.path)
            self.model = wrap_data_parallel(chunks, self.config.parallel)
            self.optimizer = build_optimizer(self.model, self.config.optimizer, self.groups)
            self.live = self._live_reference()
            if self.resume is not None:
                self._go_on_from(self.resume)
        self.stepper = Stepper(self.model, self.objective, self.groups, self.optimizer, watchdog.detail)
        self.suspects = Suspects(self.stepper, plan.train)
        self.batches = self._batches("train", self.config.train)
        self.steps = self.batches.steps

    def _go_on_from(self, point: ResumePoint) -> None:
        """Read what a checkpoint holds; what it has of another objective or reference (resume_allow) is left."""
        before, config = point.card["config"], self.config
        reference = self._moving_reference() if before["reference"].get("sync_steps") else None
        sharded.load(point.folder, self.model, self.optimizer, reference)
        if "health_state" in point.card:  # older checkpoints have none
            self.health.load_state(point.card["health_state"])
        set_updates(self.optimizer, self.done - self.health.counts["skipped_steps"])
        if before["objective"]["name"] == config.objective.name:
            self.objective.load_state(point.card["objective_state"])

    def _load(self, chunks: list[Policy], path: str) -> None:
        """Read a Hugging Face folder or a checkpoint; a reward head that it lacks is drawn from the seed."""
        weights, assets = locate(path)
        start = self.plan.start
        absent = frozenset({REWARD_WEIGHT} if self.plan.shape.is_reward and not start.is_reward else ())
        local = {name: p for chunk in chunks for name, p in chunk.global_parameters().items()}
        if weights == assets:
            held = {name: p for name, p in local.items() if name not in absent}
            load_weights(weights, start, held, self.groups.tp.rank(), self.groups.tp.size())
        else:
            sharded.require_intact(weights)
            sharded.load(weights, chunks, without=absent)
        if absent and chunks[-1].post_process:
            chunks[-1].reward_head.initialise(REWARD_DEVIATION, self.config.train.seed)

    def _cached_references(self, chunks: list[Policy]) -> dict[str, ReferenceColumns]:
        """Return the columns of each split, computed with ``chunks`` where they are not known yet."""
        if self._reference_mode() != "cached":
            return {}
        with self.watchdog.patient("opening the reference's log-probs"):
            columns = ReferenceColumns.open_all(
                self.plan, self.config, self.objective, self.reference_weights
            )
        missing = {}
        for split, found in columns.items():
            train = self.config.train if split == "train" else one_epoch(self.config.train)
            steps = self._batches(split, train)
            wanted = range(self.done if split == "train" else 0, steps.steps)
            if lacking := found.missing(steps, wanted):
                missing[split] = (steps, lacking)
        if missing:
            with self.watchdog.patient("loading the reference"):
                self._load(chunks, self.config.reference.path or self.config.model.path)
            scorer = Scorer(chunks, self.objective)
            for split, (steps, lacking) in missing.items():
                columns[split].fill(steps, lacking, scorer, self.groups, self.watchdog)
        return columns

    def _reference_mode(self) -> str | None:
        """Return how the objective's reference is run; None: it has none."""
        return (self.config.reference.mode or "cached") if self.config.objective.compares else None

    def _resting_reference(self) -> str | None:
        """Return the hash of a reference's weights that training does not move, having checked that it is the run's."""
        if self._reference_mode() not in ("cached", "live") or self.config.reference.sync_steps:
            return None
        with self.watchdog.patient("hashing the reference"):
            found = hash_of_rank_0(locate(self.config.reference.path or self.config.model.path)[0])
        if self.resume is not None:
            require_same_reference(found, self.config, self.resume.card, self.resume.folder)
        return found

    def _live_reference(self) -> Live | None:
        if self._reference_mode() != "live":
            return None
        chunks = build_policy(self.plan.megatron, self.plan.shape, self.groups)
        for chunk in chunks:
            chunk.requires_grad_(False)
        self._load(chunks, self.config.reference.path or self.config.model.path)
        return Live(Scorer(chunks, self.objective), self.groups)

    def _moving_reference(self) -> list[Policy] | None:
        """Return the reference's chunks where training moves them: a checkpoint holds them too."""
        return self.live.scorer.chunks if self.live and self.config.reference.sync_steps else None

    def _ahead(self, split: str) -> PrePass:
        reference: Reference | None = self.live
        if split in self.references:
            reference = self.references[split].reference()
        elif self._reference_mode() == "none":
            reference = ZeroReference()
        return PrePass(Scorer(self.model, self.objective), self.objective, self.groups, reference)

    def _batches(self, split: str, train: TrainConfig) -> StepBatches:
        parallel_config = self.config.parallel
        sequence_ranks = parallel_config.tensor if self.plan.megatron.sequence_parallel else 1
        share = Share(
            ranks=self.groups.dp.size(),
            rank=self.groups.dp.rank(),
            multiple=parallel_config.context * sequence_ranks,
            # The interleaved schedule wants micro-batches in rounds of the pipeline's length.
            micro_batch_multiple=parallel_config.pipeline if parallel_config.chunks > 1 else 1,
            context=self._context_share(),
        )
        known = self.references.get(split)
        return StepBatches(
            getattr(self.plan, split),
            self.config.data,
            train,
            getattr(self.config.data, split),
            self.objective.normalization,
            share,
            reference_C=known and known.own.values_K,
            mismatched=self.objective.looks_ahead == "mismatched",
            score_prompt=self.objective.score_prompt,
        )

    def _context_share(self) -> ContextShare | None:
        kind, ranks = kind_of(self.plan.shape, self.config.parallel), self.groups.cp
        return kind and ContextShare(ranks=ranks.size(), rank=ranks.rank(), kind=kind)

    def go(self) -> bool:
        """Train what is left, then export; return False if a signal asked to stop before all steps were made."""
        settings = to_dict(self.config)
        if dist.get_rank() == 0:
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            (self.plan.folder / "config.yaml").write_text(text, encoding="utf-8")
            sinks = Sinks(self.plan.folder, self.config.logging, settings, self.done, self.steps)
        else:
            sinks = NoSinks()
        with sinks:
            facts = facts_of_run(self.plan, self.objective, self.groups.dp.size(), self.steps, self.resume)
            sinks.card("megatron_align", facts)
            for folder, damage in self.resume.damaged if self.resume else ():
                sinks.say(f"warning: {damage}; moved to {folder}{sharded.DAMAGED}")
            if not self._train(sinks):
                return False
            if self.config.checkpoint.export_hf:
                with self.watchdog.patient("export"):
                    gather_parameters(self.model)
                    chunks = [chunk.module for chunk in self.model]
                    export_model(chunks, self.plan.folder / "hf", self.plan.assets, overwrite=True)
                sinks.say(f"exported to {self.plan.folder / 'hf'}")
        return True

    def _train(self, sinks: Sinks | NoSinks) -> bool:
        """Make the steps that are left, and their checkpoints; return False if asked to stop before the last."""
        ahead = self._ahead("train")
        tracer = Tracer(self.config.logging.profile_steps, self.plan.folder, self.plan.rank_info.rank)
        saves = Saves(self.plan.folder, self.config.checkpoint, self._begin_save, sinks, self.watchdog)
        self.stepper.before_update = saves.before_update
        if self.config.train.self_check and self.done < self.steps:
            with self.watchdog.patient("self-check"):
                self_check.before_first_step(self.model, self.batches, self.done, self.groups)
        with StopRequests() as stop, Prefetcher(range(self.done, self.steps), self.batches.step) as steps:
            for step in range(self.done + 1, self.steps + 1):
                try:
                    with tracer.step(step):
                        self._step(step, steps, ahead, sinks)
                except TrainingFault:
                    saves.settle()
                    raise
                if step == self.steps:
                    saves.last(step)
                elif saves.between_steps(
                    step, due=self._due(step, self.config.checkpoint.save_every), stop=bool(stop.asked)
                ):
                    saves.last(step)
                    if dist.get_rank() == 0:
                        leave_marker(self.plan.folder, step)
                    sinks.say(f"asked to stop ({stop.asked or 'another rank'}): saved after step {step}")
                    return False
        return True

    def _step(self, step: int, steps: Prefetcher[Step], ahead: PrePass, sinks: Sinks | NoSinks) -> None:
        started = time.perf_counter()
        self.watchdog.report(f"step {step}")
        lr = learning_rate(self.config.optimizer, step, self.steps)
        set_learning_rate(self.optimizer, lr)
        timing_every = self.config.logging.timing_every
        self.stepper.clock.start(timing_every is not None and step % timing_every == 0)
        self.watchdog.detail("data")
        data = next(steps)
        self.stepper.clock.mark("data")
        counts, before = data.counts, self.objective.state()
        self.watchdog.detail("reference and statistics")
        batches = ahead.batches(data, training=True)
        result = self.stepper.train(batches)
        if not result.updated:
            self.objective.load_state(before)
        if self._moving_reference() and step % self.config.reference.sync_steps == 0:
            gather_parameters(self.model)
            self.live.move([chunk.module for chunk in self.model], self.config.reference.mixup_alpha)
        seconds = time.perf_counter() - started - result.paused_seconds
        found = self._examine(step, data, batches, result, sinks)
        metrics = self.objective.finish(result.metrics)
        if self.config.train.self_check and step == 1 and result.updated:
            self_check.after_first_step(self.config, metrics, self.plan.megatron.params_dtype)
        row = {
            "step": step,
            **metrics,
            "grad_norm": result.grad_norm,
            **self.health.counts,
            **found,
            "lr": lr,
            "tokens": counts.laid_tokens,
            "tokens_saved": counts.duplicated_tokens - counts.laid_tokens,
            "trained_tokens": counts.scored_tokens,
            "padding": round(1 - counts.laid_tokens / counts.padded_tokens, 6),
            "samples": counts.samples,
            "tokens_per_second": counts.laid_tokens / seconds,
            "step_seconds": seconds,
        }
        faults.at("step.trained", step)
        mfu = self.utilisation.of_step(counts, seconds)
        sinks.write(row, {"peak_memory_gb": peak_memory_gb()} | ({} if mfu is None else {"mfu": mfu}))
        if self.stepper.clock.running:
            sinks.write(timing_row(step, self.stepper.clock, mfu))
        # Validated first: a run killed in between resumes from before the step, and validates again.
        if self.plan.validation and self._due(step, self.config.train.validate_every):
            sinks.write({"step": step, "split": "validation", **self._validate()})
        faults.at("step.logged", step)

    def _examine(
        self,
        step: int,
        data: Step,
        batches: list[PackedBatch],
        result: StepResult,
        sinks: Sinks | NoSinks,
    ) -> dict[str, list[int]]:
        """Say what is wrong with a step's numbers, and in which samples; stop if they are not finite and policy wants.

        Returns:
            ``{"suspects": samples}`` if anything is wrong, else nothing.
        """
        troubles = self.health.judge(result.metrics["loss"], result.grad_norm)
        if not troubles:
            return {}
        if result.updated:
            samples = self.suspects.of_outlier(data, batches, result)
            where = f"the pack with the largest loss is {self.suspects.named(samples)}"
        else:
            with self.watchdog.patient(f"looking for what is not finite in step {step}"):
                samples = self.suspects.of_nonfinite(data, batches, result)
            where = f"what is not finite comes from {self.suspects.named(samples)}"
        self.health.require_going_on(step, troubles, where)
        skipped = "" if result.updated else "skipped, no update: "
        for trouble in troubles:
            sinks.say(f"step {step}: {skipped}{trouble}; {where}")
        return {"suspects": samples}

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.steps or (every is not None and step % every == 0)

    def _validate(self) -> dict[str, float]:
        """Return the metrics over the whole validation data, weighted as in training."""
        batches = self._batches("validation", one_epoch(self.config.train))
        ahead = self._ahead("validation")
        totals: dict[str, float] = {}
        weight_sum = 0.0
        with Prefetcher(range(batches.steps), batches.step) as steps:
            for data in steps:
                self.watchdog.report(f"validation batch {data.number + 1}")
                weight_sum += data.counts.weight
                result = self.stepper.evaluate(ahead.batches(data, training=False))
                for name, value in result.metrics.items():
                    totals[name] = totals.get(name, 0.0) + value * data.counts.weight
        return self.objective.finish({name: value / weight_sum for name, value in totals.items()})

    def _begin_save(self, saver: Saver, step: int) -> None:
        card = sharded.make_card(
            step,
            self.plan.shape,
            self.plan.megatron.params_dtype,
            world_size=self.plan.rank_info.world_size,
            config=to_dict(self.config),
            data={
                "key": self.plan.train.path.name,
                "passes_per_epoch": list(passes_per_epoch(self.config.data.train)),
                **self.plan.train.manifest,
            },
            reference_weights=self.reference_weights,
            objective_state=self.objective.state(),
            health_state=self.health.state(),
        )
        target = sharded.step_folder(self.plan.folder, step)
        gather_parameters(self.model)
        saver.begin(target, self.model, self.optimizer, card, self.plan.assets, self._moving_reference())
