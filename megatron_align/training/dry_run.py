"""Dry run: check a run and print its layout, step, memory, operations and number of steps. Writes nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_align.config import RunConfig
from megatron_align.cost.memory import GIB
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_before, memory_of
from megatron_align.cost.state import parameter_count
from megatron_align.cost.text import (
    before_text,
    layout,
    memory_table,
    online_text,
    recomputation,
    shape_text,
    step_text,
    trained_text,
)
from megatron_align.cost.work import flops_of, mean, of_ptx, of_store
from megatron_align.data.batching.rollout_order import train_order
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.registry import objective_class, reference_mode
from megatron_align.training.online_costs import online_costs
from megatron_align.training.setup import RunSetup, prepare_run
from megatron_align.training.validation_tasks import followed_metric, lower_is_better


def dry_run(config: RunConfig, rank_info: RankInfo, ranks: int | None) -> None:
    """Check all that a run checks before its ranks meet, and print what it would do; on rank 0 only.

    Nothing is written or deleted: data that are not tokenised yet are tokenised into a temporary folder.

    Args:
        config: of the run.
        rank_info: of this process.
        ranks: number of ranks; None: the launcher's, or without a launcher the fewest that the layout needs.

    Raises:
        InputError: for anything that the run itself would refuse.
    """
    if rank_info.rank:
        return
    parallel = config.parallel
    if ranks is None:
        launched = "WORLD_SIZE" in os.environ
        ranks = rank_info.world_size if launched else parallel.tensor * parallel.pipeline * parallel.context
    with tempfile.TemporaryDirectory(prefix="megatron_align_dry_run_") as cache:
        setup = prepare_run(config, RankInfo(rank=0, local_rank=0, world_size=ranks), Path(cache))
        _require_followed_metrics(setup)
        print(describe(setup), flush=True)


def _require_followed_metrics(setup: RunSetup) -> None:
    """Check the names of the metrics that options follow, as their hooks do at the start of a run."""
    early, best = setup.config.train.early_stopping, setup.config.checkpoint.keep_best
    objective = objective_class(setup.config.objective.name)
    lower = lower_is_better(objective, setup.validation is not None, setup.tasks)
    if early is not None:
        followed_metric("train.early_stopping.metric", early.metric, lower)
    if best is not None:
        followed_metric("checkpoint.keep_best", best, lower)


def _rollout_text(setup: RunSetup, placement: Placement) -> list[str]:
    """Describe the rollouts of a run in one line; none: it has none."""
    config = setup.config
    minibatches = getattr(config.objective, "minibatches", None)
    if minibatches is None:
        return []
    rollout = config.rollout
    count = minibatches * config.objective.iterations
    steps = f"{count} steps" if count > 1 else "a step"
    if rollout.engine == "data":
        return [f"rollouts   given with the data, {rollout.prompts:,} prompts for {steps}"]
    size = parameter_count(placement.shape) * placement.itemsize / GIB
    rewards = ", ".join(reward.label for reward in config.rewards)
    sampling = rollout.dynamic_sampling
    further = [
        *([f"replaced in up to {sampling.max_batches - 1} further batches"] if sampling else []),
        *(["generated one set ahead"] if rollout.off_policy_steps else []),
    ]
    return [
        f"rollouts   {rollout.prompts:,} prompts x {setup.train.completion_counts[0]} completions of up to "
        f"{rollout.max_tokens:,} tokens for {steps}, by {rollout.engine}; {size:.3g} GiB of weights to it each "
        f"time; rewards {rewards}" + "".join(f"; {text}" for text in further),
    ]


def describe(setup: RunSetup) -> str:
    """Return what a checked run would do, as text."""
    config, shape, stored = setup.config, setup.shape, setup.train.manifest
    placement = Placement.of_run(config, shape, setup.rank_info.world_size, setup.second_shapes)
    work = mean(of_store(setup.train, config)(placement))
    flops = flops_of(config, placement, work)
    online = online_costs(config, of_ptx(setup.ptx, config) if setup.ptx is not None else None)
    order = train_order(setup.train, config)
    done = setup.resume.step if setup.resume else 0
    reference = reference_mode(config)
    trained = trained_text(shape, setup.adapter, setup.frozen)
    return "\n".join(
        (
            f"model      {shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary "
            f"{shape.vocab_size}, {config.train.arithmetic}",
            *([f"trained    {trained}"] if trained else []),
            f"layout     {placement.world_size} ranks = {layout(placement)}, {recomputation(placement)}",
            f"data       {', '.join(stored['shapes'])}: {stored['samples']:,} samples, {stored['tokens']:,} tokens, "
            f"{stored['scored_tokens']:,} trained",
            f"objective  {config.objective.name}" + (f", reference {reference}" if reference else ""),
            *(
                f"{name:10} {shape_text(other)}"
                for name, other in placement.second._asdict().items()
                if other
            ),
            *_rollout_text(setup, placement),
            *([f"critic     {setup.critic.note}"] if setup.critic else []),
            step_text(placement, work, flops),
            *online_text(online.flops(config, placement, work)),
            *([f"tasks      {', '.join(names)}"] if (names := _task_names(config)) else []),
            f"steps      {done} done of {order.steps}",
            *(f"{name:10} {text}" for name, text in setup.notes),
            memory_table(memory_of(config, placement, work.micro_batches, online)),
            *before_text(memory_before(config, placement)),
            "a dry run: nothing was trained",
        )
    )


def _task_names(config: RunConfig) -> list[str]:
    return [str(task["name"]) for task in config.validation.tasks]
