"""Pack a step's samples: spread them over data-parallel ranks x micro-batches, the same computation on every rank.

A change of layout changes the step plan but never which samples make the step (see :mod:`.sampler`). Best fit
decreasing finds how many packs a step needs; :mod:`.balance` then spreads the samples over them, levelling tokens and
attention cost over the ranks.

Shapes: B samples of one step, S samples of the table.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

from megatron_align.config import DataConfig
from megatron_align.data.batching.attention_cost import attention_cost
from megatron_align.data.batching.balance import (
    MIN_FILL_PERMILLE,
    TOKEN_SLACK_PERMILLE,
    StepSamples,
    fullest,
    level_cost_over_ranks,
    spread_evenly,
)
from megatron_align.data.sample_table import SampleTable
from megatron_align.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """How samples are laid into packs.

    Args:
        capacity: most tokens of samples in one pack
        packing: several samples per pack; False: at most one
        share_prefix: a sample's completions share the tokens of its prompt; False: each has its own copy
        score_prompt: prompts are scored too, with the first completion
        multiple: every pack's padded length is a multiple of this
        micro_batch_multiple: micro-batches per rank are a multiple of this (interleaved pipelines need it)
    """

    capacity: int
    packing: bool = True
    share_prefix: bool = True
    score_prompt: bool = False
    multiple: int = 1
    micro_batch_multiple: int = 1

    @classmethod
    def of_data(
        cls,
        data: DataConfig,
        *,
        score_prompt: bool = False,
        multiple: int = 1,
        micro_batch_multiple: int = 1,
    ) -> PackOptions:
        """Return the options of a run's data: its sequence_length, packing and share_prefix, and what is given."""
        return cls(
            capacity=data.sequence_length,
            packing=data.packing,
            share_prefix=data.share_prefix,
            score_prompt=score_prompt,
            multiple=multiple,
            micro_batch_multiple=micro_batch_multiple,
        )


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """The pack of every sample of a step.

    ``packs[rank][micro_batch]`` holds indices into the step's samples (int64, ascending, perhaps none).
    """

    packs: list[list[np.ndarray]]
    tokens: int  # padded length of every pack of the step


def packed_lengths(table: SampleTable, share_prefix: bool) -> np.ndarray:
    """Return the tokens (int64[S]) that each sample takes in a pack."""
    return table.lengths if share_prefix else table.duplicated_lengths


def require_room(table: SampleTable, data: DataConfig) -> None:
    """Check that every sample fits into a pack.

    Raises:
        InputError: if repeated prompts (``data.share_prefix: false``) make one too long.
    """
    longest = int(packed_lengths(table, data.share_prefix).max())
    if longest > data.sequence_length:
        raise InputError(
            f"data.share_prefix: false needs every sample within data.sequence_length = {data.sequence_length} "
            f"tokens with its prompt repeated for each completion, got {longest}"
        )


def plan_samples(table: SampleTable, samples_B: np.ndarray, ranks: int, options: PackOptions) -> StepPlan:
    """Return the step plan of these samples (indices into the table), see :func:`plan_step`."""
    costs_B = attention_cost(
        table.lengths[samples_B],
        table.prompt_lengths[samples_B],
        table.completion_counts[samples_B],
        options.share_prefix,
    )
    return plan_step(packed_lengths(table, options.share_prefix)[samples_B], ranks, options, costs_B)


def plan_step(
    lengths_B: np.ndarray, ranks: int, options: PackOptions, costs_B: np.ndarray | None = None
) -> StepPlan:
    """Spread the samples of a step over ``ranks x micro-batches`` packs.

    Takes the fewest micro-batches into which the samples fit (by best fit decreasing), balances tokens over the
    packs to about a percent (two where a long sample makes the cost uneven), and within that attention cost over
    the ranks. Integers only: the same arguments give the same plan anywhere. No plan can pad less than to the
    longest sample, nor even out a sample that costs more than a rank's share.

    Args:
        lengths_B: tokens of each sample in a pack.
        ranks: data-parallel ranks.
        options: capacity, packing and the two multiples are read.
        costs_B: attention cost of each sample, as :func:`.attention_cost.attention_cost`. Default: length^2.

    Raises:
        ValueError: if a sample is longer than the capacity, or a size is not positive.
    """
    lengths = np.asarray(lengths_B, dtype=np.int64).tolist()
    capacity, multiple = options.capacity, options.multiple
    if min(ranks, capacity, multiple, options.micro_batch_multiple) < 1 or max(lengths, default=0) > capacity:
        raise ValueError(
            f"plan_step needs positive sizes and samples within capacity; got {ranks=}, {options}, "
            f"longest sample {max(lengths, default=0)}"
        )
    costs = [x * x for x in lengths] if costs_B is None else np.asarray(costs_B, dtype=np.int64).tolist()
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -costs[i], i))
    samples = StepSamples(lengths, costs, longest_first)
    packs = _best_fit_decreasing(samples, capacity) if options.packing else [[i] for i in longest_first]
    rounds = max(1, -(-len(packs) // (ranks * options.micro_batch_multiple)))
    micro_batches = rounds * options.micro_batch_multiple
    spread = None
    if options.packing:
        even = spread_evenly(lengths, longest_first, ranks * micro_batches)
        room = min(capacity, fullest(lengths, even) * (1000 + 2 * TOKEN_SLACK_PERMILLE) // 1000)
        filled = sum(lengths) * 1000 // (MIN_FILL_PERMILLE * ranks * micro_batches) // multiple * multiple
        rooms = (room, min(capacity, max(room, filled)))
        spread = level_cost_over_ranks(samples, ranks, micro_batches, rooms)
        packs = even if fullest(lengths, even) <= capacity else packs
    if spread is None:
        packs += [[] for _ in range(ranks * micro_batches - len(packs))]
        spread = _distribute(costs, packs, ranks)
    padded = max(1, -(-fullest(lengths, spread) // multiple)) * multiple
    by_rank = [spread[rank * micro_batches : (rank + 1) * micro_batches] for rank in range(ranks)]
    return StepPlan([[np.array(sorted(p), dtype=np.int64) for p in packs] for packs in by_rank], padded)


def _best_fit_decreasing(samples: StepSamples, capacity: int) -> list[list[int]]:
    """Longest first, each into the fullest pack that still has room for it."""
    filled: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for i in samples.longest_first:
        at = bisect_left(free, (samples.lengths[i], 0))
        room, pack = free.pop(at) if at < len(free) else (capacity, len(filled))
        if pack == len(filled):
            filled.append([])
        filled[pack].append(i)
        insort(free, (room - samples.lengths[i], pack))
    return filled


def _distribute(costs: list[int], packs: list[list[int]], ranks: int) -> list[list[int]]:
    """Return the packs rank after rank, as many for each; the costliest first to the rank with the least cost."""
    cost = [sum(costs[i] for i in pack) for pack in packs]
    of_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    spent = [(0, rank) for rank in range(ranks)]
    for pack in sorted(range(len(packs)), key=lambda p: (-cost[p], p)):
        total, rank = heapq.heappop(spent)
        of_rank[rank].append(packs[pack])
        if len(of_rank[rank]) < len(packs) // ranks:
            heapq.heappush(spent, (total + cost[pack], rank))
    return [pack for some in of_rank for pack in some]
