"""A run from configuration to exported model: everything that can be wrong is checked before ranks meet."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_align.checkpoint import sharded
from megatron_align.checkpoint.convert import need_tied_head, open_hf
from megatron_align.checkpoint.export import export_model
from megatron_align.checkpoint.hf import load_weights
from megatron_align.config import DataSource, RunConfig, TrainConfig, to_dict
from megatron_align.data.batch import Share, Step, StepBatches, need_room, step_order
from megatron_align.data.order import passes_per_epoch
from megatron_align.data.prefetch import Prefetcher
from megatron_align.data.prepare import prepare_or_wait
from megatron_align.data.spec import CACHE_IN_RUN, StoreSpec
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError, TrainingFault
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.training.metrics import NoSinks, Sinks, check_logging
from megatron_align.training.objective import build_objective
from megatron_align.training.optimizer import (
    after_load,
    build_optimizer,
    set_learning_rate,
    wrap_data_parallel,
)
from megatron_align.training.schedule import learning_rate
from megatron_align.training.step import Stepper

_SAMPLE_ORDER = ("seed", "global_batch_size", "global_batch_tokens", "precision")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do, known and checked on every rank before the ranks meet."""

    config: RunConfig
    place: parallel.Place
    folder: Path
    shape: ModelShape
    assets: Path  # HF folder with config and tokenizer
    weights: Path  # HF folder or checkpoint that training starts from
    resume: tuple[int, Path] | None
    megatron: TransformerConfig
    train: TokenStore
    validation: TokenStore | None


def run(config: RunConfig, place: parallel.Place) -> None:
    """Train as configured, on this rank.

    Raises:
        InputError: for anything the user can mend.
        TrainingFault: if training itself fails.
    """
    plan = prepare(config, place)
    watchdog = parallel.join(place, config.parallel)
    with watchdog.watching():
        _Run(plan, watchdog).go()
    parallel.leave()


def prepare(config: RunConfig, place: parallel.Place) -> Plan:
    """Check everything and tokenise; no process group exists yet, so nothing can time out."""
    config.parallel.data_parallel(place.world_size)
    check_logging(config.logging)
    source = sharded.find(config.model.path)
    assets = source / sharded.ASSETS if source else Path(config.model.path)
    shape = read_shape(assets)
    megatron = transformer_config(
        shape, config.parallel, DTYPES[config.train.precision], config.train.recompute_layers
    )
    if source is None:
        need_tied_head(open_hf(assets)[0], shape)
    if config.data.sequence_length > shape.max_positions:
        raise InputError(
            f"data.sequence_length must not pass the model's {shape.max_positions} positions, "
            f"got {config.data.sequence_length}"
        )
    folder = Path(config.checkpoint.dir)
    with _leave_nothing_after_bad_input(folder):
        _need_writable(folder)
        if place.rank == 0:
            sharded.tidy(folder)
        resume = _resume_point(config, folder, shape)
        stores = {split: _open_store(config, split, assets, place) for split in ("train", "validation")}
        _need_vocabulary(stores, shape)
        _need_steps_left(config, stores, resume)
        if resume is not None:
            _need_same_run(config, stores["train"], resume[1])
    return Plan(
        config=config,
        place=place,
        folder=folder,
        shape=shape,
        assets=assets,
        weights=source or assets,
        resume=resume,
        megatron=megatron,
        train=stores["train"],
        validation=stores["validation"],
    )


@contextmanager
def _leave_nothing_after_bad_input(folder: Path) -> Iterator[None]:
    """Remove again the folders that this run made, where they are still empty."""
    absent = [path for path in (folder / CACHE_IN_RUN, folder, *folder.parents) if not path.exists()]
    try:
        yield
    except InputError:
        for path in absent:
            with suppress(OSError):
                path.rmdir()
        raise


def _need_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"checkpoint.dir must be a folder that can be written: {error.strerror} at '{folder}'"
        ) from error


def _resume_point(config: RunConfig, folder: Path, shape: ModelShape) -> tuple[int, Path] | None:
    steps = sharded.list_steps(folder)
    if not steps:
        return None
    step, path = steps[-1]
    if config.checkpoint.resume == "never":
        raise InputError(f"checkpoint.resume: never needs a checkpoint.dir without checkpoints, found {path}")
    sharded.same_model(sharded.read_card(path), shape, path)
    return step, path


def _open_store(config: RunConfig, split: str, assets: Path, place: parallel.Place) -> TokenStore | None:
    spec = StoreSpec.of_run(config, split, str(assets))
    if spec is None:
        return None
    store = TokenStore(prepare_or_wait(spec, place.local_rank))
    if config.objective.name == "sft" and store.kind != "chat":
        raise InputError(
            f"data.{split}: objective sft needs chat data (messages, prompt + completion, ...), "
            f"got {store.kind} data in {', '.join(spec.sources)}"
        )
    return store


def _need_vocabulary(stores: dict[str, TokenStore | None], shape: ModelShape) -> None:
    for split, store in stores.items():
        highest = store.manifest["largest_token"] if store else 0
        if highest >= shape.vocab_size:
            raise InputError(
                f"the tokenizer must fit the model's vocabulary of {shape.vocab_size}, data.{split} has token {highest}"
            )


def _need_steps_left(
    config: RunConfig, stores: dict[str, TokenStore | None], resume: tuple[int, Path] | None
) -> None:
    for store in stores.values():
        if store is not None:
            need_room(store, config.data)
    order = step_order(stores["train"], config.data, config.train, config.data.train)
    steps = config.train.steps or order.steps
    if config.optimizer.warmup_steps > steps:
        raise InputError(
            f"optimizer.warmup_steps must not pass the run's {steps} steps, got {config.optimizer.warmup_steps}"
        )
    if resume is not None and resume[0] > steps:
        raise InputError(
            f"the run must have at least the {resume[0]} steps already done in {resume[1]}, got {steps}"
        )


def _need_same_run(config: RunConfig, store: TokenStore, path: Path) -> None:
    """Refuse to go on with another order of samples, loss or precision: step numbers would lose their meaning."""
    card = sharded.read_card(path)
    before, now = card.get("config"), to_dict(config)
    if not isinstance(before, dict):
        raise InputError(f"resuming needs a checkpoint of a training run, found weights only in {path}")
    keys = [("data", "shuffle"), *(("train", key) for key in _SAMPLE_ORDER)]
    keys += [("objective", key) for key in {**before["objective"], **now["objective"]}]
    pairs = {".".join(key): (before[key[0]].get(key[1]), now[key[0]].get(key[1])) for key in keys}
    pairs["the tokenised data"] = (card["data"]["key"], store.path.name)
    pairs["passes per epoch"] = (card["data"]["passes_per_epoch"], list(passes_per_epoch(config.data.train)))
    if apart := [f"{key} was {old} and is {new}" for key, (old, new) in pairs.items() if old != new]:
        raise InputError(
            f"resuming needs the run it goes on with: {', '.join(apart)} (checkpoint {path}); for another run "
            "give another checkpoint.dir, and this one as model.path to start from its weights"
        )


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
        self.objective = build_objective(self.config.objective)
        self.done, resumed = plan.resume or (0, None)
        chunks = build_policy(plan.megatron, plan.shape, self.groups)
        with watchdog.patient("loading weights"):
            if resumed is None:
                self._load_start(chunks)
            self.model = wrap_data_parallel(chunks)
            self.optimizer = build_optimizer(self.model, self.config.optimizer, self.groups)
            if resumed is not None:
                sharded.load(resumed, self.model, self.optimizer)
                after_load(self.optimizer, self.config.optimizer, self.done)
        self.stepper = Stepper(self.model, self.objective, self.groups, self.optimizer)
        self.batches = self._batches(plan.train, self.config.data.train, self.config.train)
        self.steps = self.batches.steps

    def _load_start(self, chunks: list[Any]) -> None:
        if self.plan.weights == self.plan.assets:
            local = {name: p for chunk in chunks for name, p in chunk.global_parameters().items()}
            load_weights(
                self.plan.weights, self.plan.shape, local, self.groups.tp.rank(), self.groups.tp.size()
            )
        else:
            sharded.load(self.plan.weights, chunks)

    def _batches(
        self, store: TokenStore, sources: str | list[str | DataSource], train: TrainConfig
    ) -> StepBatches:
        parallel_config = self.config.parallel
        share = Share(
            ranks=self.groups.dp.size(),
            rank=self.groups.dp.rank(),
            multiple=parallel_config.tensor if self.plan.megatron.sequence_parallel else 1,
            # The interleaved schedule wants micro-batches in rounds of the pipeline's length.
            micro_batch_multiple=parallel_config.pipeline if parallel_config.chunks > 1 else 1,
        )
        return StepBatches(store, self.config.data, train, sources, self.objective.normalization, share)

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
            with Prefetcher(range(self.done, self.steps), self.batches.step) as ahead:
                for step in range(self.done + 1, self.steps + 1):
                    self._step(step, ahead, sinks)
            if self.config.checkpoint.export_hf:
                with self.watchdog.patient("export"):
                    chunks = [chunk.module for chunk in self.model]
                    export_model(chunks, self.plan.folder / "hf", self.plan.assets, overwrite=True)
                sinks.say(f"exported to {self.plan.folder / 'hf'}")

    def _step(self, step: int, ahead: Prefetcher[Step], sinks: Sinks | NoSinks) -> None:
        started = time.perf_counter()
        self.watchdog.report(f"step {step}")
        lr = learning_rate(self.config.optimizer, step, self.steps)
        set_learning_rate(self.optimizer, lr)
        data = next(ahead)
        result, counts = self.stepper.train(data.batches), data.counts
        seconds = time.perf_counter() - started
        if not (math.isfinite(result.metrics["loss"]) and math.isfinite(result.grad_norm)):
            facts = f"loss {result.metrics['loss']}, gradient norm {result.grad_norm}"
            raise TrainingFault(f"training needs finite numbers, got {facts} at step {step}")
        row = {
            "step": step,
            **result.metrics,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": counts.tokens,
            "trained_tokens": counts.scored_tokens,
            "padding": round(1 - counts.laid_tokens / counts.padded_tokens, 6),
            "samples": counts.samples,
            "tokens_per_second": counts.tokens / seconds,
            "step_seconds": seconds,
        }
        sinks.write(row)
        # Validated first: a run killed in between resumes from before the step, and validates again.
        if self.plan.validation and self._due(step, self.config.train.validate_every):
            sinks.write({"step": step, "split": "validation", **self._validate(self.plan.validation)})
        if self._due(step, self.config.checkpoint.save_every):
            self._save(step)

    def _due(self, step: int, every: int | None) -> bool:
        return step == self.steps or (every is not None and step % every == 0)

    def _validate(self, store: TokenStore) -> dict[str, float]:
        """Return the metrics over the whole validation data, weighted as in training."""
        one_epoch = self._batches(store, self.config.data.validation, _one_epoch(self.config))
        totals: dict[str, float] = {}
        weight_sum = 0.0
        with Prefetcher(range(one_epoch.steps), one_epoch.step) as ahead:
            for step, data in enumerate(ahead, start=1):
                self.watchdog.report(f"validation batch {step}")
                weight_sum += data.counts.weight
                for name, value in self.stepper.evaluate(data.batches).metrics.items():
                    totals[name] = totals.get(name, 0.0) + value * data.counts.weight
        return {name: value / weight_sum for name, value in totals.items()}

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
        )
        target = sharded.step_folder(self.plan.folder, step)
        with self.watchdog.patient(f"saving step {step}"):
            sharded.save(target, self.model, self.optimizer, card, self.plan.assets)
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


def _one_epoch(config: RunConfig) -> TrainConfig:
    return dataclasses.replace(config.train, steps=None, epochs=1)
