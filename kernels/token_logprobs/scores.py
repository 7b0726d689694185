"""Scoring without gradients: log-probs, entropy and the largest log-probs in one pass over the vocabulary."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.kernels.token_logprobs.reference import TokenScores
from megatron_align.kernels.token_logprobs.slab import TEMPORARY_ELEMENTS, Slab, chunks, slab_rows
from megatron_align.kernels.token_logprobs.vocab_parallel_softmax import (
    RowStatistics,
    row_statistics,
    to_logits,
)
from megatron_align.kernels.token_logprobs.vocab_shard import VocabShard


def score(hidden_NH: Tensor, targets_N: Tensor, shard: VocabShard, top_k: int) -> TokenScores:
    """Run :func:`token_scores` on validated arguments."""
    most = slab_rows(shard.weight_VH)
    slab = Slab(shard, min(most, hidden_NH.shape[0]))
    local_N = shard.local_targets(targets_N)
    parts = []
    for rows in chunks(0, hidden_NH.shape[0], most):
        logits_nV = slab.project(hidden_NH[rows])
        statistics = row_statistics(logits_nV, local_N[rows], shard, more=True)
        columns = [statistics.logprob_n, statistics.extra["entropy"], statistics.extra["log_sum_square"]]
        parts.append((*columns, *(_top(logits_nV, statistics, shard, top_k) if top_k else ())))
    logprobs_N, entropy_N, log_sum_square_N, *top = (torch.cat(column) for column in zip(*parts, strict=True))
    top_logprobs_NK, top_tokens_NK = top or (None, None)
    return TokenScores(logprobs_N, entropy_N, log_sum_square_N, top_logprobs_NK, top_tokens_NK)


def _top(
    logits_nV: Tensor, statistics: RowStatistics, shard: VocabShard, top_k: int
) -> tuple[Tensor, Tensor]:
    """Return the largest log-probs of each row and their tokens, over all ranks."""
    value_nK, token_nK = _largest(logits_nV, shard, top_k)
    most_n, log_sum_n = statistics.max_2n
    return (value_nK - most_n[:, None]) - log_sum_n[:, None], token_nK


def top_logits_of(hidden_NH: Tensor, shard: VocabShard, top_k: int) -> tuple[Tensor, Tensor]:
    """Run :func:`top_logits` on validated arguments."""
    most = slab_rows(shard.weight_VH)
    slab = Slab(shard, min(most, hidden_NH.shape[0]))
    parts = [
        _largest(slab.project(hidden_NH[rows]), shard, top_k) for rows in chunks(0, hidden_NH.shape[0], most)
    ]
    value_NK, token_NK = (torch.cat(column) for column in zip(*parts, strict=True))
    return value_NK, token_NK


def _largest(logits_nV: Tensor, shard: VocabShard, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits of each row, descending, and their tokens, over all ranks; of ties the lower tokens."""
    local_k = min(top_k, shard.real_rows)
    # Soft-cap and temperature keep the order, so the top k of the projection are the top k of the logits.
    projected_nK, token_nK = _first_largest(logits_nV[:, : shard.real_rows], local_k)
    value_nK, token_nK = to_logits(projected_nK, shard), token_nK + shard.first_token
    if shard.ranks > 1:
        values_nRK, tokens_nRK = (
            shard.all_gather(F.pad(t, (0, top_k - local_k), value=filler)).transpose(0, 1)
            for t, filler in ((value_nK, -math.inf), (token_nK, 0))
        )
        value_nK, index_nK = _first_largest(values_nRK.flatten(1), top_k)
        token_nK = tokens_nRK.flatten(1).gather(1, index_nK)
    return value_nK, token_nK


def _first_largest(values_nV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` largest values of each row, descending, and their columns; of ties the first columns.

    ``topk`` picks any of ties. Those that equal the smallest value it returns are therefore chosen again.
    """
    if count == 0 or not len(values_nV):
        return values_nV[:, :count], torch.empty(
            len(values_nV), count, dtype=torch.int64, device=values_nV.device
        )
    parts = []
    for rows in values_nV.split(max(1, TEMPORARY_ELEMENTS // max(1, values_nV.shape[1]))):
        ranked = rows.nan_to_num(
            nan=math.inf, posinf=math.inf, neginf=-math.inf
        )  # topk takes NaN for the largest
        smallest_n1 = ranked.topk(count, dim=1).values[:, -1:]
        above, equal = ranked > smallest_n1, ranked == smallest_n1
        chosen = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
        column_nK = chosen.nonzero()[:, 1].view(-1, count)
        _, order_nK = ranked.gather(1, column_nK).sort(dim=1, descending=True, stable=True)
        column_nK = column_nK.gather(1, order_nK)
        parts.append((rows.gather(1, column_nK), column_nK))
    value_nK, column_nK = (torch.cat(part) for part in zip(*parts, strict=True))
    return value_nK, column_nK
