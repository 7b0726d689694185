"""What a slab goes through: project, reduce to statistics of each row, overwrite by dlogits, two GEMMs.

On GPUs the two middle passes are the Triton kernels; elsewhere plain PyTorch does the same a few rows at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.kernels.token_logprobs import kernels
from megatron_align.kernels.token_logprobs.head import Head

# Bytes of one slab of logits. A GPU's holds about 4,096 rows of a real vocabulary in bf16, enough to keep the GEMMs
# efficient and dW's read-modify-write rare. A CPU's GEMMs need fewer rows, and its memory is what tests share.
SLAB_BYTES = {"cpu": 2**27, "cuda": 2**30}
TEMPORARY = 2**20  # elements that the PyTorch passes hold besides the slab


def slab_rows(weight_VH: Tensor) -> int:
    """Return how many rows one slab of logits may have: a multiple of 128 where it is over that."""
    rows = max(1, SLAB_BYTES[weight_VH.device.type] // (weight_VH.shape[0] * weight_VH.element_size()))
    return rows if rows < 128 else rows - rows % 128


def chunks(start: int, stop: int, most: int) -> list[slice]:
    """Cut rows ``[start, stop)`` into pieces of at most ``most``; at least one, perhaps empty."""
    return [slice(at, min(at + most, stop)) for at in range(start, stop, most)] or [slice(start, stop)]


class RowStatistics(NamedTuple):
    """What is known of each row once all ranks have spoken, fp32 (fp64 for fp64 logits)."""

    logprob_n: Tensor
    max_2n: Tensor  # maximum, and log of sum exp(l - maximum): kept apart, as their sum would round the second away
    extra: dict[str, Tensor]  # entropy, log_sum_square; empty unless asked for


class Slab:
    """A buffer of logits, reused for every slab and chunk of one call."""

    def __init__(self, head: Head, rows: int):
        self.head = head
        self._logits = head.weight_VH.new_empty(rows, head.weight_VH.shape[0])

    def project(self, hidden_nH: Tensor) -> Tensor:
        """Fill the buffer with ``hidden @ weight.T`` and return the rows in use."""
        out_nV = self._logits[: hidden_nH.shape[0]]
        return torch.mm(hidden_nH, self.head.weight_VH.T, out=out_nV)


def row_statistics(logits_nV: Tensor, local_n: Tensor, head: Head, *, more: bool = False) -> RowStatistics:
    """Return each row's statistics over all ranks: one small all-gather, 12 bytes a row and rank (20 with more)."""
    part = kernels.statistics if kernels.runs_triton(logits_nV) else _statistics
    part_Sn = part(logits_nV, local_n, head, more=more)
    if head.ranks == 1:
        most_n, sum_n, target_n, *rest = part_Sn
    else:
        most_n, sum_n, target_n, *rest = _combine(head.gathered(part_Sn))
    log_sum_n = sum_n.log()
    extra = {}
    if more:
        squares_n, moment_n = rest
        extra["entropy"] = log_sum_n - moment_n / sum_n
        extra["log_sum_square"] = squares_n.log() - 2 * log_sum_n
    return RowStatistics(target_n - most_n - log_sum_n, torch.stack([most_n, log_sum_n]), extra)


def _combine(parts_RSn: Tensor) -> list[Tensor]:
    """Bring each rank's sums to the common maximum and add them; every rank gets the same bits."""
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


def overwrite(
    logits_nV: Tensor, local_n: Tensor, grad_n: Tensor, statistics: RowStatistics, head: Head
) -> None:
    """Replace the projection by the loss's gradient with respect to it; ``grad_n`` is that of the log-probs."""
    if kernels.runs_triton(logits_nV):
        kernels.overwrite(logits_nV, local_n, grad_n, statistics.max_2n, head)
    else:
        _overwrite(logits_nV, local_n, grad_n, statistics.max_2n, head)


def _few_rows(logits_nV: Tensor) -> Iterator[slice]:
    rows, columns = logits_nV.shape
    step = max(1, TEMPORARY // max(1, columns))
    return (slice(at, at + step) for at in range(0, rows, step))


def logits(projected: Tensor, head: Head) -> Tensor:
    """Return the logits of what was projected: a copy, in fp32 at least."""
    x = projected.to(torch.promote_types(projected.dtype, torch.float32), copy=True)
    if head.softcap is not None:
        x.div_(head.softcap).tanh_().mul_(head.softcap)
    return x if head.temperature == 1.0 else x.div_(head.temperature)


def _statistics(logits_nV: Tensor, local_n: Tensor, head: Head, *, more: bool) -> Tensor:
    """As :func:`kernels.statistics`."""
    exact = torch.promote_types(logits_nV.dtype, torch.float32)
    out_Sn = logits_nV.new_zeros(5 if more else 3, logits_nV.shape[0], dtype=exact)
    if head.real == 0:
        out_Sn[0] = kernels.EMPTY
        return out_Sn
    here_n = (local_n >= 0) & (local_n < head.real)
    column_n = local_n.where(here_n, 0)
    for rows in _few_rows(logits_nV):
        x = logits(logits_nV[rows, : head.real], head)
        out_Sn[2, rows] = x.gather(1, column_n[rows, None])[:, 0].where(here_n[rows], 0.0)
        out_Sn[0, rows] = x.amax(1)
        gap = x.sub_(out_Sn[0, rows, None])
        if more:
            e = gap.exp()
            out_Sn[3, rows] = e.square().sum(1)
            out_Sn[4, rows] = gap.mul_(e).sum(1)
        else:
            e = gap.exp_()
        out_Sn[1, rows] = e.sum(1)
    return out_Sn


def _overwrite(logits_nV: Tensor, local_n: Tensor, grad_n: Tensor, max_2n: Tensor, head: Head) -> None:
    """As :func:`kernels.overwrite`."""
    grad_n = grad_n / head.temperature
    here_n = (local_n >= 0) & (local_n < head.real)
    column_n, onehot_n = local_n.where(here_n, 0), grad_n * here_n
    logits_nV[:, head.real :] = 0.0
    if head.real == 0:
        return
    for rows in _few_rows(logits_nV):
        x = logits(logits_nV[rows, : head.real], head)
        slope = None if head.softcap is None else 1 - (x * (head.temperature / head.softcap)).square_()
        x.sub_(max_2n[0, rows, None]).sub_(max_2n[1, rows, None]).exp_().mul_(-grad_n[rows, None])
        x.scatter_add_(1, column_n[rows, None], onehot_n[rows, None])
        if slope is not None:
            x.mul_(slope)
        # A row without gradient changes nothing, whatever its logits are: 0 * inf would be NaN.
        logits_nV[rows, : head.real] = x.masked_fill_(grad_n[rows, None] == 0, 0.0)


class Gradients:
    """Where the gradients of one call go: hidden in its dtype, the weight summed in fp32.

    A weight with a wide enough ``main_grad`` (megatron-core's gradient buffer) is added to there, in place. The
    buffer must not be reduced before the backward that follows; megatron-core reduces after the last one.
    """

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, *, hidden: bool, weight: bool):
        self._weight_VH = weight_VH
        self._exact = torch.promote_types(weight_VH.dtype, torch.float32)
        self.hidden_NH = torch.empty_like(hidden_NH) if hidden else None
        main_grad = getattr(weight_VH, "main_grad", None)
        self._in_main_grad = weight and main_grad is not None and main_grad.dtype == self._exact
        self._sum_VH = main_grad if self._in_main_grad else None
        if weight and not self._in_main_grad:
            self._sum_VH = torch.zeros_like(weight_VH, dtype=self._exact)

    def add(
        self, rows: slice, dlogits_nV: Tensor, hidden_nH: Tensor, sum_over: dist.ProcessGroup | None
    ) -> None:
        """Write ``hidden_NH[rows]``, summed over the ranks of ``sum_over``, while the weight's GEMM runs."""
        sent = None
        if self.hidden_NH is not None:
            torch.mm(dlogits_nV, self._weight_VH, out=self.hidden_NH[rows])
            if sum_over is not None:
                sent = dist.all_reduce(self.hidden_NH[rows], group=sum_over, async_op=True)
        if self._sum_VH is not None:
            _add_product(self._sum_VH, dlogits_nV, hidden_nH)
        if sent is not None:
            sent.wait()

    def weight(self) -> Tensor | None:
        """Return the weight's gradient for autograd; where ``main_grad`` has it, a stand-in that megatron-core skips.

        megatron-core's hook wants to see a gradient, and with ``zero_out_wgrad`` (embeddings tied on this rank) adds
        it to what is already there.
        """
        if not self._in_main_grad:
            return None if self._sum_VH is None else self._sum_VH.to(self._weight_VH.dtype)
        weight_VH = self._weight_VH
        weight_VH.grad_added_to_main_grad = True
        zeros = getattr(weight_VH, "zero_out_wgrad", False)
        return torch.zeros_like(weight_VH) if zeros else torch.empty_like(weight_VH)


def _add_product(sum_VH: Tensor, dlogits_nV: Tensor, hidden_nH: Tensor) -> None:
    """``sum += dlogits.T @ hidden``, added in the sum's precision."""
    if dlogits_nV.dtype == sum_VH.dtype:
        sum_VH.addmm_(dlogits_nV.T, hidden_nH)
    elif sum_VH.is_cuda and _adds_wide(sum_VH.device, dlogits_nV.dtype):
        torch.addmm(sum_VH, dlogits_nV.T, hidden_nH, out_dtype=sum_VH.dtype, out=sum_VH)
    elif sum_VH.is_cuda:
        # An older PyTorch rounds the product of each slab to the low precision, once, and a piece at a time.
        for rows in chunks(0, sum_VH.shape[0], 8192):
            sum_VH[rows] += dlogits_nV[:, rows].T @ hidden_nH
    else:
        wide_nH = hidden_nH.to(sum_VH.dtype)
        for rows in chunks(0, sum_VH.shape[0], max(1, TEMPORARY // max(1, dlogits_nV.shape[0]))):
            sum_VH[rows].addmm_(dlogits_nV[:, rows].T.to(sum_VH.dtype), wide_nH)


@functools.cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds a low-precision product to an fp32 matrix in one GEMM (2.8 knows the option only
    for a low-precision matrix to add to).
    """
    one = torch.ones(16, 16, device=device, dtype=dtype)
    total = one.float()
    try:
        torch.addmm(total, one, one, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):  # no such option, or not for this pair of dtypes
        return False
    return True
