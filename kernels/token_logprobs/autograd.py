"""Autograd functions: log-probs that recompute their logits in backward, and losses with gradients made in forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_align.kernels.token_logprobs.gradients import Gradients
from megatron_align.kernels.token_logprobs.slab import Slab, chunks, slab_rows
from megatron_align.kernels.token_logprobs.slab_loop import SlabLossCall, run_slabs
from megatron_align.kernels.token_logprobs.vocab_parallel_softmax import (
    RowStatistics,
    overwrite_by_dlogits,
    row_statistics,
)
from megatron_align.kernels.token_logprobs.vocab_shard import VocabShard


class TokenLogprobs(torch.autograd.Function):
    """Forward 2 NHV; backward recomputes the logits: 8 NHV in total."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, shard: VocabShard
    ) -> Tensor:
        most = slab_rows(weight_VH)
        slab = Slab(shard, min(most, hidden_NH.shape[0]))
        local_N = shard.local_targets(targets_N)
        per_chunk = []
        for rows in chunks(0, hidden_NH.shape[0], most):
            per_chunk.append(row_statistics(slab.project(hidden_NH[rows]), local_N[rows], shard))
        logprob_N = torch.cat([statistics.logprob_n for statistics in per_chunk])
        max_2N = torch.cat([statistics.max_2n for statistics in per_chunk], dim=1)
        ctx.save_for_backward(hidden_NH, weight_VH, local_N, max_2N)
        ctx.shard = shard
        return logprob_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, local_N, max_2N = ctx.saved_tensors
        shard, most = ctx.shard, slab_rows(weight_VH)
        slab = Slab(shard, min(most, hidden_NH.shape[0]))
        hidden, weight = ctx.needs_input_grad[:2]
        gradients = Gradients(hidden_NH, shard.weight_VH, hidden=hidden, weight=weight)
        for rows in chunks(0, hidden_NH.shape[0], most):
            logits_nV = slab.project(hidden_NH[rows])
            statistics = RowStatistics(grad_N[rows], max_2N[:, rows], {})
            overwrite_by_dlogits(logits_nV, local_N[rows], grad_N[rows], statistics, shard)
            gradients.add(rows, logits_nV, hidden_NH[rows], shard.hidden_grad_group)
        return gradients.hidden_NH, gradients.weight(), None, None


class SlabLoss(torch.autograd.Function):
    """Forward computes the loss and both gradients, 6 NHV; backward returns them."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, call: SlabLossCall) -> Tensor:
        hidden, weight = (call.training and needed for needed in ctx.needs_input_grad[:2])
        gradients = (
            Gradients(hidden_NH, weight_VH, hidden=hidden, weight=weight) if hidden or weight else None
        )
        ctx.gradients = gradients
        return run_slabs(call, hidden_NH, weight_VH, gradients)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("slab_loss returns its gradients once; a second backward needs a second call")
        _require_one(upstream)
        gradients, ctx.gradients = ctx.gradients, None
        return gradients.hidden_NH, gradients.weight(), None


def _require_one(upstream: Tensor) -> None:
    """Require the upstream gradient 1 that the gradients were made for; the weight's may be in main_grad already."""
    if upstream.is_cuda:
        torch._assert_async(upstream == 1, "slab_loss needs an upstream gradient of 1: scale by row weights")
    elif upstream.item() != 1:
        raise ValueError(
            f"slab_loss needs an upstream gradient of 1, as its gradients are made in forward: put factors into the "
            f"rows' weights; got {upstream.item()}"
        )
