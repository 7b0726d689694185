"""Triton kernels: two passes over a slab of logits. One reduces it to statistics per row, one overwrites it by dlogits.

Both read the projection in the slab's dtype and compute in fp32. A logit ``l`` is the projected value ``x`` after
soft-cap and temperature. Shapes: n rows of the slab, V vocabulary rows of this rank (``real`` of them no padding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_align.kernels.token_logprobs.vocab_shard import VocabShard

BLOCK = 4096  # vocabulary columns of one program at a time
WARPS = 8
EMPTY = -1e30  # the maximum of no columns: finite, so that EMPTY - EMPTY is 0 and not NaN


@triton.jit
def _tanh(x):
    """Hyperbolic tangent; the series near 0 avoids the cancellation of ``1 - 2 / (exp(2x) + 1)``."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(square < 0.0625, x * series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _logit(x, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """Return the logit and its derivative by ``x``, the latter without the inverse temperature."""
    slope = 1.0
    if SOFTCAP:
        capped = _tanh(x / softcap)
        x = softcap * capped
        slope = 1.0 - capped * capped
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
    """Reduce one row per program: ``out[:, row]`` = max, sum exp(l - max), target's l (0 if on another rank).

    With MORE also sum exp(2 (l - max)) and sum exp(l - max) (l - max). Each lane has its own maximum until the end.
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
        # One exp serves both cases: a new maximum rescales the sums, any other value is added to them.
        gap = x - most
        higher = gap > 0
        e = tl.where(live, tl.exp(-tl.abs(gap)), 0.0)
        if MORE:
            moment = tl.where(higher, e * (moment - gap * total), moment + e * gap)
            squares = tl.where(higher, e * e * squares + 1.0, squares + e * e)
        total = tl.where(higher, e * total + 1.0, total + e)
        most = tl.where(higher, x, most)
    # A lane without columns has maximum -1e30 and sums 0: any scale leaves them 0.
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
    mean_ptr,
    entropy_grad_ptr,
    max_ptr,
    log_sum_ptr,
    stride,
    real,
    rows_here,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite ``[row, block of columns]`` by ``grad (onehot - softmax) d logit / d x``; padding columns by 0.

    With ENTROPY add the entropy's gradient, ``-entropy_grad softmax (l - max - mean) d logit / d x``, where mean is
    that of ``l - max`` under the softmax: log softmax + entropy, without their large common part.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * stride + column
    x = tl.load(at, mask=column < real, other=0.0)
    logit, slope = _logit(x.to(tl.float32), inverse_temperature, softcap, SOFTCAP)
    grad = tl.load(grad_ptr + row)
    gap = logit - tl.load(max_ptr + row)
    softmax = tl.exp(gap - tl.load(log_sum_ptr + row))
    onehot = tl.where(column == tl.load(target_ptr + row), 1.0, 0.0)
    change = grad * inverse_temperature * slope * (onehot - softmax)
    ignored = grad == 0.0
    if ENTROPY:
        entropy_grad = tl.load(entropy_grad_ptr + row)
        change -= entropy_grad * inverse_temperature * slope * softmax * (gap - tl.load(mean_ptr + row))
        ignored = ignored & (entropy_grad == 0.0)
    # A row with zero gradient contributes nothing, whatever its logits are: 0 * inf would be NaN.
    change = tl.where(ignored, 0.0, tl.where(column < real, change, 0.0))
    tl.store(at, change.to(x.dtype), mask=column < rows_here)


def triton_statistics(logits_nV: Tensor, local_n: Tensor, shard: VocabShard, *, more: bool) -> Tensor:
    """Return this rank's statistics of each row, ``[S, n]`` fp32, reading the slab once.

    Args:
        logits_nV: the projection, contiguous.
        local_n: int64, column of each target on this rank; outside ``[0, shard.real_rows)`` if another rank holds it.
        shard: holds soft-cap, temperature and the number of real rows.
        more: S = 5 statistics instead of 3.
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
            shard.real_rows,
            1.0 / shard.temperature,
            shard.softcap or 1.0,
            SOFTCAP=shard.softcap is not None,
            MORE=more,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out_Sn


def triton_overwrite(
    logits_nV: Tensor,
    local_n: Tensor,
    grad_n: Tensor,
    max_2n: Tensor,
    shard: VocabShard,
    entropy_2n: Tensor | None = None,
) -> None:
    """Overwrite the projection by the loss's gradient with respect to it, in one pass.

    Args:
        logits_nV: the projection, contiguous; overwritten.
        local_n: as in :func:`triton_statistics`.
        grad_n: fp32, the gradient with respect to each log-prob.
        max_2n: fp32, maximum, and log of the sum of exponentials, over all ranks.
        shard: as in :func:`triton_statistics`.
        entropy_2n: fp32, mean of ``l - maximum`` under each row's softmax over all ranks, and the gradient with respect
            to its entropy; None: it has none.
    """
    n, rows_here = logits_nV.shape
    if n:
        _dlogits_kernel[(n, triton.cdiv(rows_here, BLOCK))](
            logits_nV,
            local_n,
            grad_n,
            *(max_2n if entropy_2n is None else entropy_2n),  # not read without ENTROPY
            max_2n[0],
            max_2n[1],
            logits_nV.stride(0),
            shard.real_rows,
            rows_here,
            1.0 / shard.temperature,
            shard.softcap or 1.0,
            SOFTCAP=shard.softcap is not None,
            ENTROPY=entropy_2n is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
