"""The steps of a run's data, as this rank sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.context_parts import ContextRank
from megatron_align.data.batching.packing import PackOptions
from megatron_align.data.batching.rollout_order import train_order
from megatron_align.data.batching.sampler import step_order
from megatron_align.data.batching.step_batches import DataRank, Packs, Step, StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import ModelShape
from megatron_align.model.fp8 import token_multiple
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.transfer import pinned
from megatron_align.objectives.base import Objective
from megatron_align.training.setup import RunSetup, one_epoch


def pin_step(step: Step) -> Step:
    """Return a step whose packs lie in pinned memory, from which they are copied to the GPU without a wait."""

    def pin(packs: Packs) -> Packs:
        return replace(packs, batches=[pinned(batch) for batch in packs.batches])

    return replace(step, packs=pin(step.packs), mismatched=step.mismatched and pin(step.mismatched))


def pack_multiples(layout: ParallelConfig, fp8: str | None = None) -> tuple[int, int]:
    """Return ``multiple`` and ``micro_batch_multiple`` of :class:`PackOptions` that a layout needs.

    Args:
        layout: of the run.
        fp8: recipe of the run; None: FP8 is off.
    """
    # The interleaved schedule needs micro-batches in multiples of the pipeline's length.
    return token_multiple(layout, fp8), layout.pipeline if layout.chunks > 1 else 1


def data_rank(shape: ModelShape, layout: ParallelConfig, groups: ProcessGroupCollection) -> DataRank:
    """Return this rank as packs are made for it."""
    kind = context_kind_of(shape, layout)
    return DataRank(
        ranks=groups.dp.size(),
        rank=groups.dp.rank(),
        context=kind and ContextRank(ranks=groups.cp.size(), rank=groups.cp.rank(), kind=kind),
    )


def pack_options(setup: RunSetup, objective: Objective) -> PackOptions:
    """Return how a run's samples are laid into packs."""
    config = setup.config
    multiple, micro_batch_multiple = pack_multiples(config.parallel, KernelChoice.of_run(config).fp8)
    return PackOptions.of_data(
        config.data,
        score_prompt=objective.score_prompt,
        multiple=multiple,
        micro_batch_multiple=micro_batch_multiple,
    )


def batches_of_split(
    split: str,
    setup: RunSetup,
    objective: Objective,
    groups: ProcessGroupCollection,
    with_reference: Callable[[TokenStore], TokenStore] | None = None,
) -> StepBatches:
    """Return the steps of ``train`` (all of the run) or ``validation`` (one pass over its data).

    Args:
        split: ``train`` or ``validation``.
        setup: of the run.
        objective: of the run.
        groups: of this rank.
        with_reference: adds the reference's cached columns to the split's store; None: there are none.
    """
    config, options = setup.config, pack_options(setup, objective)
    rank = data_rank(setup.shape, config.parallel, groups)
    store: TokenStore = getattr(setup, split)
    if split == "train":
        order = train_order(store, config)
    else:
        assert config.data.validation is not None, "it has a store"
        order = step_order(store, config.data, one_epoch(config.train), config.data.validation)
    if with_reference is not None:
        store = with_reference(store)
    mismatched = "mismatched_logprobs" in objective.needs
    drops = split == "train" and setup.adapter is not None and setup.adapter.dropout > 0
    batches = StepBatches(store, order, options, rank, objective.normalization, mismatched=mismatched)
    batches.dropout_seed = config.train.seed if drops else None
    return batches
