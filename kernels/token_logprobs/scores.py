"""Scoring: one pass over the vocabulary for log-probs, entropy and the largest log-probs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.kernels.token_logprobs.head import Head
from megatron_align.kernels.token_logprobs.passes import (
    RowStatistics,
    Slab,
    chunks,
    logits,
    row_statistics,
    slab_rows,
)
from megatron_align.kernels.token_logprobs.reference import TokenScores


def score(hidden_NH: Tensor, targets_N: Tensor, head: Head, top_k: int) -> TokenScores:
    """See :func:`token_scores`."""
    most = slab_rows(head.weight_VH)
    slab = Slab(head, min(most, hidden_NH.shape[0]))
    local_N = head.local(targets_N)
    parts = []
    for rows in chunks(0, hidden_NH.shape[0], most):
        logits_nV = slab.project(hidden_NH[rows])
        found = row_statistics(logits_nV, local_N[rows], head, more=True)
        columns = [found.logprob_n, found.extra["entropy"], found.extra["log_sum_square"]]
        parts.append((*columns, *(_top(logits_nV, found, head, top_k) if top_k else ())))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return TokenScores(*columns) if top_k else TokenScores(*columns, None, None)


def _top(logits_nV: Tensor, found: RowStatistics, head: Head, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the row's largest log-probs and their tokens, over all ranks; ties go to lower ranks."""
    mine = min(top_k, head.real)
    # Soft-cap and temperature keep the order, so what was projected can be searched as it is.
    projected_nK, token_nK = logits_nV[:, : head.real].topk(mine, dim=1)
    value_nK, token_nK = logits(projected_nK, head), token_nK + head.first
    if head.ranks > 1:
        values_nRK, tokens_nRK = (
            head.gathered(F.pad(t, (0, top_k - mine), value=filler)).transpose(0, 1)
            for t, filler in ((value_nK, -math.inf), (token_nK, 0))
        )
        value_nK, place_nK = values_nRK.flatten(1).topk(top_k, dim=1)
        token_nK = tokens_nRK.flatten(1).gather(1, place_nK)
    most_n, log_sum_n = found.max_2n
    return (value_nK - most_n[:, None]) - log_sum_n[:, None], token_nK
