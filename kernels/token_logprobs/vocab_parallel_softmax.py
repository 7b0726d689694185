"""Softmax over a vocabulary that ranks share: reduce a slab of logits to row statistics, overwrite it by dlogits.

Two passes over the slab: Triton kernels on GPUs (``softmax_kernels.py``), otherwise PyTorch, a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_align.kernels.dispatch import takes_triton
from megatron_align.kernels.token_logprobs.slab import TEMPORARY_ELEMENTS
from megatron_align.kernels.token_logprobs.softmax_kernels import (
    EMPTY,
    triton_overwrite,
    triton_statistics,
)
from megatron_align.kernels.token_logprobs.vocab_shard import VocabShard


class RowStatistics(NamedTuple):
    """Statistics of each row over the entire vocabulary, fp32 (fp64 for fp64 logits)."""

    logprob_n: Tensor
    # Maximum, and log of sum exp(l - maximum): separate, as adding them would round the second away.
    max_2n: Tensor
    extra: dict[str, Tensor]  # entropy, log_sum_square; empty unless requested
    mean_n: Tensor | None = (
        None  # of l - maximum under the softmax: log of the sum, less the entropy; with these
    )


def row_statistics(
    logits_nV: Tensor, local_n: Tensor, shard: VocabShard, *, more: bool = False
) -> RowStatistics:
    """Reduce the logits to row statistics over all ranks: one all-gather of 12 bytes a row and rank, 20 with more."""
    part = triton_statistics if _takes_triton(logits_nV) else torch_statistics
    part_Sn = part(logits_nV, local_n, shard, more=more)
    if shard.ranks == 1:
        most_n, sum_n, target_n, *rest = part_Sn
    else:
        most_n, sum_n, target_n, *rest = _combine(shard.all_gather(part_Sn))
    log_sum_n = sum_n.log()
    extra, mean_n = {}, None
    if more:
        squares_n, moment_n = rest
        mean_n = moment_n / sum_n
        extra["entropy"] = log_sum_n - mean_n
        extra["log_sum_square"] = squares_n.log() - 2 * log_sum_n
    return RowStatistics(target_n - most_n - log_sum_n, torch.stack([most_n, log_sum_n]), extra, mean_n)


def _combine(parts_RSn: Tensor) -> list[Tensor]:
    """Rescale each rank's sums to the common maximum and add them; every rank gets the same bits."""
    most_Rn, sum_Rn, target_Rn, *rest = parts_RSn.unbind(1)
    most_n = most_Rn.amax(0)
    gap_Rn = most_Rn - most_n
    scale_Rn = gap_Rn.exp()
    combined = [most_n, (sum_Rn * scale_Rn).sum(0), target_Rn.sum(0)]
    if rest:
        squares_Rn, moment_Rn = rest
        combined += [
            (squares_Rn * scale_Rn.square()).sum(0),
            (scale_Rn * (moment_Rn + gap_Rn * sum_Rn)).sum(0),
        ]
    return combined


def overwrite_by_dlogits(
    logits_nV: Tensor,
    local_n: Tensor,
    grad_n: Tensor,
    statistics: RowStatistics,
    shard: VocabShard,
    entropy_grad_n: Tensor | None = None,
) -> None:
    """Overwrite the projection by its gradient, given the gradients of the log-probs and, if any, of the entropies."""
    overwrite = triton_overwrite if _takes_triton(logits_nV) else torch_overwrite
    entropy_2n = None
    if entropy_grad_n is not None:
        assert statistics.mean_n is not None, "the loss was given entropies"
        entropy_2n = torch.stack([statistics.mean_n, entropy_grad_n])
    overwrite(logits_nV, local_n, grad_n, statistics.max_2n, shard, entropy_2n)


def _takes_triton(logits_nV: Tensor) -> bool:
    """Return whether the kernels take these logits; fp64 is computed in fp64, by PyTorch, on GPUs too."""
    return logits_nV.dtype != torch.float64 and takes_triton(logits_nV, "token_logprobs")


def _few_rows(logits_nV: Tensor) -> Iterator[slice]:
    rows, columns = logits_nV.shape
    step = max(1, TEMPORARY_ELEMENTS // max(1, columns))
    return (slice(at, at + step) for at in range(0, rows, step))


def to_logits(projected: Tensor, shard: VocabShard) -> Tensor:
    """Apply soft-cap and temperature to the projection, in fp32 at least; returns it if it is that already."""
    x = projected.to(torch.promote_types(projected.dtype, torch.float32))
    if shard.softcap is not None:
        x = (x / shard.softcap).tanh_().mul_(shard.softcap)
    return x if shard.temperature == 1.0 else x / shard.temperature


def torch_statistics(logits_nV: Tensor, local_n: Tensor, shard: VocabShard, *, more: bool) -> Tensor:
    """PyTorch version of :func:`triton_statistics`; any dtype."""
    exact = torch.promote_types(logits_nV.dtype, torch.float32)
    out_Sn = logits_nV.new_zeros(5 if more else 3, logits_nV.shape[0], dtype=exact)
    if shard.real_rows == 0:
        out_Sn[0] = EMPTY
        return out_Sn
    here_n = (local_n >= 0) & (local_n < shard.real_rows)
    column_n = local_n.where(here_n, 0)
    for rows in _few_rows(logits_nV):
        x = to_logits(logits_nV[rows, : shard.real_rows], shard)
        out_Sn[2, rows] = x.gather(1, column_n[rows, None])[:, 0].where(here_n[rows], 0.0)
        out_Sn[0, rows] = x.amax(1)
        gap = x - out_Sn[0, rows, None]
        if more:
            e = gap.exp()
            out_Sn[3, rows] = torch.linalg.vector_norm(e, dim=1).square()
            out_Sn[4, rows] = gap.mul_(e).sum(1)
        else:
            e = gap.exp_()
        out_Sn[1, rows] = e.sum(1)
    return out_Sn


def torch_overwrite(
    logits_nV: Tensor,
    local_n: Tensor,
    grad_n: Tensor,
    max_2n: Tensor,
    shard: VocabShard,
    entropy_2n: Tensor | None = None,
) -> None:
    """PyTorch version of :func:`triton_overwrite`; any dtype."""
    grad_n = grad_n / shard.temperature
    here_n = (local_n >= 0) & (local_n < shard.real_rows)
    column_n, onehot_n = local_n.where(here_n, 0), grad_n * here_n
    ignored_n = grad_n == 0
    if entropy_2n is not None:
        mean_n, entropy_grad_n = entropy_2n[0], entropy_2n[1] / shard.temperature
        ignored_n = ignored_n & (entropy_grad_n == 0)
    logits_nV[:, shard.real_rows :] = 0.0
    if shard.real_rows == 0:
        return
    for rows in _few_rows(logits_nV):
        projected = logits_nV[rows, : shard.real_rows]
        x = to_logits(projected, shard)
        slope = None if shard.softcap is None else 1 - (x * (shard.temperature / shard.softcap)).square_()
        x.sub_(max_2n[0, rows, None])
        factor = grad_n[rows, None]
        if entropy_2n is not None:
            factor = (x - mean_n[rows, None]).mul_(entropy_grad_n[rows, None]).add_(factor)
        x.sub_(max_2n[1, rows, None]).exp_().mul_(-factor)
        x.scatter_add_(1, column_n[rows, None], onehot_n[rows, None])
        if slope is not None:
            x.mul_(slope)
        # A row with zero gradient contributes nothing, whatever its logits are: 0 * inf would be NaN.
        x[ignored_n[rows]] = 0.0
        if x is not projected:
            projected.copy_(x)
