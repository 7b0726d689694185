"""Logits at a few given tokens of each row (a teacher's top k), with gradient: only these columns are kept of a slab.

Shapes: K given tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.kernels.token_logprobs.gradients import Gradients
from megatron_align.kernels.token_logprobs.slab import Slab, chunks, slab_rows
from megatron_align.kernels.token_logprobs.vocab_parallel_softmax import to_logits
from megatron_align.kernels.token_logprobs.vocab_shard import VocabShard


def check_columns(hidden_NH: Tensor, columns_NK: Tensor, shard: VocabShard) -> None:
    """Check the given tokens; their values on CPU only, as that would synchronise.

    Raises:
        ValueError: naming what does not fit.
    """
    if columns_NK.ndim != 2 or len(columns_NK) != len(hidden_NH) or columns_NK.dtype != torch.int64:
        raise ValueError(
            f"column_logits needs int64 columns [N = {len(hidden_NH)}, K]; got {columns_NK.dtype} "
            f"{tuple(columns_NK.shape)}"
        )
    if not 0 < columns_NK.shape[1] <= shard.tokens:
        raise ValueError(
            f"column_logits needs 1 to {shard.tokens} columns, the vocabulary; got {columns_NK.shape[1]}"
        )
    if columns_NK.device.type == "cpu" and columns_NK.numel():
        low, high = columns_NK.aminmax()
        if low < 0 or high >= shard.tokens:
            raise ValueError(
                f"column_logits needs tokens in [0, {shard.tokens}); got {low.item()} to {high.item()}"
            )


class ColumnLogits(torch.autograd.Function):
    """Forward 2 NHV and one all-reduce of ``[N, K]``; backward 4 NHV, as it needs no logits again: 6 NHV in total."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, columns_NK: Tensor, shard: VocabShard
    ) -> Tensor:
        most = slab_rows(weight_VH)
        slab = Slab(shard, min(most, hidden_NH.shape[0]))
        here_NK, local_NK = _local(columns_NK, shard)
        logits_NK = torch.zeros(
            columns_NK.shape,
            dtype=torch.promote_types(hidden_NH.dtype, torch.float32),
            device=hidden_NH.device,
        )
        for rows in chunks(0, hidden_NH.shape[0], most):
            own_nK = slab.project(hidden_NH[rows]).gather(1, local_NK[rows])
            logits_NK[rows] = to_logits(own_nK, shard).where(here_NK[rows], 0.0)
        if shard.ranks > 1:
            dist.all_reduce(logits_NK, group=shard.group)  # one rank has each of them: an exact sum
        ctx.save_for_backward(hidden_NH, columns_NK, logits_NK)
        ctx.shard = shard
        return logits_NK

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, columns_NK, logits_NK = ctx.saved_tensors
        shard, most = ctx.shard, slab_rows(ctx.shard.weight_VH)
        if shard.softcap is not None:
            grad_NK = grad_NK * (1 - (logits_NK * (shard.temperature / shard.softcap)).square())
        here_NK, local_NK = _local(columns_NK, shard)
        own_NK = (grad_NK / shard.temperature).where(here_NK, 0.0).to(shard.weight_VH.dtype)
        hidden, weight = ctx.needs_input_grad[:2]
        gradients = Gradients(hidden_NH, shard.weight_VH, hidden=hidden, weight=weight)
        dlogits = shard.weight_VH.new_empty(min(most, hidden_NH.shape[0]), shard.weight_VH.shape[0])
        for rows in chunks(0, hidden_NH.shape[0], most):
            dlogits_nV = dlogits[: rows.stop - rows.start].zero_()
            dlogits_nV.scatter_add_(1, local_NK[rows], own_NK[rows])
            gradients.add(rows, dlogits_nV, hidden_NH[rows], shard.hidden_grad_group)
        return gradients.hidden_NH, gradients.weight(), None, None


def _local(columns_NK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return which columns this rank holds, and their rows in its shard, 0 for the others."""
    local_NK = shard.local_targets(columns_NK)
    here_NK = (local_NK >= 0) & (local_NK < shard.real_rows)
    return here_NK, local_NK.where(here_NK, 0)
