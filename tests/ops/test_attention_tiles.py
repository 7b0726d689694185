"""The kernels visit exactly the tiles that hold a visible pair, each once, and mask exactly those that need it
(or that T cuts). So do those of any choice of queries, except that a block of queries with a gap in the pack may visit
keys of the gap.

The judge is the dense mask, cut into tiles. Hence cost follows the useful area, which is counted here too.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.data.batching.context_split import balanced_shards
from megatron_align.kernels.packed_attention.layout import PackedLayout
from megatron_align.kernels.packed_attention.reference import visible_tiles_reference
from megatron_align.kernels.packed_attention.tile_ranges import (
    key_tile,
    key_tile_count,
    key_tiles,
    next_query_tile,
    query_tile,
    query_tile_count,
    query_tiles,
)
from tests.harness.interpreter import DEVICE

pytestmark = pytest.mark.triton


@triton.jit
def _by_query(
    ps_ptr, pe_ptr, os_ptr, oe_ptr, visits_ptr, masked_ptr, queries, tokens, Q: tl.constexpr, K: tl.constexpr
):
    block = tl.program_id(0)
    last = tl.minimum((block + 1) * Q, queries) - 1
    a, b, c, d, own_a, own_b, own_c, own_d = key_tiles(ps_ptr, pe_ptr, os_ptr, oe_ptr, block * Q, last, K)
    for PARTIAL in tl.static_range(2):
        for step in range(key_tile_count(a, b, c, d, own_a, own_b, own_c, own_d, PARTIAL)):
            at = block * tl.cdiv(tokens, K) + key_tile(step, a, b, c, d, own_a, own_b, own_c, PARTIAL)
            tl.store(visits_ptr + at, tl.load(visits_ptr + at) + 1)
            tl.store(masked_ptr + at, PARTIAL)


@triton.jit
def _by_key(
    ss_ptr, se_ptr, visits_ptr, masked_ptr, queries, tokens, Q: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Count the tiles of two heads, the second of which must visit what the first one visited, and no head more."""
    block = tl.program_id(0)
    a, b, c, d = query_tiles(ss_ptr, se_ptr, block * K, tokens, K, Q)
    for PARTIAL in tl.static_range(2):
        head, tile = 0, query_tile(a, b, c, PARTIAL)
        for _ in range(2 * query_tile_count(a, b, c, d, PARTIAL)):
            at = tile * tl.cdiv(tokens, K) + block
            seen = tl.load(visits_ptr + at)
            tl.store(visits_ptr + at, tl.where(seen == head, seen + 1, 99))
            tl.store(masked_ptr + at, PARTIAL)
            head, tile = next_query_tile(head, tile, a, b, c, d, PARTIAL)


@triton.jit
def _count(ps_ptr, pe_ptr, os_ptr, oe_ptr, visits_ptr, masked_ptr, queries, Q: tl.constexpr, K: tl.constexpr):
    block = tl.program_id(0)
    last = tl.minimum((block + 1) * Q, queries) - 1
    a, b, c, d, own_a, own_b, own_c, own_d = key_tiles(ps_ptr, pe_ptr, os_ptr, oe_ptr, block * Q, last, K)
    full = key_tile_count(a, b, c, d, own_a, own_b, own_c, own_d, 0)
    partial = key_tile_count(a, b, c, d, own_a, own_b, own_c, own_d, 1)
    tl.store(visits_ptr + block, full + partial)
    tl.store(masked_ptr + block, partial)


def assert_exact(layout, queries, keys):
    layout = layout.to(DEVICE)
    visible, full = visible_tiles_reference(layout, queries, keys)
    needed = visible & ~full
    inside = (slice(layout.queries // queries), slice(layout.tokens // keys))  # tiles that Q and T do not cut
    first = torch.arange(0, layout.queries, queries)
    last = (first + queries).clamp(max=layout.queries) - 1
    has_gap = (layout.own_end_Q[last] - layout.own_end_Q[first]).cpu() != last - first
    for kernel, blocks, pointers, times in (
        (_by_query, visible.shape[0], layout.by_query, 1),
        (_by_key, visible.shape[1], layout.by_key, 2),
    ):
        visits, masked = torch.zeros(2, *visible.shape, dtype=torch.int32, device=DEVICE)
        kernel[(blocks,)](*pointers, visits, masked, layout.queries, layout.tokens, Q=queries, K=keys)
        spare = visits.bool() & ~visible
        assert torch.equal(visits, times * (visible | spare).int())  # all once a head, none twice
        # What the kernels load without a comparison is inside the pack.
        cut = (
            (slice(None), slice(inside[1].stop, None)) if kernel is _by_query else slice(inside[0].stop, None)
        )
        assert masked.bool()[cut][visits.bool()[cut]].all()
        assert not spare[~has_gap if kernel is _by_query else slice(None)].any()
        assert masked.bool()[spare].all()
        assert torch.equal((masked.bool() & visible)[inside], needed[inside])
        assert torch.equal(masked.bool() & needed, needed)


LAYOUTS = {
    "documents": PackedLayout.from_lengths([1, 2, 17, 33, 0, 65], total=128),
    "prompt ends inside blocks": PackedLayout.from_groups([(37, [30, 21, 5]), (50, [40])], total=190),
    "prompt ends on a block": PackedLayout.from_groups([(32, [32, 32]), (16, [16])]),
    "many groups in a block": PackedLayout.from_groups(
        [(2, [1, 1]), (1, [2, 0, 3]), (3, []), (0, [4, 4])] * 3
    ),
    "empty completions": PackedLayout.from_groups([(20, [0, 0, 11]), (0, []), (9, [0])]),
    "padding only": PackedLayout.from_lengths([], total=37),
}


@pytest.mark.parametrize("queries, keys", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_tiles_are_exact(layout, queries, keys):
    assert_exact(layout, queries, keys)


SHARES = {
    "every third": torch.arange(19, 128, 3),
    "two stretches": torch.cat([torch.arange(5, 25), torch.arange(118, 128)]),
    "blocks with gaps between": torch.arange(128).view(2, 2, 32)[:, 0].flatten(),
    "none": torch.arange(0),
}


@pytest.mark.parametrize("share", SHARES.values(), ids=list(SHARES))
@pytest.mark.parametrize(
    "layout",
    [LAYOUTS["documents"], PackedLayout.from_groups([(10, [9]), (70, [20, 11])], total=128)],
    ids=["documents", "groups"],
)
def test_tiles_of_some_queries(layout, share):
    assert_exact(layout.for_queries(share), 16, 32)


groups = st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 25), max_size=4)), max_size=5)


sizes = st.sampled_from([(16, 16), (16, 8), (8, 16)])


def pack_of(groups, padding):
    return PackedLayout.from_groups(groups, total=sum(p + sum(c) for p, c in groups) + padding)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(groups, st.integers(0, 9), sizes)
def test_tiles_are_exact_for_any_groups(groups, padding, blocks):
    assert_exact(pack_of(groups, padding), *blocks)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(groups, st.integers(0, 9), sizes, st.lists(st.integers(1, 40), min_size=1))
def test_tiles_are_exact_for_any_queries(groups, padding, blocks, stretches):
    """Every other stretch of the pack is held."""
    layout = pack_of(groups, padding)
    held = torch.arange(len(stretches)).repeat_interleave(torch.tensor(stretches))[: layout.tokens] % 2 == 0
    assert_exact(layout.for_queries(held.nonzero().flatten()), *blocks)


def tiles_of(layout, block=128):
    """Return (visited, masked) tiles of one head."""
    layout = layout.to(DEVICE)
    blocks = triton.cdiv(layout.queries, block)
    visits, masked = torch.zeros(2, blocks, dtype=torch.int32, device=DEVICE)
    _count[(blocks,)](*layout.by_query, visits, masked, layout.queries, Q=block, K=block)
    return visits.sum().item(), masked.sum().item()


def test_cost_follows_the_useful_area():
    """16k tokens, tiles of 128: n (n + 1) / 2 tiles for a document of n blocks, of which n hold the diagonal."""
    assert tiles_of(PackedLayout.from_lengths([16384])) == (128 * 129 // 2, 128)
    assert tiles_of(PackedLayout.from_lengths([4096] * 4)) == (4 * 32 * 33 // 2, 128)
    assert tiles_of(PackedLayout.from_lengths([1024] * 16)) == (16 * 8 * 9 // 2, 128)


def test_a_shared_prompt_costs_less_than_its_copies():
    """P 4096 and two completions of 512: the prompt's own triangle is computed once."""
    shared, copies = (
        tiles_of(x)
        for x in (PackedLayout.from_groups([(4096, [512, 512])]), PackedLayout.from_lengths([4608] * 2))
    )
    trunk, completion = 32 * 33 // 2, 4 * 32 + 4 * 5 // 2
    assert shared == (trunk + 2 * completion, 32 + 2 * 4)
    assert copies == (2 * (trunk + completion), 2 * 36)


def test_shards_cost_no_tile_more():
    """Ranks that hold complete blocks visit together the tiles that one rank visits, each its share of them."""
    groups = [(0, [6000]), (1000, [2000, 2000]), (0, [3000]), (0, [384])]
    layout = PackedLayout.from_groups(groups, total=16384)
    shares = [tiles_of(layout.for_queries(torch.from_numpy(p)))[0] for p in balanced_shards(groups, 16384, 8)]
    assert sum(shares) == tiles_of(layout)[0]
    assert max(shares) <= 1.1 * sum(shares) / 8
