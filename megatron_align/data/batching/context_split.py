"""Split a pack's tokens over context-parallel ranks: equally many for each, with equal attention work.

Work is counted in visible (query, key) pairs. Where keys are gathered, a rank computes what its queries see, so the
plain cut into consecutive parts gives the last rank of a long document most of the work. Pure functions: every
rank computes the same.

Shapes: T tokens of a pack, R ranks, Q = T / R tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Sizes of the runs of tokens that stay together, the largest first: 128 neighbours fill a query block of the kernels,
# which then visits no key in vain; larger runs would gain nothing and balance worse.
GRANULES = (128, 64, 32, 16, 8, 4, 2, 1)
MAX_IMBALANCE = 1.05  # most work of a rank, over the mean


def attention_work(groups: Sequence[tuple[int, Sequence[int]]], tokens: int) -> np.ndarray:
    """Return how many keys each token sees (int64 ``[T]``).

    Args:
        groups: ``(prompt length, completion lengths)`` in order of position, as ``PackedLayout.groups``.
        tokens: T; tokens after the last group are padding and attend to themselves.

    Raises:
        ValueError: if the groups are longer than ``tokens``.
    """
    runs = [
        (length, seen)
        for prompt, own in groups
        for length, seen in ((prompt, 0), *((c, prompt) for c in own))
    ]
    length, seen = np.array(runs, dtype=np.int64).reshape(-1, 2).T
    used = int(length.sum())
    if used > tokens:
        raise ValueError(f"attention_work needs groups within {tokens} tokens; got {used}")
    work_T = np.ones(tokens, dtype=np.int64)
    work_T[:used] += np.arange(used) + np.repeat(seen - np.cumsum(length) + length, length)
    return work_T


def contiguous_shards(tokens: int, ranks: int) -> np.ndarray:
    """Return the positions of each rank (int64 ``[R, Q]``), one run each: for ``ulysses``, whose ranks split heads.

    Raises:
        ValueError: if ``tokens`` is not a multiple of ``ranks``.
    """
    _check(tokens, ranks)
    return np.arange(tokens, dtype=np.int64).reshape(ranks, -1)


def balanced_shards(groups: Sequence[tuple[int, Sequence[int]]], tokens: int, ranks: int) -> np.ndarray:
    """Return the positions of each rank (int64 ``[R, Q]``, each row ascending), work balanced over the ranks.

    Every token is on one rank. The pack is cut into granules, of the largest size in ``GRANULES`` that brings the
    costliest rank within ``MAX_IMBALANCE`` of the mean, or else the one that balances best: no rank then does more
    than the mean and the work of one token. Where a rank's tokens are not a multiple of the granule, the rest of each
    is at the pack's end, where padding is.

    Args:
        groups: as for :func:`attention_work`.
        tokens: T.
        ranks: R.

    Raises:
        ValueError: if ``tokens`` is not a multiple of ``ranks``, or the groups are longer than ``tokens``.
    """
    _check(tokens, ranks)
    work_before = np.concatenate([[0], np.cumsum(attention_work(groups, tokens))])
    owner_T, least = np.empty(0), np.inf
    for granule in GRANULES:
        whole, rest = divmod(tokens // ranks, granule)
        sizes = np.repeat([granule, rest], [whole * ranks, ranks if rest else 0])
        work = np.diff(work_before[np.concatenate([[0], np.cumsum(sizes)])])
        granules = np.argsort(-work[: whole * ranks], kind="stable")
        # Assigned first: the granules even out what the rests leave uneven.
        rests = np.arange(whole * ranks, len(work))
        owner, most = _assign(work, np.concatenate([rests, granules]).reshape(-1, ranks))
        if most < least:
            owner_T, least = np.repeat(owner, sizes), most
        if most * ranks <= MAX_IMBALANCE * work_before[-1]:
            break
    return np.argsort(owner_T, kind="stable").reshape(ranks, -1)


def _check(tokens: int, ranks: int) -> None:
    if ranks < 1 or tokens < ranks or tokens % ranks:
        raise ValueError(
            f"shards need tokens a positive multiple of ranks; got {tokens} tokens, {ranks} ranks"
        )


def _assign(work: np.ndarray, rounds: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the rank of each granule, one of each round ``[rounds, R]``, and the work of the costliest rank.

    In a round the costlier granule goes to the rank with less work. So ranks never differ by more than the granules
    of one round do.
    """
    owner = np.empty(len(work), dtype=np.int16)
    owner[rounds] = np.arange(rounds.shape[1])
    even = np.ptp(work[rounds], axis=1) == 0  # mostly padding: the assignment changes nothing
    load = np.full(rounds.shape[1], work[rounds[even, 0]].sum())
    for granules in rounds[~even]:
        costliest = granules[np.argsort(-work[granules], kind="stable")]
        emptiest = np.argsort(load, kind="stable")
        owner[costliest] = emptiest
        load[emptiest] += work[costliest]
    return owner, int(load.max())
