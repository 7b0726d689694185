"""What a step computes: packs, tokens, what each token sees, what is scored. From real data, or taken as full.

Shapes: B samples of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_align.config import RunConfig
from megatron_align.config.objectives import COUPLED, BCOConfig, DPOConfig, KTOConfig, ORPOConfig
from megatron_align.cost.flops import (
    executed_flops,
    forward_flops,
    model_flops,
    padded_vocabulary,
)
from megatron_align.cost.placement import Placement
from megatron_align.data.batching.packing import attention_cost, plan_step, visible_keys
from megatron_align.data.batching.step_batches import StepCounts, scored_rows, seen_in_samples, step_order
from megatron_align.data.store import TokenStore

SAMPLED_STEPS = 8  # looked at, spread over the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step, over all data-parallel ranks.

    Args:
        samples: of the step.
        micro_batches: per rank.
        pack_tokens: padded length of every pack.
        tokens: of samples, as they are laid.
        visible_keys: pairs of a token and a token it sees, within samples.
        scored: rows that meet the vocabulary; for a reward model completions.
        padded_tokens: computed, over all packs.
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
        """Return the work of a step that is trained, from what its packs were counted to hold."""
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
    reward = config.objective.name == "reward"

    def work(placement: Placement) -> list[Work]:
        samples = config.train.global_batch_size or max(1, config.train.global_batch_tokens // length)
        rounds = placement.data * placement.micro_batch_multiple
        micro_batches = -(-samples // rounds) * placement.micro_batch_multiple
        padded = -(-length // placement.token_multiple) * placement.token_multiple
        return [
            Work(
                samples=samples,
                micro_batches=micro_batches,
                pack_tokens=padded,
                tokens=samples * length,
                visible_keys=samples * visible_keys(0, [length]),
                scored=samples * (2 if reward else length),
                padded_tokens=placement.data * micro_batches * padded,
            )
        ]

    return work


def of_store(store: TokenStore, config: RunConfig) -> WorkOf:
    """Return some steps of a run over tokenised data, spread evenly, as they would lie on a layout."""
    data, train = config.data, config.train
    order = step_order(store, data, train, data.train)
    steps = train.steps or order.steps
    picked = np.unique(np.linspace(0, steps - 1, min(SAMPLED_STEPS, steps)).astype(int)).tolist()
    samples = [order.samples(step) for step in picked]
    lengths_S = store.lengths if data.share_prefix else store.duplicated_lengths
    seen_S = seen_in_samples(store, data.share_prefix)
    seen = [int(seen_S[samples_B].sum()) for samples_B in samples]

    @lru_cache(maxsize=256)
    def lie(ranks: int, multiple: int, rounds: int) -> list[Work]:
        return [
            _lie(store, config, samples_B, lengths_S, (ranks, multiple, rounds), keys)
            for samples_B, keys in zip(samples, seen, strict=True)
        ]

    return lambda placement: lie(placement.data, placement.token_multiple, placement.micro_batch_multiple)


def _lie(  # noqa: PLR0913 - one call, of what is known of one step
    store: TokenStore,
    config: RunConfig,
    samples_B: np.ndarray,
    lengths_S: np.ndarray,
    share: tuple[int, int, int],
    seen: int,
) -> Work:
    ranks, multiple, rounds = share
    lengths_B, counts_B = lengths_S[samples_B], store.completion_counts[samples_B]
    costs_B = attention_cost(
        store.lengths[samples_B], store.prompt_lengths[samples_B], counts_B, config.data.share_prefix
    )
    plan = plan_step(
        lengths_B,
        ranks,
        config.data.sequence_length,
        multiple,
        config.data.packing,
        rounds,
        costs_B=costs_B,
    )
    reward = config.objective.name == "reward"
    micro_batches = len(plan.packs[0])
    return Work(
        samples=len(samples_B),
        micro_batches=micro_batches,
        pack_tokens=plan.tokens,
        tokens=int(lengths_B.sum()),
        visible_keys=seen,
        scored=int(counts_B.sum()) if reward else scored_rows(store, samples_B, scores_prompt(config)),
        padded_tokens=ranks * micro_batches * plan.tokens,
    )


def scores_prompt(config: RunConfig) -> bool:
    """Return whether prompts are scored too: ORPO's likelihood may be of them."""
    return isinstance(config.objective, ORPOConfig) and config.objective.nll_over == "prompt_and_chosen"


def scoring_passes(config: RunConfig) -> int:
    """Return the forward passes of a step besides the training: of a live reference, and of what is looked at ahead."""
    objective = config.objective
    mismatched = isinstance(objective, KTOConfig) and objective.loss_type == "kto"
    coupled = isinstance(objective, DPOConfig) and any(name in COUPLED for name in objective.loss_types)
    ahead = int(mismatched or coupled or isinstance(objective, BCOConfig))
    if objective.compares and config.reference.mode == "live":
        return ahead + 1 + mismatched
    return ahead


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Operations of a step over all ranks, see :mod:`megatron_align.cost.flops`."""

    model: float
    executed: float


def step_flops(placement: Placement, work: Work, passes: int) -> StepFlops:
    """Return the operations of a step; ``passes``: see :func:`scoring_passes`."""
    shape = placement.shape
    needed = forward_flops(shape, work.tokens, work.visible_keys, work.scored)
    run = forward_flops(
        shape,
        work.padded_tokens,
        work.visible_keys + work.padded_tokens - work.tokens,  # a padded token sees itself
        work.scored,
        vocabulary=padded_vocabulary(placement),
    )
    return StepFlops(
        model=model_flops(needed) + passes * needed.total,
        executed=executed_flops(placement, run) + passes * run.total,
    )


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
