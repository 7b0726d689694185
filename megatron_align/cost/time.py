"""Estimate the time of a step: FLOPs and bytes over the stated share of a chip's peak rates that is reached.

The estimate serves to compare layouts. It is too low by what it leaves out: memory-bound kernels, kernel launches,
ranks that wait for a slower one. It is too high by communication that overlaps with computation: none is assumed to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_align.cost.chips import Chip
from megatron_align.cost.flops import (
    LINEAR_BACKWARD,
    Trained,
    forward_flops,
    layers_executed,
    padded_vocabulary,
)
from megatron_align.cost.placement import Placement
from megatron_align.cost.state import state_bytes
from megatron_align.cost.traffic import traffic
from megatron_align.cost.work import StepFlops, Work, pass_flops

NODE = 8  # GPUs that share the fast links
# Assumptions that we have not measured.
EFFICIENCY = 0.45  # share of the bf16 peak, averaged over a layer
LINKS = 0.7  # share of a link's bandwidth
UPDATE_BYTES = 2.5  # memory traffic per byte of optimizer state: read, written, gradients read


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step by cause.

    Args:
        compute: matrix products of the busiest stage.
        bubble: pipeline bubble, idle time before the first and after the last micro-batch.
        tensor: tensor-parallel collectives.
        context: context-parallel collectives.
        pipeline: hidden states sent between stages.
        data: gradient reduction and weight all-gather.
        update: optimizer update.
        other: scoring by reward models and a reference of another shape, and supervised samples, of a run on rollouts.
    """

    compute: float
    bubble: float
    tensor: float
    context: float
    pipeline: float
    data: float
    update: float
    other: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: StepTime) -> StepTime:
        """Return the time of both, one after the other."""
        return StepTime(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def shares(self) -> dict[str, float]:
        """Return the share of each cause in the total."""
        return {f.name: getattr(self, f.name) / self.total for f in fields(self)}


def step_time(
    placement: Placement, work: Work, chip: Chip, passes: int = 0, efficiency: float = EFFICIENCY
) -> StepTime:
    """Estimate the time of a step.

    Args:
        placement: model and layout.
        work: work of the step.
        chip: peak rates of every rank's GPU.
        passes: forward passes in addition to training's.
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
    """Return the FLOPs of one micro-batch on one rank of a stage."""
    parallel = placement.parallel
    run = forward_flops(
        placement.shape,
        work.padded_tokens,
        work.visible_keys + work.padded_tokens - work.tokens,
        work.scored,
        vocabulary=padded_vocabulary(placement),
        adapter=placement.adapter,
    )
    layers = layers_executed(placement, run) + passes * (run.layers + run.attention + run.adapter)
    flops = layers * placement.layers(stage) / placement.shape.num_layers
    if placement.chunks(stage)[-1].ends:
        flops += (LINEAR_BACKWARD + passes + Trained.of(placement).head) * run.head
    return flops / (placement.data * work.micro_batches * parallel.tensor * parallel.context)


def mfu(placement: Placement, flops: StepFlops, seconds: float, chip: Chip) -> float:
    """Return the model FLOPs utilisation: the model's FLOPs per second over the peak of all ranks."""
    return flops.model / (seconds * placement.world_size * chip.bf16)


def one_pass_seconds(placement: Placement, work: Work, chip: Chip, efficiency: float = EFFICIENCY) -> float:
    """Estimate the seconds of one forward pass over a step's packs, a cached reference's one-time cost per step."""
    train = replace(placement, recompute_layers=0, recompute_modules=())
    return pass_flops(train, work).executed / (chip.bf16 * efficiency * placement.world_size)
