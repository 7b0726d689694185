"""How a step's samples lie on the ranks: a pure function, computed alike on every rank.

A plan spreads the samples of a step (see ``order``) over ``ranks x micro-batches`` packs, so a change of layout
changes the plan but never the step.

Shapes: B samples of one step.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_align.data.batching.balance import Groups

# Found on lognormal chat lengths (benchmarks/packing.py); parts of a thousand. The shortest samples, with one of
# these shares of the tokens, are kept back to level the packs: the fewer, the more level the cost; the first that
# does is taken.
KEPT_BACK = (10, 50, 200)
PLAY = 5  # in the tokens of a rank, while the cost is levelled
FILLING = 100  # the shortest samples with this share of the tokens tell what room that is left will cost
# Where a rank still costs more than GOAL of the mean (a long sample leaves it room for few others) and need not, the
# other ranks take more tokens, up to MOST_TOKENS of the mean, and packs are padded until TEXT of it all is text.
LOOSE_PLAY, LOOSELY_KEPT_BACK = 19, 1
GOAL, MOST_TOKENS, TEXT = 1050, 1020, 980


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Where every sample of a step lies.

    ``packs[rank][micro_batch]`` holds positions into the step's samples (int64, ascending, perhaps none).
    """

    packs: list[list[np.ndarray]]
    tokens: int  # padded length of every pack of the step


def attention_cost(
    lengths_B: np.ndarray, prompts_B: np.ndarray, completions_B: np.ndarray, shared: bool = True
) -> np.ndarray:
    """Return twice the area (int64) that attention computes for each sample; length^2 for a plain document.

    A prompt of P tokens with k completions c_j costs ``P^2 + 2 P sum(c_j) + sum(c_j^2)``, and k P^2 in place of
    P^2 where each completion computes the prompt again. The c_j are taken as equally long, which is never too
    much: a plan needs no more.

    Args:
        lengths_B: tokens of each sample, its prompt once.
        prompts_B: tokens of its prompt.
        completions_B: number of its completions.
        shared: the prompt is computed once.
    """
    own_B = lengths_B - prompts_B
    times_B = np.ones_like(completions_B) if shared else completions_B
    return times_B * prompts_B**2 + 2 * prompts_B * own_B + own_B**2 // completions_B


def visible_keys(prompt: int, completions: Sequence[int], shared: bool = True) -> int:
    """Return the pairs of a token and a token that it sees (itself among them) in one sample.

    Args:
        prompt: tokens of the prompt; 0 for chat.
        completions: tokens of each completion; of a chat sample, all of its tokens.
        shared: the prompt is computed once for all completions.
    """

    def triangle(tokens: int) -> int:
        return tokens * (tokens + 1) // 2

    if not shared:
        return sum(triangle(prompt + own) for own in completions)
    return triangle(prompt) + sum(own * prompt + triangle(own) for own in completions)


def plan_step(  # noqa: PLR0913 - one call per step; the sizes are scalars that belong together
    lengths_B: np.ndarray,
    ranks: int,
    capacity: int,
    multiple: int = 1,
    packing: bool = True,
    micro_batch_multiple: int = 1,
    *,
    costs_B: np.ndarray | None = None,
) -> StepPlan:
    """Spread the samples of a step over ``ranks x micro-batches`` packs.

    Takes the fewest micro-batches into which the samples fit (by best fit decreasing), balances tokens over the
    packs to about a percent (two where a long sample makes the cost uneven), and within that attention cost over
    the ranks. Whole numbers only: the same arguments give the same plan anywhere. No plan can pad less than to the
    longest sample, nor even out a sample that costs more than a rank's share.

    Args:
        lengths_B: tokens of each sample.
        ranks: data-parallel ranks.
        capacity: most tokens of samples in one pack.
        multiple: every pack's padded length is a multiple of this.
        packing: several samples per pack; False: at most one.
        micro_batch_multiple: micro-batches per rank are a multiple of this (interleaved pipelines need it).
        costs_B: attention cost of each sample, as :func:`attention_cost`. Default: length^2.

    Raises:
        ValueError: if a sample is longer than ``capacity``, or a size is not positive.
    """
    lengths = np.asarray(lengths_B, dtype=np.int64).tolist()
    if min(ranks, capacity, multiple, micro_batch_multiple) < 1 or max(lengths, default=0) > capacity:
        raise ValueError(
            f"plan_step needs positive sizes and samples within capacity; got {ranks=}, {capacity=}, "
            f"{multiple=}, {micro_batch_multiple=}, longest sample {max(lengths, default=0)}"
        )
    costs = [x * x for x in lengths] if costs_B is None else np.asarray(costs_B, dtype=np.int64).tolist()
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], -costs[i], i))
    packs = _tight(lengths, longest_first, capacity) if packing else [[i] for i in longest_first]
    rounds = max(1, -(-len(packs) // (ranks * micro_batch_multiple)))
    micro_batches = rounds * micro_batch_multiple
    dealt = None
    if packing:
        even = _even(lengths, longest_first, ranks * micro_batches)
        room = min(capacity, _fullest(lengths, even) * (1000 + 2 * PLAY) // 1000)
        with_text = sum(lengths) * 1000 // (TEXT * ranks * micro_batches) // multiple * multiple
        rooms = (room, min(capacity, max(room, with_text)))
        dealt = _level(lengths, costs, longest_first, (ranks, micro_batches), rooms)
        packs = even if _fullest(lengths, even) <= capacity else packs
    if dealt is None:
        packs += [[] for _ in range(ranks * micro_batches - len(packs))]
        dealt = _deal(costs, packs, ranks)
    padded = max(1, -(-_fullest(lengths, dealt) // multiple)) * multiple
    by_rank = [dealt[rank * micro_batches : (rank + 1) * micro_batches] for rank in range(ranks)]
    return StepPlan([[np.array(sorted(p), dtype=np.int64) for p in packs] for packs in by_rank], padded)


def _fullest(lengths: list[int], packs: list[list[int]]) -> int:
    return max(sum(lengths[i] for i in pack) for pack in packs)


def _even(lengths: list[int], longest_first: list[int], packs: int) -> list[list[int]]:
    """Longest first, each into the pack with the fewest tokens: the shortest packs that are quickly found."""
    filled: list[list[int]] = [[] for _ in range(packs)]
    load = [(0, pack) for pack in range(packs)]
    for i in longest_first:
        tokens, pack = load[0]
        filled[pack].append(i)
        heapq.heapreplace(load, (tokens + lengths[i], pack))
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


def _level(
    lengths: list[int],
    costs: list[int],
    longest_first: list[int],
    grid: tuple[int, int],
    rooms: tuple[int, int],
) -> list[list[int]] | None:
    """Return packs, rank after rank: cost level over ranks, tokens level over packs. None: none were found that fit.

    Packs within the first of ``rooms`` are looked for; where their cost is above its goal and need not be, or none
    fit, packs within the second.
    """
    ranks, micro_batches = grid
    tries = (
        _packs(lengths, _level_ranks(lengths, costs, longest_first, ranks, (PLAY, kept)), micro_batches)
        for kept in KEPT_BACK
    )
    found = next((packs for packs in tries if _fullest(lengths, packs) <= rooms[0]), None)
    goal = sum(costs) * GOAL // (1000 * ranks)
    costliest = goal if found is None else _costliest(costs, found, micro_batches)
    if found is not None and (costliest <= goal or _least_cost(lengths, costs, longest_first, ranks) > goal):
        return found
    play = min(LOOSE_PLAY, rooms[1] * micro_batches * ranks * 1000 // max(sum(lengths), 1) - 1000)
    mine = _level_ranks(lengths, costs, longest_first, ranks, (play, LOOSELY_KEPT_BACK))
    swapped = _swapped(lengths, costs, mine, goal, (micro_batches, rooms[1]))
    if swapped is None or (found is not None and _costliest(costs, swapped, micro_batches) >= costliest):
        return found
    return swapped


def _costliest(costs: list[int], packs: list[list[int]], micro_batches: int) -> int:
    by_rank = (packs[at : at + micro_batches] for at in range(0, len(packs), micro_batches))
    return max(sum(costs[i] for pack in some for i in pack) for some in by_rank)


def _least_cost(lengths: list[int], costs: list[int], longest_first: list[int], ranks: int) -> int:
    """Return what the rank with the longest sample costs at least, no other having over MOST_TOKENS of the mean."""
    tokens, (longest, *others) = sum(lengths), longest_first
    missing = tokens - tokens * MOST_TOKENS * (ranks - 1) // (1000 * ranks) - lengths[longest]
    cost = costs[longest]
    for i in reversed(others):  # the shortest
        if missing <= 0:
            break
        cost += costs[i] * min(lengths[i], missing) // max(lengths[i], 1)
        missing -= lengths[i]
    return cost


def _swapped(
    lengths: list[int], costs: list[int], mine: list[list[int]], goal: int, packs_of: tuple[int, int]
) -> list[list[int]] | None:
    """Swap samples until no rank costs more than ``goal``, as far as that goes; None: the packs have no room."""
    micro_batches, room = packs_of
    most = min(sum(lengths) * MOST_TOKENS // (1000 * len(mine)), micro_batches * room)
    lengths_B, costs_B = np.array(lengths), np.array(costs)
    Groups(mine, lengths_B, np.zeros_like(lengths_B), 0).lighten(most)
    Groups(mine, costs_B, lengths_B, most).lighten(goal)
    packs = []
    for some in mine:
        even = _even(lengths, sorted(some, key=lambda i: (-lengths[i], i)), micro_batches)
        if not Groups(even, lengths_B, np.zeros_like(lengths_B), 0).lighten(room):
            return None
        packs += even
    return packs


def _packs(lengths: list[int], mine: list[list[int]], micro_batches: int) -> list[list[int]]:
    """Spread the samples of each rank over its packs."""
    return [pack for some in mine for pack in _even(lengths, some, micro_batches)]


def _level_ranks(
    lengths: list[int], costs: list[int], longest_first: list[int], ranks: int, parts: tuple[int, int]
) -> list[list[int]]:
    """Return the samples of every rank, longest first: cost level, tokens nearly so.

    Long samples decide the cost and short ones are many. So, longest first, each sample goes to a rank whose share
    of the tokens (and ``parts[0]`` thousandths more) has room for it; the shortest samples, with ``parts[1]``
    thousandths of the tokens, are kept back for the ranks that are emptiest in the end.
    """
    play, kept = parts
    kept_back, late = _shortest(lengths, longest_first, kept)
    share = (sum(lengths) - late) * (1000 + play) // (1000 * ranks)
    mine = _level_cost(lengths, costs, longest_first[: len(lengths) - kept_back], share, ranks)
    load = [(sum(lengths[i] for i in some), rank) for rank, some in enumerate(mine)]
    heapq.heapify(load)
    for i in longest_first[len(lengths) - kept_back :]:
        tokens, rank = load[0]
        mine[rank].append(i)
        heapq.heapreplace(load, (tokens + lengths[i], rank))
    return mine


def _shortest(lengths: list[int], longest_first: list[int], thousandths: int) -> tuple[int, int]:
    """Return how many of the shortest samples have at most this share of the tokens, and their tokens."""
    most, count, tokens = thousandths * sum(lengths) // 1000, 0, 0
    for i in reversed(longest_first):
        if tokens + lengths[i] > most:
            break
        count, tokens = count + 1, tokens + lengths[i]
    return count, tokens


def _level_cost(
    lengths: list[int], costs: list[int], longest_first: list[int], share: int, ranks: int
) -> list[list[int]]:
    """Give each sample to the rank that will cost the least, of those that have room for it within ``share``.

    What a rank will cost is what its samples do and what filling it with short ones will. Where none has room,
    the one with the most takes it; a rank without samples always has room.
    """
    count, tokens = _shortest(lengths, longest_first, FILLING)
    price = sum(costs[i] for i in longest_first[len(longest_first) - count :]) // max(tokens, 1)
    mine: list[list[int]] = [[] for _ in range(ranks)]
    room, bill = [share] * ranks, [share * price] * ranks
    ready = [(bill[rank], rank) for rank in range(ranks)]
    full: list[
        tuple[int, int]
    ] = []  # (-room, rank): had no room for the sample before; a shorter one may fit
    for i in longest_first:
        while full and -full[0][0] >= lengths[i]:
            rank = heapq.heappop(full)[1]
            heapq.heappush(ready, (bill[rank], rank))
        while ready and mine[ready[0][1]] and room[ready[0][1]] < lengths[i]:
            rank = heapq.heappop(ready)[1]
            heapq.heappush(full, (-room[rank], rank))
        rank = heapq.heappop(ready or full)[1]
        mine[rank].append(i)
        room[rank] -= lengths[i]
        bill[rank] += costs[i] - lengths[i] * price
        heapq.heappush(ready, (bill[rank], rank))
    return mine


def _deal(costs: list[int], packs: list[list[int]], ranks: int) -> list[list[int]]:
    """Return the packs rank after rank, as many for each; the costliest first to the rank with the least cost."""
    cost = [sum(costs[i] for i in pack) for pack in packs]
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    spent = [(0, rank) for rank in range(ranks)]
    for pack in sorted(range(len(packs)), key=lambda p: (-cost[p], p)):
        total, rank = heapq.heappop(spent)
        dealt[rank].append(packs[pack])
        if len(dealt[rank]) < len(packs) // ranks:
            heapq.heappush(spent, (total + cost[pack], rank))
    return [pack for packs_of_rank in dealt for pack in packs_of_rank]
