"""Triton kernel of the rotation: each element is read once and written once; computed in fp32.

A program rotates all heads of one token, so that it reads the token's row of the tables once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_HEADS = 16  # of a program at a time
WARPS = 4


@triton.jit
def _rotate_heads(x_ptr, out_ptr, of_head, cos, sin, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    column = tl.arange(0, HALF)[None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (column < half)
        source, place = x_ptr + head * of_head + column, out_ptr + head * 2 * half + column
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        tl.store(place, (first * cos - second * sin).to(dtype), mask=inside)
        tl.store(place + half, (second * cos + first * sin).to(dtype), mask=inside)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    q_out_ptr,
    k_out_ptr,
    cos_ptr,
    sin_ptr,
    H,
    G,
    half,
    q_of_token,
    q_of_head,
    k_of_token,
    k_of_head,
    BACK: tl.constexpr,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    cos = tl.load(cos_ptr + token * 2 * half + column, mask=column < half, other=0.0)
    sin = tl.load(sin_ptr + token * 2 * half + column, mask=column < half, other=0.0)
    if BACK:
        sin = -sin
    q_ptr += token * q_of_token
    k_ptr += token * k_of_token
    q_out_ptr += token * H * 2 * half
    k_out_ptr += token * G * 2 * half
    _rotate_heads(q_ptr, q_out_ptr, q_of_head, cos, sin, H, half, Q_HEADS, HALF)
    _rotate_heads(k_ptr, k_out_ptr, k_of_head, cos, sin, G, half, K_HEADS, HALF)


def rotate(
    q_QHD: Tensor, k_QGD: Tensor, cos_QD: Tensor, sin_QD: Tensor, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """Return queries and keys, contiguous, rotated by the angles of the tables, or ``back`` by their negatives."""
    q_QHD, k_QGD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_QHD, k_QGD))
    q_out, k_out = q_QHD.new_empty(q_QHD.shape), k_QGD.new_empty(k_QGD.shape)
    tokens, heads, dim = q_QHD.shape
    groups = k_QGD.shape[1]
    if tokens:
        with torch.cuda.device_of(q_QHD):  # Triton launches on the current device
            _rope_kernel[(tokens,)](
                *(q_QHD, k_QGD, q_out, k_out, cos_QD, sin_QD),
                *(heads, groups, dim // 2, *q_QHD.stride()[:2], *k_QGD.stride()[:2]),
                BACK=back,
                Q_HEADS=_at_a_time(heads),
                K_HEADS=_at_a_time(groups),
                HALF=triton.next_power_of_2(dim // 2),
                num_warps=WARPS,
            )
    return q_out, k_out


def _at_a_time(heads: int) -> int:
    return min(_MOST_HEADS, triton.next_power_of_2(heads))
