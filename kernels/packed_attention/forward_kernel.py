"""Forward kernel: online softmax over the key tiles that a block of queries sees.

Each program computes one block of queries of one head. Scores and statistics in fp32, products on tensor cores in the
input dtype (fp32: exact products, no TF32). The log-sum-exp is to base 2, as the chip computes ``exp2``.
Source: Dao 2023, arXiv:2307.08691; the tiles visited: ``tile_ranges.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_align.kernels.packed_attention.tile_ranges import (
    key_tile,
    key_tile_count,
    key_tiles,
    load_rows,
    store_rows,
    visible,
)

# Initial maximum: finite, so that a row that sees no key of its first tile makes no NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr,
    prefix_start_ptr, prefix_end_ptr, own_start_ptr, own_end_ptr,
    q_stride: tl.constexpr, q_head_stride, k_stride: tl.constexpr, k_head_stride,
    v_stride: tl.constexpr, v_head_stride, out_stride: tl.constexpr, out_head_stride,
    queries, tokens, scale_log2, heads_per_group,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, query heads). Writes out ``[Q, H, D]`` and the base-2 log-sum-exp ``[H, Q]``."""
    # Causal work grows towards the end of a document: the last blocks go first, so that the grid ends with light ones.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, queries) - 1
    head = tl.program_id(1).to(tl.int64)
    k_ptr += head // heads_per_group * k_head_stride
    v_ptr += head // heads_per_group * v_head_stride
    q = load_rows(q_ptr + head * q_head_stride, first, q_stride, queries, BLOCK_Q, D, D_PADDED)
    acc = tl.zeros([BLOCK_Q, D_PADDED], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    highest = tl.full([BLOCK_Q], LOWEST, tl.float32)

    a, b, c, d, own_a, own_b, own_c, own_d = key_tiles(
        prefix_start_ptr, prefix_end_ptr, own_start_ptr, own_end_ptr, first, last, BLOCK_K
    )
    for PARTIAL in tl.static_range(2):  # first the full tiles, then those that need a mask
        count = key_tile_count(a, b, c, d, own_a, own_b, own_c, own_d, PARTIAL)
        for step in range(count):
            first_key = key_tile(step, a, b, c, d, own_a, own_b, own_c, PARTIAL) * BLOCK_K
            k = load_rows(k_ptr, first_key, k_stride, tokens, BLOCK_K, D, D_PADDED, PARTIAL)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if PARTIAL:
                seen = visible(
                    prefix_start_ptr, prefix_end_ptr, own_start_ptr, own_end_ptr,
                    first, first_key, queries, BLOCK_Q, BLOCK_K,
                )  # fmt: skip
                scores = tl.where(seen, scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)  # right as scale > 0
            weights = tl.exp2(scores * scale_log2 - new_highest[:, None])
            fade = tl.exp2(highest - new_highest)
            total = total * fade + tl.sum(weights, 1)
            v = load_rows(v_ptr, first_key, v_stride, tokens, BLOCK_K, D, D_PADDED, PARTIAL)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
            highest = new_highest

    # At least 1 for rows that saw a key; rows past the last query saw none.
    total = tl.maximum(total, 0.5)
    out = acc / total[:, None]
    store_rows(out_ptr + head * out_head_stride, out, first, out_stride, queries, BLOCK_Q, D, D_PADDED)
    query = first + tl.arange(0, BLOCK_Q)
    tl.store(lse2_ptr + head * queries + query, highest + tl.log2(total), mask=query < queries)
