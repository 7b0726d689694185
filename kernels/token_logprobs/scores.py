"""Scoring without gradients: log-probs, entropy and the largest log-probs in one pass over the vocabulary."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.kernels.token_logprobs.reference import TokenScores
from megatron_align.kernels.token_logprobs.slab import Slab, chunks, slab_rows
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
    """Return the largest log-probs of each row and their tokens, over all ranks; ties go to lower ranks."""
    local_k = min(top_k, shard.real_rows)
    # Soft-cap and temperature keep the order, so the top k of the projection are the top k of the logits.
    projected_nK, token_nK = logits_nV[:, : shard.real_rows].topk(local_k, dim=1)
    value_nK, token_nK = to_logits(projected_nK, shard), token_nK + shard.first_token
    if shard.ranks > 1:
        values_nRK, tokens_nRK = (
            shard.all_gather(F.pad(t, (0, top_k - local_k), value=filler)).transpose(0, 1)
            for t, filler in ((value_nK, -math.inf), (token_nK, 0))
        )
        value_nK, index_nK = values_nRK.flatten(1).topk(top_k, dim=1)
        token_nK = tokens_nRK.flatten(1).gather(1, index_nK)
    most_n, log_sum_n = statistics.max_2n
    return (value_nK - most_n[:, None]) - log_sum_n[:, None], token_nK
