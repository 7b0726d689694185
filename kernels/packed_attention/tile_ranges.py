"""Block sparsity: which tiles of the score matrix have a visible pair, and which need no mask.

A tile is a block of queries (rows) times a block of keys, on grids that start at row 0 and token 0. No block map is
built: each program derives its ranges of tiles from a few intervals. This is exact for any pack and any ascending
choice of queries, because:

- Key ``k`` is seen by the rows ``[seen_start_k, seen_end_k)`` without a gap.
- Hence if the first query of a block and the last one both see ``k``, all between do: **what the last query sees up
  to the first query's position is seen by the entire block**, and needs no mask.
- Queries of a block that belong to later groups than the first query see only keys from the first query's position
  on. Hence **what the first query sees, and the keys from there to the last query's position, is all that the block
  can see**; if first and last query are of one group, the last one's prefix replaces the first one's.

``tests/ops/test_attention_tiles.py`` proves that the unmasked tiles are exactly the fully visible ones, and that the
tiles visited are exactly those with a visible pair, each once. Only a block whose queries are not neighbours in the
pack can also visit keys of the gap, which none of them sees.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_tiles(
    prefix_start_ptr, prefix_end_ptr, own_start_ptr, own_end_ptr, first, last, BLOCK_K: tl.constexpr
):
    """Return the range of key tiles that rows ``first`` to ``last`` (both included) visit.

    The range is ``a <= b <= c <= d`` of the prefix and then of the own interval: tiles ``[a, d)`` are visited, of which
    ``[b, c)`` are full: every row sees every key, all of them within the pack. All eight numbers are returned flat:
    Triton 3.2 has no tuples within tuples.
    """
    prefix_start = tl.load(prefix_start_ptr + first)
    prefix_end = tl.load(prefix_end_ptr + first)
    own_start = tl.load(own_start_ptr + first)
    own_end = tl.load(own_end_ptr + first)
    last_prefix_start = tl.load(prefix_start_ptr + last)
    last_prefix_end = tl.load(prefix_end_ptr + last)
    last_own_start = tl.load(own_start_ptr + last)
    last_own_end = tl.load(own_end_ptr + last)
    # A prompt and its first completion are one causal document: join prefix and own interval.
    joined = prefix_end == own_start
    own_start = tl.where(joined, prefix_start, own_start)
    prefix_end = tl.where(joined, prefix_start, prefix_end)
    joined = last_prefix_end == last_own_start
    last_own_start = tl.where(joined, last_prefix_start, last_own_start)
    last_prefix_end = tl.where(joined, last_prefix_start, last_prefix_end)

    one_group = last_prefix_start < own_end
    prefix_start = tl.where(one_group, last_prefix_start, prefix_start)
    prefix_end = tl.where(one_group, last_prefix_end, prefix_end)
    empty = prefix_start >= prefix_end
    prefix_start = tl.where(empty, 0, prefix_start)
    prefix_end = tl.where(empty, 0, prefix_end)

    a = prefix_start // BLOCK_K
    d = tl.cdiv(prefix_end, BLOCK_K)
    b = tl.cdiv(prefix_start, BLOCK_K)
    c = tl.where(one_group, tl.minimum(prefix_end, own_end) // BLOCK_K, b)
    c = tl.maximum(b, c)
    # A tile with the end of the prefix and the start of the own interval is visited once, with the prefix.
    own_a = tl.maximum(own_start // BLOCK_K, d)
    own_d = tl.cdiv(last_own_end, BLOCK_K)
    own_b = tl.minimum(tl.maximum(tl.cdiv(last_own_start, BLOCK_K), own_a), own_d)
    own_c = tl.maximum(own_end // BLOCK_K, own_b)
    return a, b, c, d, own_a, own_b, own_c, own_d


@triton.jit
def key_tile_count(a, b, c, d, own_a, own_b, own_c, own_d, PARTIAL: tl.constexpr):
    """Return how many tiles of ``key_tiles`` are full, or how many are partial: those that need a mask."""
    full = c - b + own_c - own_b
    count = full
    if PARTIAL:
        count = d - a + own_d - own_a - full
    return count


@triton.jit
def key_tile(step, a, b, c, d, own_a, own_b, own_c, PARTIAL: tl.constexpr):
    """Return the ``step``-th full tile of ``key_tiles``, or the ``step``-th partial one."""
    if PARTIAL:
        step = tl.where(step < b - a, step, step + c - b)
        step = tl.where(step < d - a + own_b - own_a, step, step + own_c - own_b)
        tile = tl.where(step < d - a, a + step, own_a + step - (d - a))
    else:
        tile = tl.where(step < c - b, b + step, own_b + step - (c - b))
    return tile


@triton.jit
def query_tiles(
    seen_start_ptr, seen_end_ptr, first, tokens, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """Return the query tiles ``[a, d)`` that see keys ``[first, first + BLOCK_K)``; ``[b, c)`` are full."""
    key = first + tl.arange(0, BLOCK_K)
    last = tl.minimum(first + BLOCK_K, tokens) - 1
    some_end = tl.max(tl.load(seen_end_ptr + key, mask=key < tokens, other=0), 0)
    every_end = tl.min(tl.load(seen_end_ptr + key, mask=key < tokens, other=2147483647), 0)
    start = tl.load(seen_start_ptr + first)
    a = start // BLOCK_Q
    b = tl.cdiv(tl.load(seen_start_ptr + last), BLOCK_Q)
    d = tl.where(start < some_end, tl.cdiv(some_end, BLOCK_Q), a)
    c = tl.maximum(every_end // BLOCK_Q, b)
    return a, b, c, d


@triton.jit
def query_tile_count(a, b, c, d, PARTIAL: tl.constexpr):
    """Return how many tiles of ``query_tiles`` are full, or how many are partial."""
    count = c - b
    if PARTIAL:
        count = d - a - (c - b)
    return count


@triton.jit
def query_tile(a, b, c, PARTIAL: tl.constexpr):
    """Return the first full tile of ``query_tiles``, or the first partial one."""
    tile = b
    if PARTIAL:
        tile = tl.where(a < b, a, c)
    return tile


@triton.jit
def next_query_tile(head, tile, a, b, c, d, PARTIAL: tl.constexpr):
    """Return head and tile after these: the next tile of ``query_tiles``, after the last one the next head's first."""
    # Counted, as dividing a step by the number of tiles would cost each iteration dozens of instructions.
    tile += 1
    end = c
    if PARTIAL:
        end = d
        tile = tl.where(tile == b, c, tile)
    head += tile == end
    tile = tl.where(tile == end, query_tile(a, b, c, PARTIAL), tile)
    return head, tile


@triton.jit
def visible(
    prefix_start_ptr, prefix_end_ptr, own_start_ptr, own_end_ptr, first_query, first_key, queries,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the mask ``[query, key]`` of a tile: whether each query sees each key."""
    # Loaded only here: most tiles need no mask, and registers are scarce.
    prefix_start = load_numbers(prefix_start_ptr, first_query, queries, BLOCK_Q)[:, None]
    prefix_end = load_numbers(prefix_end_ptr, first_query, queries, BLOCK_Q)[:, None]
    own_start = load_numbers(own_start_ptr, first_query, queries, BLOCK_Q)[:, None]
    own_end = load_numbers(own_end_ptr, first_query, queries, BLOCK_Q)[:, None]
    key = first_key + tl.arange(0, BLOCK_K)[None, :]
    return ((prefix_start <= key) & (key < prefix_end)) | ((own_start <= key) & (key < own_end))


@triton.jit
def load_numbers(ptr, first, count, ROWS: tl.constexpr, PARTIAL: tl.constexpr = True):
    """Load elements ``[first, first + ROWS)`` of a vector of ``count``; zeros past its end, where ``PARTIAL``."""
    at = first + tl.arange(0, ROWS)
    return tl.load(ptr + at, mask=at < count, other=0) if PARTIAL else tl.load(ptr + at)


@triton.jit
def load_rows(
    ptr, first, stride, count, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    PARTIAL: tl.constexpr = True,
):  # fmt: skip
    """Load rows ``[first, first + ROWS)`` of a matrix ``[count, D]``; zeros past its edges.

    A tile that is not ``PARTIAL`` has no row past the end, so that nothing is compared unless D is padded.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, D_PADDED)[None, :]
    # int64 for the tile's offset (T * H * D exceeds 2**31), int32 within the tile.
    at = ptr + first.to(tl.int64) * stride + (row * stride + column)
    if PARTIAL:
        rows = tl.load(at, mask=(first + row < count) & (column < D), other=0.0)
    elif D == D_PADDED:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=column < D, other=0.0)
    return rows


@triton.jit
def store_rows(ptr, tile, first, stride, count, ROWS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Store a tile where ``load_rows`` loads it, in the dtype of the memory."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, D_PADDED)[None, :]
    at = ptr + first.to(tl.int64) * stride + (row * stride + column)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=(first + row < count) & (column < D))
