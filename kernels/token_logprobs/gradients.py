"""Accumulate the gradients of hidden states and weight slab by slab; the weight's in fp32."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.kernels.token_logprobs.slab import TEMPORARY_ELEMENTS, chunks


class Gradients:
    """Accumulator of the gradients of one call: hidden states in their dtype, the weight in fp32.

    The gradient of a weight with an fp32 ``main_grad`` (megatron-core's gradient buffer) is added to that buffer in
    place. The buffer must not be reduced before the backward that follows; megatron-core reduces after the last one.
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
        """Add the gradients of some rows; those of the hidden states are all-reduced while the weight's GEMM runs."""
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
        """Return the weight's gradient for autograd; if it is in ``main_grad``, a dummy that megatron-core ignores.

        megatron-core's hook requires a gradient, and with ``zero_out_wgrad`` (embeddings tied on this rank) adds it to
        ``main_grad``: the dummy is then zero.
        """
        if not self._in_main_grad:
            return None if self._sum_VH is None else self._sum_VH.to(self._weight_VH.dtype)
        weight_VH = self._weight_VH
        weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # megatron-core reads it
        zeros = getattr(weight_VH, "zero_out_wgrad", False)
        return torch.zeros_like(weight_VH) if zeros else torch.empty_like(weight_VH)


def _add_product(sum_VH: Tensor, dlogits_nV: Tensor, hidden_nH: Tensor) -> None:
    """Compute ``sum += dlogits.T @ hidden``, adding in the sum's precision."""
    if dlogits_nV.dtype == sum_VH.dtype:
        sum_VH.addmm_(dlogits_nV.T, hidden_nH)
    elif sum_VH.is_cuda and _adds_wide(sum_VH.device, dlogits_nV.dtype):
        torch.addmm(sum_VH, dlogits_nV.T, hidden_nH, out_dtype=sum_VH.dtype, out=sum_VH)
    elif sum_VH.is_cuda:
        # An older PyTorch: the product of each slab is rounded to the low precision once; done a few rows at a time.
        for rows in chunks(0, sum_VH.shape[0], 8192):
            sum_VH[rows] += dlogits_nV[:, rows].T @ hidden_nH
    else:
        wide_nH = hidden_nH.to(sum_VH.dtype)
        for rows in chunks(0, sum_VH.shape[0], max(1, TEMPORARY_ELEMENTS // max(1, dlogits_nV.shape[0]))):
            sum_VH[rows].addmm_(dlogits_nV[:, rows].T.to(sum_VH.dtype), wide_nH)


@functools.cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this PyTorch adds a low-precision product to an fp32 matrix in one GEMM (2.8 does not)."""
    one = torch.ones(16, 16, device=device, dtype=dtype)
    total = one.float()
    try:
        torch.addmm(total, one, one, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):  # no such option, or not for this pair of dtypes
        return False
    return True
