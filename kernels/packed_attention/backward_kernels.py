"""Backward kernels: scores are recomputed from q, k and the saved log-sum-exp. No atomics: deterministic.

Two passes, each the only writer of its outputs: queries accumulate dq over key tiles, then keys accumulate dk and dv
over query tiles and over the query heads that share them. Seven products per tile instead of five with atomics on dq.
With p = softmax, dp = dout v^T and delta = sum(out * dout):  ds = p * (dp - delta),  dq = scale ds k,
dk = scale ds^T q,  dv = p^T dout. Source: Dao 2023, arXiv:2307.08691; the tiles visited: ``tile_ranges.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_align.kernels.packed_attention.tile_ranges import (
    key_tile,
    key_tile_count,
    key_tiles,
    load_numbers,
    load_rows,
    next_query_tile,
    query_tile,
    query_tile_count,
    query_tiles,
    store_rows,
    visible,
)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr,
    prefix_start_ptr, prefix_end_ptr, own_start_ptr, own_end_ptr,
    q_stride: tl.constexpr, q_head_stride, k_stride: tl.constexpr, k_head_stride,
    v_stride: tl.constexpr, v_head_stride,
    out_stride: tl.constexpr, out_head_stride, dout_stride: tl.constexpr, dout_head_stride,
    queries, tokens, scale, scale_log2, heads_per_group,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, query heads). Writes dq (laid out as out) and delta ``[H, Q]``, which dk needs."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, queries) - 1
    head = tl.program_id(1).to(tl.int64)
    k_ptr += head // heads_per_group * k_head_stride
    v_ptr += head // heads_per_group * v_head_stride
    q = load_rows(q_ptr + head * q_head_stride, first, q_stride, queries, BLOCK_Q, D, D_PADDED)
    dout = load_rows(dout_ptr + head * dout_head_stride, first, dout_stride, queries, BLOCK_Q, D, D_PADDED)
    out = load_rows(out_ptr + head * out_head_stride, first, out_stride, queries, BLOCK_Q, D, D_PADDED)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    query = first + tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + head * queries + query, delta, mask=query < queries)
    lse2 = load_numbers(lse2_ptr + head * queries, first, queries, BLOCK_Q)
    dq = tl.zeros([BLOCK_Q, D_PADDED], tl.float32)

    a, b, c, d, own_a, own_b, own_c, own_d = key_tiles(
        prefix_start_ptr, prefix_end_ptr, own_start_ptr, own_end_ptr, first, last, BLOCK_K
    )
    for PARTIAL in tl.static_range(2):  # first the full tiles, then those that need a mask
        count = key_tile_count(a, b, c, d, own_a, own_b, own_c, own_d, PARTIAL)
        for step in range(count):
            first_key = key_tile(step, a, b, c, d, own_a, own_b, own_c, PARTIAL) * BLOCK_K
            k = load_rows(k_ptr, first_key, k_stride, tokens, BLOCK_K, D, D_PADDED, PARTIAL)
            v = load_rows(v_ptr, first_key, v_stride, tokens, BLOCK_K, D, D_PADDED, PARTIAL)
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse2[:, None])
            if PARTIAL:
                seen = visible(
                    prefix_start_ptr, prefix_end_ptr, own_start_ptr, own_end_ptr,
                    first, first_key, queries, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
                p = tl.where(seen, p, 0.0)
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr + head * out_head_stride, dq * scale, first, out_stride, queries, BLOCK_Q, D, D_PADDED)


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, seen_start_ptr, seen_end_ptr,
    q_stride: tl.constexpr, q_head_stride, k_stride: tl.constexpr, k_head_stride,
    v_stride: tl.constexpr, v_head_stride,
    dout_stride: tl.constexpr, dout_head_stride, dk_stride: tl.constexpr, dk_head_stride,
    queries, tokens, scale, scale_log2, heads_per_group,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, key heads). Writes dk and dv, both with the same strides.

    Computes the transpose, keys by queries, so that p and ds are left operands straight from registers.
    """
    first = tl.program_id(0) * BLOCK_K  # a document's first keys have the most queries: they go first
    group = tl.program_id(1).to(tl.int64)
    k = load_rows(k_ptr + group * k_head_stride, first, k_stride, tokens, BLOCK_K, D, D_PADDED)
    v = load_rows(v_ptr + group * v_head_stride, first, v_stride, tokens, BLOCK_K, D, D_PADDED)
    dk = tl.zeros([BLOCK_K, D_PADDED], tl.float32)
    dv = tl.zeros([BLOCK_K, D_PADDED], tl.float32)

    a, b, c, d = query_tiles(seen_start_ptr, seen_end_ptr, first, tokens, BLOCK_K, BLOCK_Q)
    for PARTIAL in tl.static_range(2):  # first the full tiles, then those that need a mask
        head, tile = group * heads_per_group, query_tile(a, b, c, PARTIAL)
        # One loop over (head, tile), so that the next head's tiles are prefetched during the last ones of this head.
        for _ in range(query_tile_count(a, b, c, d, PARTIAL) * heads_per_group):
            first_query = tile * BLOCK_Q
            q = load_rows(
                q_ptr + head * q_head_stride, first_query, q_stride, queries, BLOCK_Q, D, D_PADDED, PARTIAL
            )
            dout = load_rows(
                dout_ptr + head * dout_head_stride,
                first_query,
                dout_stride,
                queries,
                BLOCK_Q,
                D,
                D_PADDED,
                PARTIAL,
            )
            lse2 = load_numbers(lse2_ptr + head * queries, first_query, queries, BLOCK_Q, PARTIAL)
            delta = load_numbers(delta_ptr + head * queries, first_query, queries, BLOCK_Q, PARTIAL)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse2[None, :])
            if PARTIAL:
                # Masked by key: two numbers a row, where the queries' intervals would cost each thread dozens.
                seen_start = load_numbers(seen_start_ptr, first, tokens, BLOCK_K)
                seen_end = load_numbers(seen_end_ptr, first, tokens, BLOCK_K)
                query = first_query + tl.arange(0, BLOCK_Q)
                seen = (seen_start[:, None] <= query[None, :]) & (query[None, :] < seen_end[:, None])
                p = tl.where(seen, p, 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            head, tile = next_query_tile(head, tile, a, b, c, d, PARTIAL)
    store_rows(dk_ptr + group * dk_head_stride, dk * scale, first, dk_stride, tokens, BLOCK_K, D, D_PADDED)
    store_rows(dv_ptr + group * dk_head_stride, dv, first, dk_stride, tokens, BLOCK_K, D, D_PADDED)
