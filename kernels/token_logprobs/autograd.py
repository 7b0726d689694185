"""Autograd: log-probs that make their logits twice, and losses that make them once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.kernels.token_logprobs.head import Head
from megatron_align.kernels.token_logprobs.passes import (
    Gradients,
    RowStatistics,
    Slab,
    chunks,
    overwrite,
    row_statistics,
    slab_rows,
)
from megatron_align.kernels.token_logprobs.reference import SlabFunction

RECOMPUTED = "recomputed_samples"  # among the sums of a loss: slabs that were longer than the limit


class TokenLogprobs(torch.autograd.Function):
    """Forward 2 NHV; backward makes the logits again: 8 NHV in all."""

    @staticmethod
    def forward(  # noqa: PLR0913  # ctx is none of the caller's
        ctx,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        head: Head,
        sum_hidden_over: dist.ProcessGroup | None,
    ) -> Tensor:
        most = slab_rows(weight_VH)
        slab = Slab(head, min(most, hidden_NH.shape[0]))
        local_N = head.local(targets_N)
        found = []
        for rows in chunks(0, hidden_NH.shape[0], most):
            found.append(row_statistics(slab.project(hidden_NH[rows]), local_N[rows], head))
        logprob_N = torch.cat([statistics.logprob_n for statistics in found])
        max_2N = torch.cat([statistics.max_2n for statistics in found], dim=1)
        ctx.save_for_backward(hidden_NH, weight_VH, local_N, max_2N)
        ctx.head, ctx.sum_hidden_over = head, sum_hidden_over
        return logprob_N

    @staticmethod
    def backward(ctx, grad_N: Tensor):
        hidden_NH, weight_VH, local_N, max_2N = ctx.saved_tensors
        head, most = ctx.head, slab_rows(weight_VH)
        slab = Slab(head, min(most, hidden_NH.shape[0]))
        hidden, weight = ctx.needs_input_grad[:2]
        gradients = Gradients(hidden_NH, head.weight_VH, hidden=hidden, weight=weight)
        for rows in chunks(0, hidden_NH.shape[0], most):
            logits_nV = slab.project(hidden_NH[rows])
            statistics = RowStatistics(grad_N[rows], max_2N[:, rows], {})
            overwrite(logits_nV, local_N[rows], grad_N[rows], statistics, head)
            gradients.add(rows, logits_nV, hidden_NH[rows], ctx.sum_hidden_over)
        return gradients.hidden_NH, gradients.weight(), None, None, None


@dataclass(slots=True, eq=False)
class Job:
    """One call of :func:`slab_loss`; ``sums`` is filled by it."""

    head: Head
    targets_N: Tensor
    slabs: Sequence[tuple[int, int]]
    loss: SlabFunction
    training: bool
    statistics: bool
    sum_hidden_over: dist.ProcessGroup | None
    sums: dict[str, Tensor] = field(default_factory=dict)


class SlabLoss(torch.autograd.Function):
    """Forward computes the loss and both gradients, 6 NHV; backward hands them out."""

    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, job: Job) -> Tensor:
        hidden, weight = (job.training and needed for needed in ctx.needs_input_grad[:2])
        gradients = (
            Gradients(hidden_NH, weight_VH, hidden=hidden, weight=weight) if hidden or weight else None
        )
        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden_NH.device)
        most = slab_rows(weight_VH)
        longest = max((stop - start for start, stop in job.slabs), default=0)
        slab = Slab(job.head, min(most, longest))
        recomputed = 0
        for i in range(len(job.slabs)):
            pieces = chunks(*job.slabs[i], most)
            total += _one_slab(job, i, pieces, slab, hidden_NH, gradients)
            recomputed += gradients is not None and len(pieces) > 1
        job.sums[RECOMPUTED] = torch.full((), float(recomputed), device=hidden_NH.device)
        ctx.gradients = gradients
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        if ctx.gradients is None:
            raise RuntimeError(
                "slab_loss hands its gradients out once; a second backward needs a second call"
            )
        _require_one(upstream)
        gradients, ctx.gradients = ctx.gradients, None
        return gradients.hidden_NH, gradients.weight(), None


def _one_slab(
    job: Job, i: int, pieces: list[slice], slab: Slab, hidden_NH: Tensor, gradients: Gradients | None
) -> Tensor:
    """Return slab ``i``'s loss, add its sums to the job's and its gradients to ``gradients``."""
    head = job.head
    found = []
    for rows in pieces:
        local_n = head.local(job.targets_N[rows])
        logits_nV = slab.project(hidden_NH[rows])
        found.append(row_statistics(logits_nV, local_n, head, more=job.statistics))
    value, grad_n = _evaluate(job, i, found, gradients is not None)
    if gradients is None:
        return value
    # Backwards: the last piece's logits still stand in the slab. A slab of one piece is never projected again.
    for rows, statistics in zip(reversed(pieces), reversed(found), strict=True):
        local_n = head.local(job.targets_N[rows])
        if rows is not pieces[-1]:
            logits_nV = slab.project(hidden_NH[rows])
        own_n = grad_n[rows.start - pieces[0].start : rows.stop - pieces[0].start]
        overwrite(logits_nV, local_n, own_n, statistics, head)
        gradients.add(rows, logits_nV, hidden_NH[rows], job.sum_hidden_over)
    return value


def _evaluate(job: Job, i: int, found: list[RowStatistics], training: bool) -> tuple[Tensor, Tensor | None]:
    """Call the loss on slab ``i``; return its value and, in training, the gradient of the slab's log-probs."""
    logprob_n = torch.cat([statistics.logprob_n for statistics in found])
    names = found[0].extra
    extra = {name: torch.cat([statistics.extra[name] for statistics in found]) for name in names}
    with torch.set_grad_enabled(training):
        logprob_n.requires_grad_(training)
        value, sums = job.loss(i, logprob_n, extra)
        grad_n = None
        if training:
            grad_n = torch.zeros_like(logprob_n)
            if value.requires_grad:  # not where the slab has no rows, or the loss does not look at them
                [grad_n] = torch.autograd.grad(value, [logprob_n], allow_unused=True, materialize_grads=True)
    for name, amount in sums.items():
        job.sums[name] = job.sums[name] + amount.detach() if name in job.sums else amount.detach()
    return value.detach(), grad_n


def _require_one(upstream: Tensor) -> None:
    """The gradients were made for an upstream gradient of 1, and the weight's may stand in main_grad already."""
    if upstream.is_cuda:
        torch._assert_async(upstream == 1, "slab_loss needs an upstream gradient of 1: scale by row weights")
    elif upstream.item() != 1:
        raise ValueError(
            f"slab_loss needs an upstream gradient of 1, as its gradients are made in forward: put factors into the "
            f"rows' weights; got {upstream.item()}"
        )
