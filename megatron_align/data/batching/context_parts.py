"""A pack over context-parallel ranks: which tokens each rank computes, and which rows those score.

Every rank has read the whole pack, so each deals it out by itself, on the host.

Shapes: T tokens of a pack, Q = T / R of them on each of R ranks, N scored rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_align.data.batching.context_split import balanced_shards, contiguous_shards
from megatron_align.records import ContextKind, ContextPart, Held, PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextShare:
    """Whose part of a pack is wanted.

    Args:
        ranks: context-parallel ranks.
        rank: this one.
        kind: ulysses: equal runs of tokens; allgather: equal attention work for the pack's layout.
    """

    ranks: int
    rank: int
    kind: ContextKind


def deal(batch: PackedBatch, share: ContextShare | None) -> PackedBatch:
    """Return the pack with the part of this rank; unchanged where nobody shares it.

    Raises:
        ValueError: if the pack's length is no multiple of the ranks.
    """
    if share is None:
        return batch
    tokens, gathers = batch.layout.tokens, share.kind == "allgather"
    if gathers:
        shards_RQ = balanced_shards(batch.layout.groups, tokens, share.ranks)
    else:
        shards_RQ = contiguous_shards(tokens, share.ranks)
    owner_T, place_T = np.empty(tokens, np.int64), np.empty(tokens, np.int64)
    owner_T[shards_RQ], place_T[shards_RQ] = np.arange(share.ranks)[:, None], np.arange(shards_RQ.shape[1])

    def held(row_N: np.ndarray) -> Held:
        number_n = np.flatnonzero(owner_T[row_N] == share.rank)
        return Held.of(number_n, place_T[row_N[number_n]])

    token_Q, row_N = torch.from_numpy(shards_RQ[share.rank]), batch.rows.row_N.numpy()
    part = ContextPart(
        kind=share.kind,
        token_Q=token_Q,
        owner_N=owner_T[row_N],
        rows=held(row_N),
        last=held(batch.rows.completions.last_C.numpy()),
        order_T=torch.from_numpy(shards_RQ.ravel()) if gathers else None,
        queries=batch.layout.for_queries(token_Q) if gathers else None,
    )
    return replace(batch, part=part)
