"""Triton: two passes over a slab of logits. One reads it and leaves a few numbers per row; one overwrites it.

Both work on what the projection left in the slab's own dtype and compute in fp32. ``logit(x)`` below is the value
after soft-cap and temperature.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from megatron_align.kernels.token_logprobs.head import Head

# Kernels take pointers and sizes one by one.
# ruff: noqa: PLR0913

BLOCK = 4096  # vocabulary columns of one program at a time
WARPS = 8
EMPTY = -1e30  # the maximum of no columns: finite, so that EMPTY - EMPTY is 0 and not NaN
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def runs_triton(logits_nV: Tensor) -> bool:
    """Whether the kernels run here: on GPUs, and in Triton's interpreter; fp64 is left to PyTorch.

    Raises:
        ValueError: for bf16 in the interpreter, which computes on its raw bit patterns.
    """
    if logits_nV.is_cuda:
        return logits_nV.dtype in _DTYPES
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and logits_nV.dtype == torch.bfloat16:
        raise ValueError("TRITON_INTERPRET=1 needs fp32 or fp16: Triton's interpreter gets bf16 wrong")
    return interpreted and logits_nV.dtype in _DTYPES


@triton.jit
def _tanh(x):
    """Hyperbolic tangent; the series near 0 avoids the cancellation of ``1 - 2 / (exp(2x) + 1)``."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(square < 0.0625, x * series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _logit(x, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """Return (logit, what its derivative by ``x`` is besides the inverse temperature)."""
    slope = 1.0
    if SOFTCAP:
        bent = _tanh(x / softcap)
        x = softcap * bent
        slope = 1.0 - bent * bent
    return x * inverse_temperature, slope


@triton.jit
def _statistics_kernel(
    logits_ptr,
    target_ptr,
    out_ptr,
    n,
    stride,
    real,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    MORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program: ``out[:, row]`` = max, sum exp(l - max), target's l (0 if not here); with MORE also
    sum exp(2 (l - max)) and sum exp(l - max) (l - max). Each lane keeps its own maximum until the end.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    lane = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, real, BLOCK):
        live = start + lane < real
        x = tl.load(logits_ptr + start + lane, mask=live, other=0.0).to(tl.float32)
        x, _ = _logit(x, inverse_temperature, softcap, SOFTCAP)
        x = tl.where(live, x, most)
        # One exp serves both cases: a new maximum shrinks what was summed, anything else adds to it.
        gap = x - most
        higher = gap > 0
        e = tl.where(live, tl.exp(-tl.abs(gap)), 0.0)
        if MORE:
            moment = tl.where(higher, e * (moment - gap * total), moment + e * gap)
            squares = tl.where(higher, e * e * squares + 1.0, squares + e * e)
        total = tl.where(higher, e * total + 1.0, total + e)
        most = tl.where(higher, x, most)
    # A lane that saw nothing has -1e30 and sums 0: any scale is harmless to it.
    row_max = tl.max(most, 0)
    gap = most - row_max
    scale = tl.exp(gap)
    target = tl.load(target_ptr + row)
    here = (target >= 0) & (target < real)
    x = tl.load(logits_ptr + tl.where(here, target, 0), mask=here, other=0.0).to(tl.float32)
    x, _ = _logit(x, inverse_temperature, softcap, SOFTCAP)
    tl.store(out_ptr + row, row_max)
    tl.store(out_ptr + n + row, tl.sum(total * scale, 0))
    tl.store(out_ptr + 2 * n + row, tl.where(here, x, 0.0))
    if MORE:
        tl.store(out_ptr + 3 * n + row, tl.sum(squares * scale * scale, 0))
        tl.store(out_ptr + 4 * n + row, tl.sum(scale * (moment + gap * total), 0))


@triton.jit
def _dlogits_kernel(
    logits_ptr,
    target_ptr,
    grad_ptr,
    max_ptr,
    log_sum_ptr,
    stride,
    real,
    rows_here,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite ``[row, block of columns]`` by ``grad (onehot - softmax) d logit / d x``; padding columns by 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * stride + column
    x = tl.load(at, mask=column < real, other=0.0)
    logit, slope = _logit(x.to(tl.float32), inverse_temperature, softcap, SOFTCAP)
    grad = tl.load(grad_ptr + row)
    softmax = tl.exp((logit - tl.load(max_ptr + row)) - tl.load(log_sum_ptr + row))
    onehot = tl.where(column == tl.load(target_ptr + row), 1.0, 0.0)
    change = grad * inverse_temperature * slope * (onehot - softmax)
    # A row without gradient changes nothing, whatever its logits are: 0 * inf would be NaN.
    change = tl.where(grad == 0.0, 0.0, tl.where(column < real, change, 0.0))
    tl.store(at, change.to(x.dtype), mask=column < rows_here)


def statistics(logits_nV: Tensor, local_n: Tensor, head: Head, *, more: bool) -> Tensor:
    """Return ``[S, n]`` fp32: this rank's part of the statistics. Reads the slab once.

    Args:
        logits_nV: the projection, contiguous.
        local_n: int64, each target's column on this rank; outside ``[0, head.real)`` where another rank has it.
        head: how logits come from the projection.
        more: 5 statistics rather than 3.
    """
    n = logits_nV.shape[0]
    out_Sn = torch.empty(5 if more else 3, n, dtype=torch.float32, device=logits_nV.device)
    if n:
        _statistics_kernel[(n,)](
            logits_nV,
            local_n,
            out_Sn,
            n,
            logits_nV.stride(0),
            head.real,
            1.0 / head.temperature,
            head.softcap or 1.0,
            SOFTCAP=head.softcap is not None,
            MORE=more,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out_Sn


def overwrite(logits_nV: Tensor, local_n: Tensor, grad_n: Tensor, max_2n: Tensor, head: Head) -> None:
    """Replace the logits by the loss's gradient with respect to the projection, in one pass.

    Args:
        logits_nV: the projection, contiguous; overwritten.
        local_n: as in :func:`statistics`.
        grad_n: fp32, the gradient with respect to each log-prob.
        max_2n: fp32, maximum and log of the sum, over all ranks.
        head: as in :func:`statistics`.
    """
    n, rows_here = logits_nV.shape
    if n:
        _dlogits_kernel[(n, triton.cdiv(rows_here, BLOCK))](
            logits_nV,
            local_n,
            grad_n,
            max_2n[0],
            max_2n[1],
            logits_nV.stride(0),
            head.real,
            rows_here,
            1.0 / head.temperature,
            head.softcap or 1.0,
            SOFTCAP=head.softcap is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
