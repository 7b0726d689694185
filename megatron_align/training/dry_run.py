"""What a run would do, said before any rank is met: the layout, a step, memory, operations, the number of steps."""

from __future__ import annotations

import os

from megatron_align.config import RunConfig
from megatron_align.cost.placement import Placement
from megatron_align.cost.search import memory_of
from megatron_align.cost.text import layout, memory_table, recomputation, step_text
from megatron_align.cost.work import mean, of_store, scoring_passes, step_flops
from megatron_align.data.batching.step_batches import step_order
from megatron_align.model.parallel import RankInfo
from megatron_align.training.setup import Plan, prepare


def dry_run(config: RunConfig, rank_info: RankInfo, ranks: int | None) -> None:
    """Check all that a run checks before its ranks meet, tokenise its data, and print what it would do; on rank 0.

    Args:
        config: of the run.
        rank_info: of this process.
        ranks: as if on so many; None: on the launcher's, or without a launcher on the fewest that the layout needs.

    Raises:
        InputError: for anything that would stop the run, too.
    """
    if rank_info.rank:
        return
    parallel = config.parallel
    if ranks is None:
        launched = "WORLD_SIZE" in os.environ
        ranks = rank_info.world_size if launched else parallel.tensor * parallel.pipeline * parallel.context
    print(describe(prepare(config, RankInfo(rank=0, local_rank=0, world_size=ranks))), flush=True)


def describe(plan: Plan) -> str:
    """Return what a checked plan would do."""
    config, shape, stored = plan.config, plan.shape, plan.train.manifest
    placement = Placement.of_run(config, shape, plan.rank_info.world_size)
    work = mean(of_store(plan.train, config)(placement))
    flops = step_flops(placement, work, scoring_passes(config))
    order = step_order(plan.train, config.data, config.train, config.data.train)
    done = plan.resume[0] if plan.resume else 0
    compares = config.objective.compares
    return "\n".join(
        (
            f"model      {shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, vocabulary "
            f"{shape.vocab_size}, {config.train.precision}",
            f"layout     {placement.world_size} ranks = {layout(placement)}, {recomputation(placement)}",
            f"data       {', '.join(stored['shapes'])}: {stored['samples']:,} samples, {stored['tokens']:,} tokens, "
            f"{stored['scored_tokens']:,} trained",
            f"objective  {config.objective.name}"
            + (f", reference {config.reference.mode or 'cached'}" if compares else ""),
            step_text(placement, work, flops),
            f"steps      {done} done of {config.train.steps or order.steps}",
            memory_table(memory_of(config, placement, work.micro_batches)),
            "a dry run: nothing was trained",
        )
    )
