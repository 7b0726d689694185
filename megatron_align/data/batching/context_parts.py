"""A pack over context-parallel ranks: which tokens each rank computes, and which rows are scored from them.

Every rank has read the entire pack, so each computes its part by itself, on the host.

Shapes: T tokens of a pack, Q = T / R of them on each of R ranks, N scored rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_align.data.batching.context_split import balanced_shards, contiguous_shards
from megatron_align.records import ContextKind, ContextPart, LocalRows, PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextRank:
    """The context-parallel rank whose part of a pack is computed.

    Args:
        ranks: context-parallel ranks.
        rank: this context-parallel rank.
        kind: ulysses: equal runs of tokens; allgather: equal attention work for the pack's layout.
    """

    ranks: int
    rank: int
    kind: ContextKind


def take_part(batch: PackedBatch, context: ContextRank | None) -> PackedBatch:
    """Return the pack with the part of this context rank; None: unchanged.

    Raises:
        ValueError: if the pack's length is not a multiple of the ranks.
    """
    if context is None:
        return batch
    tokens, gathers = batch.layout.tokens, context.kind == "allgather"
    if gathers:
        shards_RQ = balanced_shards(batch.layout.groups, tokens, context.ranks)
    else:
        shards_RQ = contiguous_shards(tokens, context.ranks)
    owner_T, local_T = np.empty(tokens, np.int64), np.empty(tokens, np.int64)
    owner_T[shards_RQ], local_T[shards_RQ] = np.arange(context.ranks)[:, None], np.arange(shards_RQ.shape[1])

    def local_rows(row_N: np.ndarray) -> LocalRows:
        number_n = np.flatnonzero(owner_T[row_N] == context.rank)
        return LocalRows.of(number_n, local_T[row_N[number_n]])

    token_Q, row_N = torch.from_numpy(shards_RQ[context.rank]), batch.rows.row_N.numpy()
    part = ContextPart(
        kind=context.kind,
        token_Q=token_Q,
        owner_N=owner_T[row_N],
        rows=local_rows(row_N),
        last=local_rows(batch.rows.completions.last_C.numpy()),
        order_T=torch.from_numpy(shards_RQ.ravel()) if gathers else None,
        queries=batch.layout.for_queries(token_Q) if gathers else None,
    )
    return replace(batch, part=part)
