"""Backward kernels: scores are made again from q, k and the saved log-sum-exp. No atomics: the same bits each time.

Two passes, each the sole writer of what it makes: queries collect dq over key tiles, then keys collect dk and dv over
query tiles and over the query heads that share them. Seven products per tile instead of five with atomics on dq.
With p = softmax, dp = dout v^T and delta = sum(out * dout):  ds = p * (dp - delta),  dq = scale ds k,
dk = scale ds^T q,  dv = p^T dout. Source: Dao 2023, arXiv:2307.08691; the tiles: ``blocks.py``.
"""

# ruff: noqa: PLR0913  # Triton kernels take pointers and sizes one by one

from __future__ import annotations

import triton
import triton.language as tl

from megatron_align.kernels.packed_attention.blocks import (
    in_turn,
    key_tiles,
    load_intervals,
    load_numbers,
    load_rows,
    query_tiles,
    store_rows,
    visible,
)


@triton.jit
def _collect_dq(
    dq, q, dout, lse2, delta, k_ptr, v_ptr, tile, k_stride, v_stride, tokens, scale_log2, intervals,
    BLOCK_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    first = tile * BLOCK_K
    k = load_rows(k_ptr, first, k_stride, tokens, BLOCK_K, D, D_PADDED, not MASKED)
    v = load_rows(v_ptr, first, v_stride, tokens, BLOCK_K, D, D_PADDED, not MASKED)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse2[:, None])
    if MASKED:
        p = tl.where(visible(intervals, first + tl.arange(0, BLOCK_K)), p, 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr,
    prefix_start_ptr, prefix_end_ptr, own_start_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    out_stride, out_head_stride, dout_stride, dout_head_stride,
    tokens, scale, scale_log2, heads_per_group,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, query heads). Writes dq (laid out as out) and delta ``[H, T]``, which dk and dv need."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    head = tl.program_id(1).to(tl.int64)
    group = head // heads_per_group
    k_ptr += group * k_head_stride
    v_ptr += group * v_head_stride
    last = tl.minimum(first + BLOCK_Q, tokens) - 1
    a, b, c, d, own_a, own_b, own_c, own_d = key_tiles(
        prefix_start_ptr, prefix_end_ptr, own_start_ptr, first, last, BLOCK_K
    )
    q = load_rows(q_ptr + head * q_head_stride, first, q_stride, tokens, BLOCK_Q, D, D_PADDED, False)
    dout = load_rows(dout_ptr + head * dout_head_stride, first, dout_stride, tokens, BLOCK_Q, D, D_PADDED, False)
    out = load_rows(out_ptr + head * out_head_stride, first, out_stride, tokens, BLOCK_Q, D, D_PADDED, False)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    query = first + tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + head * tokens + query, delta, mask=query < tokens)
    lse2 = load_numbers(lse2_ptr + head * tokens, first, tokens, BLOCK_Q, False)
    dq = tl.zeros([BLOCK_Q, D_PADDED], tl.float32)

    for step in range(c - b + own_c - own_b):
        dq = _collect_dq(
            dq, q, dout, lse2, delta, k_ptr, v_ptr, in_turn(step, b, c, own_b), k_stride, v_stride, tokens,
            scale_log2, None, BLOCK_K, D, D_PADDED, False,
        )  # fmt: skip
    # Not earlier: registers are dear in the loop above.
    intervals = load_intervals(prefix_start_ptr, prefix_end_ptr, own_start_ptr, first, tokens, BLOCK_Q)
    in_prefix = b - a + d - c
    for step in range(in_prefix + own_b - own_a + own_d - own_c):
        tile = tl.where(
            step < in_prefix, in_turn(step, a, b, c), in_turn(step - in_prefix, own_a, own_b, own_c)
        )
        dq = _collect_dq(
            dq, q, dout, lse2, delta, k_ptr, v_ptr, tile, k_stride, v_stride, tokens, scale_log2, intervals,
            BLOCK_K, D, D_PADDED, True,
        )  # fmt: skip
    store_rows(dq_ptr + head * out_head_stride, dq * scale, first, out_stride, tokens, BLOCK_Q, D, D_PADDED)


@triton.jit
def _collect_dkdv(
    dk, dv, k, v, key, seen_end, q_ptr, dout_ptr, lse2_ptr, delta_ptr, tile, q_stride, dout_stride, tokens, scale_log2,
    BLOCK_Q: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Transposed, keys by queries, so that p and ds are left operands straight from registers."""
    first = tile * BLOCK_Q
    q = load_rows(q_ptr, first, q_stride, tokens, BLOCK_Q, D, D_PADDED, not MASKED)
    dout = load_rows(dout_ptr, first, dout_stride, tokens, BLOCK_Q, D, D_PADDED, not MASKED)
    lse2 = load_numbers(lse2_ptr, first, tokens, BLOCK_Q, not MASKED)
    delta = load_numbers(delta_ptr, first, tokens, BLOCK_Q, not MASKED)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse2[None, :])
    if MASKED:
        query = first + tl.arange(0, BLOCK_Q)
        # Told by key: one number a row, where the queries' intervals would cost each thread dozens of registers.
        seen = (key[:, None] <= query[None, :]) & (query[None, :] < seen_end[:, None])
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr,
    seen_end_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
    dout_stride, dout_head_stride, dk_stride, dk_head_stride,
    tokens, scale, scale_log2, heads_per_group,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, key heads). Writes dk and dv, both laid out alike."""
    first = tl.program_id(0) * BLOCK_K  # the first keys of a document have the most queries: they go first
    group = tl.program_id(1).to(tl.int64)
    k = load_rows(k_ptr + group * k_head_stride, first, k_stride, tokens, BLOCK_K, D, D_PADDED, False)
    v = load_rows(v_ptr + group * v_head_stride, first, v_stride, tokens, BLOCK_K, D, D_PADDED, False)
    dk = tl.zeros([BLOCK_K, D_PADDED], tl.float32)
    dv = tl.zeros([BLOCK_K, D_PADDED], tl.float32)
    a, b, c, d = query_tiles(seen_end_ptr, first, tokens, BLOCK_K, BLOCK_Q)

    # One loop over (head, tile): the loads of the next head start while the last tiles of this one are computed.
    tiles = c - b
    for step in range(tiles * heads_per_group):
        head = group * heads_per_group + step // tiles
        dk, dv = _collect_dkdv(
            dk, dv, k, v, None, None, q_ptr + head * q_head_stride, dout_ptr + head * dout_head_stride,
            lse2_ptr + head * tokens, delta_ptr + head * tokens,
            b + step % tiles, q_stride, dout_stride, tokens, scale_log2, BLOCK_Q, D, D_PADDED, False,
        )  # fmt: skip
    tiles = b - a + d - c
    key = first + tl.arange(0, BLOCK_K)
    seen_end = load_numbers(seen_end_ptr, first, tokens, BLOCK_K, False)
    for step in range(tiles * heads_per_group):
        head = group * heads_per_group + step // tiles
        dk, dv = _collect_dkdv(
            dk, dv, k, v, key, seen_end, q_ptr + head * q_head_stride, dout_ptr + head * dout_head_stride,
            lse2_ptr + head * tokens, delta_ptr + head * tokens,
            in_turn(step % tiles, a, b, c), q_stride, dout_stride, tokens, scale_log2, BLOCK_Q, D, D_PADDED, True,
        )  # fmt: skip
    store_rows(dk_ptr + group * dk_head_stride, dk * scale, first, dk_stride, tokens, BLOCK_K, D, D_PADDED)
    store_rows(dv_ptr + group * dk_head_stride, dv, first, dk_stride, tokens, BLOCK_K, D, D_PADDED)
