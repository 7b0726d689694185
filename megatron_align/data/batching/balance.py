"""Balance load over data-parallel ranks: level attention cost over the ranks and tokens over their packs.

Long samples decide the cost and short ones are many: so the long ones are placed by cost, the short ones fill up by
tokens, and :mod:`.swaps` evens out what is left.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from megatron_align.data.batching.swaps import Groups

# Tuned on lognormal chat lengths (benchmarks/packing.py), in thousandths of a step's or a rank's tokens or cost.
# The shortest samples with this share of the tokens are held back to level the packs in the end: the fewer are held
# back, the more level is the cost, so the first share that levels the packs is taken.
HOLDBACK_PERMILLE = (10, 50, 200)
# A rank may have this much more than the mean tokens while the cost is levelled.
TOKEN_SLACK_PERMILLE = 5
# The shortest samples with this share of the tokens give the price of a token with which a rank's room is filled up.
FILLER_PERMILLE = 100
# A rank that costs more than this share of the mean (a long sample leaves it room for few others) is relieved if it
# can be: then the other ranks take more tokens.
COST_GOAL_PERMILLE = 1050
# When relieving: most tokens of a rank, in shares of the mean; and slack and holdback of the first assignment.
TOKEN_LIMIT_PERMILLE = 1020
LOOSE_TOKEN_SLACK_PERMILLE = 19
LOOSE_HOLDBACK_PERMILLE = 1
# When relieving: packs may be padded until samples fill no more than this share of them.
MIN_FILL_PERMILLE = 980


class StepSamples(NamedTuple):
    """Sizes of a step's samples; ``longest_first`` are their indices, sorted."""

    lengths: list[int]
    costs: list[int]
    longest_first: list[int]


def fullest(lengths: list[int], packs: list[list[int]]) -> int:
    """Return the tokens of the fullest pack."""
    return max(sum(lengths[i] for i in pack) for pack in packs)


def spread_evenly(lengths: list[int], longest_first: list[int], packs: int) -> list[list[int]]:
    """Put the samples, longest first, each into the pack with the fewest tokens: fast, and close to the shortest."""
    filled: list[list[int]] = [[] for _ in range(packs)]
    load = [(0, pack) for pack in range(packs)]
    for i in longest_first:
        tokens, pack = load[0]
        filled[pack].append(i)
        heapq.heapreplace(load, (tokens + lengths[i], pack))
    return filled


def level_cost_over_ranks(
    samples: StepSamples, ranks: int, micro_batches: int, rooms: tuple[int, int]
) -> list[list[int]] | None:
    """Return packs, rank after rank: cost level over ranks, tokens level over packs; None if none fit.

    Packs within the first of ``rooms`` tokens are tried; where their cost is above its goal and need not be, or none
    fit, packs within the second.
    """
    lengths, costs, _ = samples
    tries = (
        _packs_of_ranks(lengths, _assign(samples, ranks, TOKEN_SLACK_PERMILLE, holdback), micro_batches)
        for holdback in HOLDBACK_PERMILLE
    )
    tight = next((packs for packs in tries if fullest(lengths, packs) <= rooms[0]), None)
    goal = sum(costs) * COST_GOAL_PERMILLE // (1000 * ranks)
    costliest = goal if tight is None else _costliest(costs, tight, micro_batches)
    if tight is not None and (costliest <= goal or _least_cost(samples, ranks) > goal):
        return tight
    slack = rooms[1] * micro_batches * ranks * 1000 // max(sum(lengths), 1) - 1000
    slack = min(LOOSE_TOKEN_SLACK_PERMILLE, slack)
    loose = _relieve(
        samples,
        _assign(samples, ranks, slack, LOOSE_HOLDBACK_PERMILLE),
        goal,
        micro_batches,
        rooms[1],
    )
    if loose is None or (tight is not None and _costliest(costs, loose, micro_batches) >= costliest):
        return tight
    return loose


def _costliest(costs: list[int], packs: list[list[int]], micro_batches: int) -> int:
    by_rank = (packs[at : at + micro_batches] for at in range(0, len(packs), micro_batches))
    return max(sum(costs[i] for pack in some for i in pack) for some in by_rank)


def _least_cost(samples: StepSamples, ranks: int) -> int:
    """Return the least cost of the rank with the longest sample, no other having over TOKEN_LIMIT_PERMILLE tokens."""
    lengths, costs, (longest, *others) = samples
    tokens = sum(lengths)
    missing = tokens - tokens * TOKEN_LIMIT_PERMILLE * (ranks - 1) // (1000 * ranks) - lengths[longest]
    cost = costs[longest]
    for i in reversed(others):  # the shortest
        if missing <= 0:
            break
        cost += costs[i] * min(lengths[i], missing) // max(lengths[i], 1)
        missing -= lengths[i]
    return cost


def _relieve(
    samples: StepSamples, of_rank: list[list[int]], goal: int, micro_batches: int, room: int
) -> list[list[int]] | None:
    """Swap samples until no rank costs more than ``goal``, as far as possible; None if the packs have no room."""
    lengths, costs, _ = samples
    limit = min(sum(lengths) * TOKEN_LIMIT_PERMILLE // (1000 * len(of_rank)), micro_batches * room)
    lengths_B, costs_B = np.array(lengths), np.array(costs)
    Groups(of_rank, lengths_B, np.zeros_like(lengths_B), 0).lighten(limit)
    Groups(of_rank, costs_B, lengths_B, limit).lighten(goal)
    packs = []
    for some in of_rank:
        even = spread_evenly(lengths, sorted(some, key=lambda i: (-lengths[i], i)), micro_batches)
        if not Groups(even, lengths_B, np.zeros_like(lengths_B), 0).lighten(room):
            return None
        packs += even
    return packs


def _packs_of_ranks(lengths: list[int], of_rank: list[list[int]], micro_batches: int) -> list[list[int]]:
    """Spread the samples of each rank over its packs."""
    return [pack for some in of_rank for pack in spread_evenly(lengths, some, micro_batches)]


def _assign(samples: StepSamples, ranks: int, slack: int, holdback: int) -> list[list[int]]:
    """Return the samples of every rank, longest first: cost level, tokens nearly so.

    Longest first, each sample goes to a rank whose share of the tokens (and ``slack`` thousandths more) has room for
    it; the shortest samples, with ``holdback`` thousandths of the tokens, go to the ranks that are emptiest then.
    """
    lengths, _, longest_first = samples
    count, tokens_held_back = _shortest(samples, holdback)
    share = (sum(lengths) - tokens_held_back) * (1000 + slack) // (1000 * ranks)
    of_rank = _assign_by_cost(samples, longest_first[: len(lengths) - count], share, ranks)
    load = [(sum(lengths[i] for i in some), rank) for rank, some in enumerate(of_rank)]
    heapq.heapify(load)
    for i in longest_first[len(lengths) - count :]:
        tokens, rank = load[0]
        of_rank[rank].append(i)
        heapq.heapreplace(load, (tokens + lengths[i], rank))
    return of_rank


def _shortest(samples: StepSamples, permille: int, among: list[int] | None = None) -> tuple[int, int]:
    """Return how many of the shortest samples have at most this share of all tokens, and their tokens."""
    longest_first = samples.longest_first if among is None else among
    limit, count, tokens = permille * sum(samples.lengths) // 1000, 0, 0
    for i in reversed(longest_first):
        if tokens + samples.lengths[i] > limit:
            break
        count, tokens = count + 1, tokens + samples.lengths[i]
    return count, tokens


def _assign_by_cost(
    samples: StepSamples, longest_first: list[int], share: int, ranks: int
) -> list[list[int]]:
    """Give each sample to the rank that will cost the least, of those that have room for it within ``share``.

    The expected cost of a rank is that of its samples and of filling its room with short ones. Where none has
    room, the one with the most takes it; a rank without samples always has room.
    """
    lengths, costs, _ = samples
    count, tokens = _shortest(samples, FILLER_PERMILLE, longest_first)
    price = sum(costs[i] for i in longest_first[len(longest_first) - count :]) // max(tokens, 1)
    of_rank: list[list[int]] = [[] for _ in range(ranks)]
    room, bill = [share] * ranks, [share * price] * ranks
    ready = [(bill[rank], rank) for rank in range(ranks)]
    # (-room, rank): had no room for the sample before; a shorter one may fit
    full: list[tuple[int, int]] = []
    for i in longest_first:
        while full and -full[0][0] >= lengths[i]:
            rank = heapq.heappop(full)[1]
            heapq.heappush(ready, (bill[rank], rank))
        while ready and of_rank[ready[0][1]] and room[ready[0][1]] < lengths[i]:
            rank = heapq.heappop(ready)[1]
            heapq.heappush(full, (-room[rank], rank))
        rank = heapq.heappop(ready or full)[1]
        of_rank[rank].append(i)
        room[rank] -= lengths[i]
        bill[rank] += costs[i] - lengths[i] * price
        heapq.heappush(ready, (bill[rank], rank))
    return of_rank
