"""Which samples make step s, and how they lie on the ranks: pure functions, the same on every rank.

The order of the samples depends on (seed, epoch, index) only. A step is a set of samples; a plan spreads it
over ``ranks x micro-batches`` packs, so a change of layout changes the plan but never the step.

Shapes: B samples of one step, S samples of the data set.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Where every sample of a step lies.

    ``packs[rank][micro_batch]`` holds positions into the step's samples (int64, ascending, perhaps none).
    """

    packs: list[list[np.ndarray]]
    tokens: int  # padded length of every pack of the step


def count_steps(total: int, batch: int, epochs: int) -> int:
    """Return the steps of ``batch`` samples that cover ``epochs`` passes over ``total`` samples."""
    return -(-epochs * total // batch)


def samples_of_step(
    step: int, *, total: int, batch: int, seed: int = 0, shuffle: bool = True, epochs: int | None = None
) -> np.ndarray:
    """Return the indices (int64) of the samples of a 0-based step, in order.

    Epochs follow each other without a seam. With ``epochs`` the last step takes what is left (and no step
    comes after it); without, every step has ``batch`` samples.

    Raises:
        ValueError: if ``total`` or ``batch`` is not positive, or the step lies outside of the run.
    """
    end = (step + 1) * batch if epochs is None else min((step + 1) * batch, epochs * total)
    if total < 1 or batch < 1 or step < 0 or step * batch >= end:
        raise ValueError(
            f"samples_of_step needs a step of the run; got {step=}, {total=}, {batch=}, {epochs=}"
        )
    epoch_B, place_B = np.divmod(np.arange(step * batch, end, dtype=np.int64), total)
    if not shuffle:
        return place_B
    samples_B = np.empty_like(place_B)
    for epoch in np.unique(epoch_B):
        samples_B[epoch_B == epoch] = _permutation(seed, int(epoch), total)[place_B[epoch_B == epoch]]
    return samples_B


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, total: int) -> np.ndarray:
    """Sort raw random words: unlike a library's shuffle, these are fixed for good by the generator's name."""
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(total)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def plan_step(
    lengths_B: np.ndarray,
    ranks: int,
    capacity: int,
    multiple: int = 1,
    packing: bool = True,
    micro_batch_multiple: int = 1,
) -> StepPlan:
    """Spread the samples of a step over ``ranks x micro-batches`` packs.

    Takes the fewest micro-batches into which the samples fit (by best fit decreasing), balances tokens over
    the packs (ties: sum of length^2), then sum of length^2 over the ranks. The same arguments give the same
    plan.

    Args:
        lengths_B: tokens of each sample.
        ranks: data-parallel ranks.
        capacity: most tokens of samples in one pack.
        multiple: every pack's padded length is a multiple of this.
        packing: several samples per pack; False: at most one.
        micro_batch_multiple: micro-batches per rank are a multiple of this (interleaved pipelines need it).

    Raises:
        ValueError: if a sample is longer than ``capacity``, or a size is not positive.
    """
    lengths = [int(length) for length in lengths_B]
    if min(ranks, capacity, multiple, micro_batch_multiple) < 1 or max(lengths, default=0) > capacity:
        raise ValueError(
            f"plan_step needs positive sizes and samples within capacity; got {ranks=}, {capacity=}, "
            f"{multiple=}, {micro_batch_multiple=}, longest sample {max(lengths, default=0)}"
        )
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    packs = _tight(lengths, longest_first, capacity) if packing else [[i] for i in longest_first]
    rounds = max(1, -(-len(packs) // (ranks * micro_batch_multiple)))
    micro_batches = rounds * micro_batch_multiple
    if packing:
        even = _even(lengths, longest_first, ranks * micro_batches)
        packs = even if _fullest(lengths, even) <= capacity else packs
    packs += [[] for _ in range(ranks * micro_batches - len(packs))]
    padded = max(1, -(-_fullest(lengths, packs) // multiple)) * multiple
    return StepPlan(_deal(lengths, packs, ranks), padded)


def _fullest(lengths: list[int], packs: list[list[int]]) -> int:
    return max(sum(lengths[i] for i in pack) for pack in packs)


def _even(lengths: list[int], longest_first: list[int], packs: int) -> list[list[int]]:
    """Longest first, each into the pack with the fewest tokens (ties: the least sum of length^2)."""
    filled: list[list[int]] = [[] for _ in range(packs)]
    load = [(0, 0, pack) for pack in range(packs)]
    for i in longest_first:
        tokens, cost, pack = load[0]
        filled[pack].append(i)
        heapq.heapreplace(load, (tokens + lengths[i], cost + lengths[i] ** 2, pack))
    return filled


def _tight(lengths: list[int], longest_first: list[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the fullest pack that still takes it (best fit decreasing)."""
    filled: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for i in longest_first:
        at = bisect_left(free, (lengths[i], 0))
        room, pack = free.pop(at) if at < len(free) else (capacity, len(filled))
        if pack == len(filled):
            filled.append([])
        filled[pack].append(i)
        insort(free, (room - lengths[i], pack))
    return filled


def _deal(lengths: list[int], packs: list[list[int]], ranks: int) -> list[list[np.ndarray]]:
    """Give every rank the same number of packs, the costliest first, each to the rank with the least cost."""
    cost = [sum(lengths[i] ** 2 for i in pack) for pack in packs]
    dealt: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    spent = [(0, rank) for rank in range(ranks)]
    for pack in sorted(range(len(packs)), key=lambda p: (-cost[p], p)):
        total, rank = heapq.heappop(spent)
        dealt[rank].append(np.array(sorted(packs[pack]), dtype=np.int64))
        if len(dealt[rank]) < len(packs) // ranks:
            heapq.heappush(spent, (total + cost[pack], rank))
    return dealt
