"""Which tokens of a pack each context-parallel rank holds: as many for all, and as much attention to compute.

Work is counted in visible (query, key) pairs. Where keys are gathered, a rank computes what its queries see, so the
plain cut into consecutive parts gives the last rank of a long document most of the work. Pure functions, computed
alike on every rank.

Shapes: T tokens of a pack, R ranks, Q = T / R tokens of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Tokens that stay together. The largest that levels the work is taken: 128 rows fill the kernels' blocks with
# neighbours, so that these skip what is not seen.
GRANULES = (128, 64, 32, 16, 8, 4, 2, 1)
LEVEL = 1.05  # most work of a rank, in means


def attention_work(groups: Sequence[tuple[int, Sequence[int]]], tokens: int) -> np.ndarray:
    """Return how many keys each token sees (int64 ``[T]``).

    Args:
        groups: ``(prompt length, completion lengths)`` in order of position, as ``PackedLayout.groups``.
        tokens: T; tokens after the last group are padding and see themselves.

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
    """Return the positions of each rank (int64 ``[R, Q]``), one stretch each: for ``ulysses``, whose ranks split heads.

    Raises:
        ValueError: if ``tokens`` is no multiple of ``ranks``.
    """
    _check(tokens, ranks)
    return np.arange(tokens, dtype=np.int64).reshape(ranks, -1)


def balanced_shards(groups: Sequence[tuple[int, Sequence[int]]], tokens: int, ranks: int) -> np.ndarray:
    """Return the positions of each rank (int64 ``[R, Q]``, each row ascending), work level over the ranks.

    Every token is on one rank. The pack is cut into granules, the largest of ``GRANULES`` that brings the costliest
    rank within ``LEVEL`` of the mean, or else the one that levels best; the last Q modulo granule tokens of each rank
    are cut from the pack's end, where padding is.

    Args:
        groups: as for :func:`attention_work`.
        tokens: T.
        ranks: R.

    Raises:
        ValueError: if ``tokens`` is no multiple of ``ranks``, or the groups are longer than ``tokens``.
    """
    _check(tokens, ranks)
    before = np.concatenate([[0], np.cumsum(attention_work(groups, tokens))])
    share = tokens // ranks
    best, best_peak = None, np.inf
    for granule in GRANULES:
        whole, rest = divmod(share, granule)
        starts = np.arange(whole * ranks + 1) * granule
        starts = np.concatenate([starts, starts[-1] + np.arange(1, ranks + 1) * rest]) if rest else starts
        work, load_R = np.diff(before[starts]), np.zeros(ranks, dtype=np.int64)
        # Pieces of each length by themselves: as many for all ranks are then as many tokens.
        owner = np.concatenate([_deal(part, load_R) for part in np.split(work, [whole * ranks])])
        peak = int(load_R.max())
        if peak < best_peak:
            best, best_peak = np.repeat(owner, np.diff(starts)), peak
        if peak * ranks <= LEVEL * before[-1]:
            break
    return np.argsort(best, kind="stable").reshape(ranks, -1)


def _check(tokens: int, ranks: int) -> None:
    if ranks < 1 or tokens < ranks or tokens % ranks:
        raise ValueError(
            f"shards need tokens a positive multiple of ranks; got {tokens} tokens, {ranks} ranks"
        )


def _deal(work: np.ndarray, load_R: np.ndarray) -> np.ndarray:
    """Return the owner of each piece (as many for all ranks); adds their work to ``load_R``.

    Rounds of one piece for each rank, the costliest pieces first; in a round, the costlier piece goes to the rank with
    less. So ranks never differ by more than the widest round: max - min <= max over rounds of (first - last piece).
    """
    owner = np.empty(len(work), dtype=np.int16)
    for pieces in np.argsort(-work, kind="stable").reshape(-1, len(load_R)):
        emptiest_R = np.argsort(load_R, kind="stable")
        owner[pieces] = emptiest_R
        load_R[emptiest_R] += work[pieces]
    return owner
