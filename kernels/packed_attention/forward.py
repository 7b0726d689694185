"""Forward kernel: online softmax over the tiles that a block of queries sees.

Each program makes one block of queries of one head. Scores and statistics in fp32, products on tensor cores in the
input dtype (fp32: exact products, no TF32). The log-sum-exp is kept to base 2, as ``exp2`` is what the chip has.
Source of the method: Dao 2023, arXiv:2307.08691; the tiles: ``blocks.py``.
"""

# ruff: noqa: PLR0913  # Triton kernels take pointers and sizes one by one

from __future__ import annotations

import triton
import triton.language as tl

from megatron_align.kernels.packed_attention.blocks import in_turn, key_tiles, load_intervals, load_rows, store_rows, visible

# Score of an unseen pair: finite, so that a row whose first tile holds nothing yet makes no NaN. What such a
# row gathers is multiplied by exp2(-1e30) = 0 as soon as it meets its first key, and each query sees itself.
UNSEEN = tl.constexpr(-1.0e30)


@triton.jit
def _attend_tile(
    state, q, k_ptr, v_ptr, tile, k_stride, v_stride, tokens, scale_log2, intervals,
    BLOCK_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; ``state`` is (accumulator, sum, maximum)."""
    acc, total, highest = state
    first = tile * BLOCK_K
    k = load_rows(k_ptr, first, k_stride, tokens, BLOCK_K, D, D_PADDED, not MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        seen = visible(intervals, first + tl.arange(0, BLOCK_K))
        scores = tl.where(seen, scores * scale_log2, UNSEEN)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
    else:
        new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)  # right as scale > 0
        weights = tl.exp2(scores * scale_log2 - new_highest[:, None])
    fade = tl.exp2(highest - new_highest)
    total = total * fade + tl.sum(weights, 1)
    v = load_rows(v_ptr, first, v_stride, tokens, BLOCK_K, D, D_PADDED, not MASKED)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, new_highest


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, prefix_start_ptr, prefix_end_ptr, own_start_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, out_stride, out_head_stride,
    tokens, scale_log2, heads_per_group,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, query heads). Writes out ``[T, H, D]`` and the base-2 log-sum-exp ``[H, T]``."""
    # Causal work grows towards the end of a document: the last blocks go first, so that the tail of the grid is light.
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
    acc = tl.zeros([BLOCK_Q, D_PADDED], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    highest = tl.full([BLOCK_Q], UNSEEN, tl.float32)

    for step in range(c - b + own_c - own_b):
        tile = in_turn(step, b, c, own_b)
        acc, total, highest = _attend_tile(
            (acc, total, highest), q, k_ptr, v_ptr, tile, k_stride, v_stride, tokens, scale_log2, None,
            BLOCK_K, D, D_PADDED, False,
        )  # fmt: skip
    # Not earlier: registers are dear in the loop above.
    intervals = load_intervals(prefix_start_ptr, prefix_end_ptr, own_start_ptr, first, tokens, BLOCK_Q)
    in_prefix = b - a + d - c
    for step in range(in_prefix + own_b - own_a + own_d - own_c):
        tile = tl.where(
            step < in_prefix, in_turn(step, a, b, c), in_turn(step - in_prefix, own_a, own_b, own_c)
        )
        acc, total, highest = _attend_tile(
            (acc, total, highest), q, k_ptr, v_ptr, tile, k_stride, v_stride, tokens, scale_log2, intervals,
            BLOCK_K, D, D_PADDED, True,
        )  # fmt: skip

    store_rows(
        out_ptr + head * out_head_stride, acc / total[:, None], first, out_stride, tokens, BLOCK_Q, D, D_PADDED
    )
    query = first + tl.arange(0, BLOCK_Q)
    tl.store(lse2_ptr + head * tokens + query, highest + tl.log2(total), mask=query < tokens)
