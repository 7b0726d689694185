"""How long a step takes, estimated: operations and bytes over a chip's peaks, each by a stated share of it.

An estimate to compare layouts by. What is left out makes it too low: kernels that only move memory, the start of
kernels, ranks that wait for a slower one. What is hidden behind computation makes it too high: nothing is taken to be.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_align.cost.chips import Chip
from megatron_align.cost.flops import (
    LINEAR_BACKWARD,
    forward_flops,
    layers_executed,
    padded_vocabulary,
)
from megatron_align.cost.placement import Placement
from megatron_align.cost.state import state_bytes
from megatron_align.cost.traffic import traffic
from megatron_align.cost.work import StepFlops, Work, step_flops

NODE = 8  # GPUs that share the fast links
# Ours to assume; no run of ours measured them.
EFFICIENCY = 0.45  # of the bf16 peak, over a whole layer
LINKS = 0.7  # of a link's bandwidth
UPDATE_BYTES = 2.5  # times the optimizer's bytes: read, written, gradients read


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step, by what they go to; and its operations.

    Args:
        compute: the busiest stage's matrix products.
        bubble: a stage waits for its first and after its last micro-batch.
        tensor: tensor-parallel collectives.
        context: context-parallel ones.
        pipeline: hidden states sent between stages.
        data: gradients summed, weights gathered.
        update: the optimizer.
    """

    compute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    data: float
    update: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))

    def shares(self) -> dict[str, float]:
        """Return what each part has of the whole."""
        return {f.name: getattr(self, f.name) / self.total for f in fields(self)}


def step_time(
    placement: Placement, work: Work, chip: Chip, passes: int = 0, efficiency: float = EFFICIENCY
) -> StepTime:
    """Estimate a step.

    Args:
        placement: of the model.
        work: of the step.
        chip: every rank is one.
        passes: forward passes besides the training's.
        efficiency: share of the chip's bf16 peak that computation reaches.
    """
    parallel = placement.parallel
    within = chip.link if parallel.tensor * parallel.context <= NODE else chip.network
    moved = traffic(placement, work.pack_tokens)
    layers = max(placement.layers(stage) for stage in range(parallel.pipeline))
    times = work.micro_batches
    stages = [_stage_flops(placement, work, stage, passes) for stage in range(parallel.pipeline)]
    rate = chip.bf16 * efficiency
    busiest = max(stages) / rate
    across = chip.link if placement.world_size <= NODE else chip.network
    tensor = moved.tensor * layers / (within * LINKS)
    context = moved.context * layers / (within * LINKS)
    waits = (parallel.pipeline - 1) / parallel.chunks
    optimizer = max(state_bytes(placement, stage).optimizer for stage in range(parallel.pipeline))
    return StepTime(
        compute=times * busiest,
        bubble=waits * (busiest + tensor + context),
        tensor=times * tensor,
        context=times * context,
        pipeline=2 * times * moved.pipeline / (across * LINKS),
        data=moved.data / (across * LINKS),
        update=UPDATE_BYTES * optimizer / chip.bandwidth,
    )


def _stage_flops(placement: Placement, work: Work, stage: int, passes: int) -> float:
    """Return the operations of one micro-batch on one rank of a stage."""
    parallel = placement.parallel
    run = forward_flops(
        placement.shape,
        work.padded_tokens,
        work.visible_keys + work.padded_tokens - work.tokens,
        work.scored,
        vocabulary=padded_vocabulary(placement),
    )
    layers = layers_executed(placement, run) + passes * (run.layers + run.attention)
    found = layers * placement.layers(stage) / placement.shape.num_layers
    if placement.chunks(stage)[-1].ends:
        found += (1 + passes + LINEAR_BACKWARD) * run.head
    return found / (placement.data * work.micro_batches * parallel.tensor * parallel.context)


def mfu(placement: Placement, flops: StepFlops, seconds: float, chip: Chip) -> float:
    """Return the model's operations per second over the peak of all ranks."""
    return flops.model / (seconds * placement.world_size * chip.bf16)


def one_pass_seconds(placement: Placement, work: Work, chip: Chip, efficiency: float = EFFICIENCY) -> float:
    """Estimate one forward pass over a step's packs: what a cached reference costs for each step, once."""
    train = replace(placement, recompute_layers=0, recompute_modules=())
    scored = step_flops(train, work, 1).executed - step_flops(train, work, 0).executed
    return scored / (chip.bf16 * efficiency * placement.world_size)
