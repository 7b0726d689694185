"""The work of a step: packs, tokens, visible keys, scored rows, pre-pass. From tokenised data, or of full packs.

Shapes: B samples of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_align.config import RunConfig
from megatron_align.cost.flops import (
    Trained,
    executed_flops,
    forward_flops,
    model_flops,
    padded_vocabulary,
)
from megatron_align.cost.placement import Placement
from megatron_align.data.batching.attention_cost import visible_keys
from megatron_align.data.batching.packing import PackOptions, packed_lengths, plan_samples
from megatron_align.data.batching.rollout_order import train_order
from megatron_align.data.batching.sampler import EpochOrder, SampleSteps
from megatron_align.data.batching.step_batches import StepCounts, scored_rows
from megatron_align.data.sample_table import SampleTable
from megatron_align.objectives.base import SCORED_BY
from megatron_align.objectives.registry import (
    build_objective,
    has_critic,
    objective_class,
    reference_mode,
)

SAMPLED_STEPS = 8  # of a run, evenly spread
CRITIC_PASSES = 1  # forward passes of a critic besides training: its values of the rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step, over all data-parallel ranks.

    Args:
        samples: of the step.
        micro_batches: per rank.
        pack_tokens: padded length of every pack.
        tokens: of samples, as packs hold them.
        visible_keys: pairs of a token and a token that it attends to, within samples.
        scored: rows that are projected onto the vocabulary; for a reward model completions.
        padded_tokens: computed tokens of all packs, padding included.
    """

    samples: int
    micro_batches: int
    pack_tokens: int
    tokens: int
    visible_keys: int
    scored: int
    padded_tokens: int

    @classmethod
    def of_counts(cls, counts: StepCounts, ranks: int, *, reward: bool) -> Work:
        """Return the work of a step that was trained, from the counts of its packs."""
        return cls(
            samples=counts.samples,
            micro_batches=counts.micro_batches,
            pack_tokens=counts.padded_tokens // (ranks * counts.micro_batches),
            tokens=counts.laid_tokens,
            visible_keys=counts.visible_keys,
            scored=counts.completions if reward else counts.scored_rows,
            padded_tokens=counts.padded_tokens,
        )


WorkOf = Callable[[Placement], list[Work]]


def full_packs(config: RunConfig) -> WorkOf:
    """Return steps whose every pack is one document of data.sequence_length tokens, all of them scored."""
    length = config.data.sequence_length
    reward = objective_class(config.objective.name).trains_reward_model

    def work(placement: Placement) -> list[Work]:
        samples = config.train.global_batch_size or max(1, (config.train.global_batch_tokens or 0) // length)
        rounds = placement.data * placement.micro_batch_multiple
        micro_batches = -(-samples // rounds) * placement.micro_batch_multiple
        padded = -(-length // placement.token_multiple) * placement.token_multiple
        return [
            Work(
                samples=samples,
                micro_batches=micro_batches,
                pack_tokens=padded,
                tokens=samples * length,
                visible_keys=samples * int(visible_keys([0], [1], [length]).sum()),
                scored=samples * (2 if reward else length),
                padded_tokens=placement.data * micro_batches * padded,
            )
        ]

    return work


def of_store(store: SampleTable, config: RunConfig) -> WorkOf:
    """Return some steps of a run over tokenised data, spread evenly, as any layout would pack them."""
    data = config.data
    order = train_order(store, config)
    steps = order.steps
    picked = np.unique(np.linspace(0, steps - 1, min(SAMPLED_STEPS, steps)).astype(int)).tolist()
    shared = data.share_prefix
    seen_S = visible_keys(store.prompt_lengths, store.completion_counts, store.completion_lengths, shared)
    objective = build_objective(config.objective)

    def counted(samples_B: np.ndarray) -> _StepSamples:
        scored = (
            int(store.completion_counts[samples_B].sum())
            if objective.trains_reward_model
            else scored_rows(store, samples_B, objective.score_prompt)
        )
        tokens = int(packed_lengths(store, shared)[samples_B].sum())
        return _StepSamples(samples_B, tokens, int(seen_S[samples_B].sum()), scored)

    sampled = [counted(order.samples(step)) for step in picked]

    @lru_cache(maxsize=256)
    def packed(ranks: int, options: PackOptions) -> list[Work]:
        return [_packed(store, step, ranks, options) for step in sampled]

    def of_layout(placement: Placement) -> list[Work]:
        options = PackOptions.of_data(
            data,
            multiple=placement.token_multiple,
            micro_batch_multiple=placement.micro_batch_multiple,
        )
        return packed(placement.data, options)

    return of_layout


def of_ptx(store: SampleTable, config: RunConfig) -> WorkOf:
    """Return the supervised samples of some steps of a run with ``objective.ptx``, as any layout would pack them."""
    order = EpochOrder(store.sources, (1.0,), config.train.seed, config.data.shuffle)
    steps = SampleSteps(order, config.objective.ptx.samples, steps=SAMPLED_STEPS)
    seen_S = visible_keys(store.prompt_lengths, store.completion_counts, store.completion_lengths, True)

    def of_layout(placement: Placement) -> list[Work]:
        options = PackOptions.of_data(
            config.data,
            multiple=placement.token_multiple,
            micro_batch_multiple=placement.micro_batch_multiple,
        )
        samples = [steps.samples(step) for step in range(SAMPLED_STEPS)]
        return [
            _packed(
                store,
                _StepSamples(
                    samples_B,
                    int(store.lengths[samples_B].sum()),
                    int(seen_S[samples_B].sum()),
                    scored_rows(store, samples_B, False),
                ),
                placement.data,
                options,
            )
            for samples_B in samples
        ]

    return of_layout


def steps_and_epochs(store: SampleTable, config: RunConfig) -> tuple[int, float]:
    """Return the number of steps of a run over tokenised data, and how many passes over its data that makes."""
    steps = train_order(store, config).steps
    if config.train.epochs is not None:
        return steps, float(config.train.epochs)
    one = replace(config.train, steps=None, epochs=1)
    return steps, steps / train_order(store, replace(config, train=one)).steps


@dataclass(frozen=True, slots=True)
class _StepSamples:
    """The samples of a step and their counts, the same on any layout."""

    samples_B: np.ndarray
    tokens: int  # in packs
    visible_keys: int
    scored: int


def _packed(store: SampleTable, step: _StepSamples, ranks: int, options: PackOptions) -> Work:
    """Return the work of a step in packs, from the store's index alone."""
    plan = plan_samples(store, step.samples_B, ranks, options)
    micro_batches = len(plan.packs[0])
    return Work(
        samples=len(step.samples_B),
        micro_batches=micro_batches,
        pack_tokens=plan.tokens,
        tokens=step.tokens,
        visible_keys=step.visible_keys,
        scored=step.scored,
        padded_tokens=ranks * micro_batches * plan.tokens,
    )


def scoring_passes(config: RunConfig, of: Sequence[str] = ("policy", "reference")) -> int:
    """Return the forward passes of a step besides training: those of its pre-pass (policy, live reference).

    A critic's are :data:`CRITIC_PASSES`.

    Args:
        config: of the run.
        of: models whose passes count.
    """
    models = [model for model in of if model == "policy" or reference_mode(config) == "live"]
    needs = build_objective(config.objective).needs
    return sum(model in models for need in needs for model in SCORED_BY[need])


def passes_of(config: RunConfig, placement: Placement) -> tuple[int, int]:
    """Return the passes of models of the policy's shape, and those of a reference of another shape."""
    if placement.second.reference is None:
        return scoring_passes(config), 0
    return scoring_passes(config, ["policy"]), scoring_passes(config, ["reference"])


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Operations of a step over all ranks, see :mod:`megatron_align.cost.flops`."""

    model: float
    executed: float

    def __add__(self, other: StepFlops) -> StepFlops:
        """Return the operations of both."""
        return StepFlops(self.model + other.model, self.executed + other.executed)


def step_flops(placement: Placement, work: Work, passes: int) -> StepFlops:
    """Return the operations of a step; ``passes``: see :func:`scoring_passes`."""
    shape = placement.shape
    needed = forward_flops(shape, work.tokens, work.visible_keys, work.scored, adapter=placement.adapter)
    run = forward_flops(
        shape,
        work.padded_tokens,
        work.visible_keys + work.padded_tokens - work.tokens,  # a padded token sees itself
        work.scored,
        vocabulary=padded_vocabulary(placement),
        adapter=placement.adapter,
    )
    return StepFlops(
        model=model_flops(needed, Trained.of(placement)) + passes * needed.total,
        executed=executed_flops(placement, run) + passes * run.total,
    )


def flops_of(config: RunConfig, placement: Placement, work: Work) -> StepFlops:
    """Return the operations of a run's step: the policy's with its pre-pass, a reference's, and those of a critic."""
    of_policy, of_reference = passes_of(config, placement)
    flops = step_flops(placement, work, of_policy)
    if of_reference:
        once = pass_flops(placement.as_reference(), work)
        flops += StepFlops(of_reference * once.model, of_reference * once.executed)
    if has_critic(config):
        flops += step_flops(placement.as_critic(), work, CRITIC_PASSES)
    return flops


def pass_flops(placement: Placement, work: Work) -> StepFlops:
    """Return the operations of one forward pass over a step."""
    once, none = (step_flops(placement, work, passes) for passes in (1, 0))
    return StepFlops(once.model - none.model, once.executed - none.executed)


def mean(works: Sequence[Work]) -> Work:
    """Return the mean step, rounded; the longest pack and the most micro-batches of all of them."""
    names = ("samples", "tokens", "visible_keys", "scored", "padded_tokens")
    means = {name: round(sum(getattr(work, name) for work in works) / len(works)) for name in names}
    return replace(
        works[0],
        micro_batches=max(work.micro_batches for work in works),
        pack_tokens=max(work.pack_tokens for work in works),
        **means,
    )
