"""A run from a checked plan to the exported model: load, train, validate, save, export."""

from __future__ import annotations

import math
import time
from functools import partial

import torch
import torch.distributed as dist
import yaml

from megatron_align.checkpoint import sharded
from megatron_align.checkpoint.export import export_model
from megatron_align.checkpoint.hf import load_weights
from megatron_align.config import RunConfig, TrainConfig, to_dict
from megatron_align.data.batch import Share, Step, StepBatches
from megatron_align.data.order import passes_per_epoch
from megatron_align.data.prefetch import Prefetcher
from megatron_align.data.store import TokenStore
from megatron_align.errors import TrainingFault
from megatron_align.model import flight_recorder, parallel
from megatron_align.model.policy import Policy, build_policy
from megatron_align.training import self_check
from megatron_align.training.ahead import Ahead, Live, Nobody, Reference, Scorer
from megatron_align.training.build import build_objective
from megatron_align.training.metrics import NoSinks, Sinks
from megatron_align.training.optimizer import (
    after_load,
    build_optimizer,
    gather_parameters,
    set_learning_rate,
    wrap_data_parallel,
)
from megatron_align.training.reference import ReferenceColumns
from megatron_align.training.schedule import learning_rate
from megatron_align.training.setup import Plan, locate, one_epoch, prepare
from megatron_align.training.step import Stepper

REWARD_WEIGHT = "reward_head.weight"
REWARD_DEVIATION = 0.02  # of a fresh reward head: what transformers draws one with


def run(config: RunConfig, place: parallel.Place) -> None:
    """Train as configured, on this rank.

    Raises:
        InputError: for anything the user can mend.
        TrainingFault: if training itself fails.
    """
    plan = prepare(config, place)
    if torch.cuda.is_available():
        flight_recorder.switch_on(plan.folder)
    watchdog = parallel.join(place, config.parallel)
    if torch.cuda.is_available():
        watchdog.before_end = partial(flight_recorder.write, plan.folder, place)
    with watchdog.watching():
        _Run(plan, watchdog).go()
    parallel.leave()


def _data_keys(train: TokenStore, validation: TokenStore | None) -> dict[str, str | None]:
    """Return what tells stores apart by content."""
    return {"data.train": train.path.name, "data.validation": validation and validation.path.name}


class _Run:
    """The run on this rank, once the ranks have met."""

    def __init__(self, plan: Plan, watchdog: parallel.Watchdog):
        self.plan, self.config, self.watchdog = plan, plan.config, watchdog
        self.groups = parallel.groups()
        parallel.need_agreement(
            {"the newest step": plan.resume and plan.resume[0], **_data_keys(plan.train, plan.validation)},
            "checkpoint.dir and the data must be the same for all ranks",
        )
        self.objective = build_objective(self.config.objective, plan.train)
        self.done, resumed = plan.resume or (0, None)
        chunks = build_policy(plan.megatron, plan.shape, self.groups)
        self.references: dict[str, ReferenceColumns] = {}
        self.references = self._cached_references(chunks)
        with watchdog.patient("loading weights"):
            if resumed is None:
                self._load(chunks, self.config.model.path)
            self.model = wrap_data_parallel(chunks, self.config.parallel)
            self.optimizer = build_optimizer(self.model, self.config.optimizer, self.groups)
            self.live = self._live_reference()
            if resumed is not None:
                sharded.load(resumed, self.model, self.optimizer, self._moving_reference())
                after_load(self.optimizer, self.config.optimizer, self.done)
                self.objective.load_state(sharded.read_card(resumed)["objective_state"])
        self.stepper = Stepper(self.model, self.objective, self.groups, self.optimizer, watchdog.detail)
        self.batches = self._batches("train", self.config.train)
        self.steps = self.batches.steps

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
            sharded.load(weights, chunks, without=absent)
        if absent and chunks[-1].post_process:
            chunks[-1].reward_head.initialise(REWARD_DEVIATION, self.config.train.seed)

    def _cached_references(self, chunks: list[Policy]) -> dict[str, ReferenceColumns]:
        """Return the columns of each split, computed with ``chunks`` where they are not known yet."""
        if self._reference_mode() != "cached":
            return {}
        with self.watchdog.patient("opening the reference's log-probs"):
            columns = ReferenceColumns.open_all(self.plan, self.config, self.objective)
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

    def _ahead(self, split: str) -> Ahead:
        reference: Reference | None = self.live
        if split in self.references:
            reference = self.references[split].reference()
        elif self._reference_mode() == "none":
            reference = Nobody()
        return Ahead(Scorer(self.model, self.objective), self.objective, self.groups, reference)

    def _batches(self, split: str, train: TrainConfig) -> StepBatches:
        parallel_config = self.config.parallel
        share = Share(
            ranks=self.groups.dp.size(),
            rank=self.groups.dp.rank(),
            multiple=parallel_config.tensor if self.plan.megatron.sequence_parallel else 1,
            # The interleaved schedule wants micro-batches in rounds of the pipeline's length.
            micro_batch_multiple=parallel_config.pipeline if parallel_config.chunks > 1 else 1,
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

    def go(self) -> None:
        """Train what is left, then export."""
        settings = to_dict(self.config)
        if dist.get_rank() == 0:
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            (self.plan.folder / "config.yaml").write_text(text, encoding="utf-8")
            sinks = Sinks(self.plan.folder, self.config.logging, settings, self.done, self.steps)
        else:
            sinks = NoSinks()
        with sinks:
            sinks.say(self._summary())
            ahead = self._ahead("train")
            if self.config.train.self_check and self.done < self.steps:
                with self.watchdog.patient("self-check"):
                    self_check.before_first_step(self.model, self.batches, self.done, self.groups)
            with Prefetcher(range(self.done, self.steps), self.batches.step) as steps:
                for step in range(self.done + 1, self.steps + 1):
                    self._step(step, steps, ahead, sinks)
            if self.config.checkpoint.export_hf:
                with self.watchdog.patient("export"):
                    gather_parameters(self.model)
                    chunks = [chunk.module for chunk in self.model]
                    export_model(chunks, self.plan.folder / "hf", self.plan.assets, overwrite=True)
                sinks.say(f"exported to {self.plan.folder / 'hf'}")

    def _step(self, step: int, steps: Prefetcher[Step], ahead: Ahead, sinks: Sinks | NoSinks) -> None:
        started = time.perf_counter()
        self.watchdog.report(f"step {step}")
        lr = learning_rate(self.config.optimizer, step, self.steps)
        set_learning_rate(self.optimizer, lr)
        self.watchdog.detail("data")
        data = next(steps)
        self.watchdog.detail("reference and statistics")
        result, counts = self.stepper.train(ahead.batches(data, training=True)), data.counts
        if self._moving_reference() and step % self.config.reference.sync_steps == 0:
            gather_parameters(self.model)
            self.live.move([chunk.module for chunk in self.model], self.config.reference.mixup_alpha)
        seconds = time.perf_counter() - started
        if not (math.isfinite(result.metrics["loss"]) and math.isfinite(result.grad_norm)):
            facts = f"loss {result.metrics['loss']}, gradient norm {result.grad_norm}"
            raise TrainingFault(f"training needs finite numbers, got {facts} at step {step}")
        metrics = self.objective.finish(result.metrics)
        if self.config.train.self_check and step == 1:
            self_check.after_first_step(self.config, metrics, self.plan.megatron.params_dtype)
        row = {
            "step": step,
            **metrics,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": counts.laid_tokens,
            "tokens_saved": counts.duplicated_tokens - counts.laid_tokens,
            "trained_tokens": counts.scored_tokens,
            "padding": round(1 - counts.laid_tokens / counts.padded_tokens, 6),
            "samples": counts.samples,
            "tokens_per_second": counts.laid_tokens / seconds,
            "step_seconds": seconds,
        }
        sinks.write(row)
        # Validated first: a run killed in between resumes from before the step, and validates again.
        if self.plan.validation and self._due(step, self.config.train.validate_every):
            sinks.write({"step": step, "split": "validation", **self._validate()})
        if self._due(step, self.config.checkpoint.save_every):
            self._save(step)

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

    def _save(self, step: int) -> None:
        card = sharded.make_card(
            step,
            self.plan.shape,
            self.plan.megatron.params_dtype,
            world_size=self.plan.place.world_size,
            config=to_dict(self.config),
            data={
                "key": self.plan.train.path.name,
                "passes_per_epoch": list(passes_per_epoch(self.config.data.train)),
                **self.plan.train.manifest,
            },
            objective_state=self.objective.state(),
        )
        target = sharded.step_folder(self.plan.folder, step)
        with self.watchdog.patient(f"saving step {step}"):
            gather_parameters(self.model)
            sharded.save(target, self.model, self.optimizer, card, self.plan.assets, self._moving_reference())
            if dist.get_rank() == 0:
                sharded.prune(self.plan.folder, self.config.checkpoint.keep)

    def _summary(self) -> str:
        shape, place, layout = self.plan.shape, self.plan.place, self.config.parallel
        data, train = self.plan.train.manifest, self.config.train
        return "\n".join(
            (
                f"model      {shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
                f"vocabulary {shape.vocab_size}, {self.config.train.precision}",
                f"layout     {place.world_size} ranks = tensor {layout.tensor} x pipeline {layout.pipeline} x "
                f"data {self.groups.dp.size()}, "
                + ("on GPUs" if torch.cuda.is_available() else "on the CPU, as no GPU is visible"),
                f"data       {', '.join(data['shapes'])}: {data['samples']:,} samples, {data['tokens']:,} tokens, "
                f"{data['scored_tokens']:,} trained; {data['dropped']} dropped, {data['truncated']} truncated, "
                f"{data['skipped']} skipped",
                f"objective  {self.config.objective.name}, every {self.objective.normalization} weighs the same; "
                + (
                    f"up to {train.global_batch_tokens:,} tokens a step"
                    if train.global_batch_tokens
                    else f"{train.global_batch_size} samples a step"
                ),
                f"steps      {self.done} done of {self.steps}"
                + (f", resumed from {self.plan.resume[1]}" if self.plan.resume else ""),
            )
        )
