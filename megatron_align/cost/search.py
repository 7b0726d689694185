"""Layouts that fit, quickest first; and what is missing where none does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from megatron_align.config import RunConfig
from megatron_align.cost.activations import stage_bytes
from megatron_align.cost.chips import Chip
from megatron_align.cost.memory import StageMemory, stage_memory
from megatron_align.cost.placement import Placement
from megatron_align.cost.time import EFFICIENCY, NODE, StepTime, step_time
from megatron_align.cost.work import Work, WorkOf, mean, scoring_passes
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape
from megatron_align.model.policy import transformer_config

MOST_GPUS = 4096  # looked at where nothing fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout, what it holds and how long its step takes.

    Args:
        placement: of the model.
        work: the mean step.
        memory: of each pipeline stage.
        time: of a step.
        kept: peak bytes if nothing was recomputed; None: nothing is.
    """

    placement: Placement
    work: Work
    memory: tuple[StageMemory, ...]
    time: StepTime
    kept: int | None

    @property
    def peak(self) -> int:
        """Bytes of the fullest stage."""
        return max(stage.total for stage in self.memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is planned for.

    Args:
        config: of the run.
        shape: of the model that is trained.
        gpus: how many.
        bytes: of each.
        chip: what they are.
        work: of a step on a placement.
        efficiency: see :func:`megatron_align.cost.time.step_time`.
    """

    config: RunConfig
    shape: ModelShape
    gpus: int
    bytes: int
    chip: Chip
    work: WorkOf
    efficiency: float = EFFICIENCY


def evaluate(ask: Ask, placement: Placement) -> Candidate:
    """Return what a placement costs, its recompute_layers as given."""
    work = mean(ask.work(placement))
    config = ask.config
    return Candidate(
        placement=placement,
        work=work,
        memory=memory_of(config, placement, work.micro_batches),
        time=step_time(placement, work, ask.chip, scoring_passes(config), ask.efficiency),
        kept=None,
    )


def memory_of(config: RunConfig, placement: Placement, micro_batches: int) -> tuple[StageMemory, ...]:
    """Return the memory of each stage with packs as long as they may become."""
    multiple = placement.token_multiple
    tokens = -(-config.data.sequence_length // multiple) * multiple
    live = config.objective.compares and config.reference.mode == "live"
    return tuple(
        stage_memory(placement, stage, tokens, micro_batches, live_reference=live)
        for stage in range(placement.parallel.pipeline)
    )


def candidates(ask: Ask) -> list[Candidate]:
    """Return every layout that the model divides over, with the recomputation it needs; quickest first."""
    found = [_with_recompute(ask, placement) for placement in _placements(ask)]
    return sorted(found, key=lambda one: (one.time.total, one.peak))


def best(ask: Ask, count: int) -> list[Candidate]:
    """Return the quickest layouts that fit, one of each tensor x pipeline x context."""
    found: dict[tuple[int, int, int], Candidate] = {}
    for one in candidates(ask):
        parallel = one.placement.parallel
        key = (parallel.tensor, parallel.pipeline, parallel.context)
        if one.peak <= ask.bytes and key not in found:
            found[key] = one
    return list(found.values())[:count]


def enough(ask: Ask) -> Candidate | None:
    """Return the quickest layout on the fewest GPUs that suffice, doubling from ``ask.gpus``; None: none found."""
    gpus = ask.gpus * 2
    while gpus <= MOST_GPUS:
        if fitting := best(replace(ask, gpus=gpus), 1):
            return fitting[0]
        gpus *= 2
    return None


def _with_recompute(ask: Ask, placement: Placement) -> Candidate:
    """Keep activations where they fit; else checkpoint the number of layers that holds least."""
    kept = evaluate(ask, placement)
    if kept.peak <= ask.bytes:
        return kept
    per_chunk = placement.chunks(0)[0].layers
    choices = [replace(placement, recompute_layers=k) for k in _divisors(per_chunk)]

    def held(one: Placement) -> int:
        whole = stage_bytes(one, 0, ask.config.data.sequence_length, kept.work.micro_batches)
        return whole.held + whole.recomputed

    return replace(evaluate(ask, min(choices, key=held)), kept=kept.peak)


def _placements(ask: Ask) -> Iterator[Placement]:
    """Yield the layouts that the GPUs and the model divide over."""
    layers, tokens = ask.shape.num_layers, ask.config.data.sequence_length
    powers = [2**i for i in range(ask.gpus.bit_length())]
    for tensor in (n for n in powers if n <= NODE):
        for pipeline in _divisors(layers):
            for context in (n for n in powers if n * 1024 <= tokens or n == 1):
                model_ranks = tensor * pipeline * context
                if ask.gpus % model_ranks:
                    continue
                for chunks in _chunks(layers, pipeline):
                    placement = _placement(ask, tensor, pipeline, context, chunks)
                    if placement is not None:
                        yield placement


def _placement(ask: Ask, tensor: int, pipeline: int, context: int, chunks: int | None) -> Placement | None:
    """Return the placement, or None where a run would refuse it: by the run's own checks."""
    config, given = ask.config, ask.config.parallel
    several = ask.gpus > tensor * pipeline * context
    try:
        parallel = replace(
            given,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            context_kind=config.parallel.context_kind if context > 1 else "auto",
            virtual_pipeline=chunks,
            sequence=True,
            first_stage_layers=None,
            last_stage_layers=None,
            count_embedding=False,
            count_loss=False,
            overlap_grad_reduce=given.overlap_grad_reduce and several,
            overlap_param_gather=given.overlap_param_gather and several,
            overlap_p2p=given.overlap_p2p and chunks is not None,
        )
        placement = Placement(
            shape=ask.shape,
            parallel=parallel,
            data=parallel.data_parallel(ask.gpus),
            precision=config.train.precision,
        )
        transformer_config(ask.shape, parallel, torch.bfloat16)  # what divides is the same in every precision
    except InputError:
        return None
    return placement


def _chunks(layers: int, pipeline: int) -> list[int | None]:
    if pipeline == 1:
        return [None]
    return [None, *(n for n in _divisors(layers // pipeline) if 2 <= n <= 8)]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
