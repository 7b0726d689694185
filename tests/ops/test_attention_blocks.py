"""The kernels visit exactly the tiles that hold a visible pair, each once, and mask exactly those that need it
(or that T cuts).

The judge is the dense mask, cut into tiles. Hence cost follows the useful area, which is counted here too.
"""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.kernels.packed_attention.blocks import key_tile, key_tiles, query_tiles
from megatron_align.kernels.packed_attention.layout import PackedLayout
from megatron_align.kernels.packed_attention.reference import block_map_reference
from tests.harness.interpreter import DEVICE

pytestmark = pytest.mark.triton


@triton.jit
def _by_query(ps_ptr, pe_ptr, os_ptr, visits_ptr, masked_ptr, tokens, Q: tl.constexpr, K: tl.constexpr):
    block = tl.program_id(0)
    last = tl.minimum((block + 1) * Q, tokens) - 1
    tiles, count = key_tiles(ps_ptr, pe_ptr, os_ptr, block * Q, last, K)
    for step in range(count):
        tile, full = key_tile(tiles, step)
        at = block * tl.cdiv(tokens, K) + tile
        tl.store(visits_ptr + at, tl.load(visits_ptr + at) + 1)
        tl.store(masked_ptr + at, (full == 0).to(tl.int32))


@triton.jit
def _by_key(seen_end_ptr, visits_ptr, masked_ptr, tokens, Q: tl.constexpr, K: tl.constexpr):
    block = tl.program_id(0)
    a, b, c, d = query_tiles(seen_end_ptr, block * K, tokens, K, Q)
    for tile in range(a, d):
        at = tile * tl.cdiv(tokens, K) + block
        tl.store(visits_ptr + at, tl.load(visits_ptr + at) + 1)
        tl.store(masked_ptr + at, ((tile < b) | (tile >= c)).to(tl.int32))


@triton.jit
def _count(ps_ptr, pe_ptr, os_ptr, visits_ptr, masked_ptr, tokens, Q: tl.constexpr, K: tl.constexpr):
    block = tl.program_id(0)
    last = tl.minimum((block + 1) * Q, tokens) - 1
    (a, b, c, d, own_a, own_b, own_c, own_d), count = key_tiles(ps_ptr, pe_ptr, os_ptr, block * Q, last, K)
    tl.store(visits_ptr + block, count)
    tl.store(masked_ptr + block, count - (c - b) - (own_c - own_b))


def assert_exact(layout, queries, keys):
    layout = layout.to(DEVICE)
    *intervals, seen_end = layout.intervals
    visited, full = block_map_reference(layout, queries, keys)
    needed = visited & ~full
    inside = (slice(layout.tokens // queries), slice(layout.tokens // keys))  # tiles that T does not cut
    for kernel, blocks, pointers in (
        (_by_query, visited.shape[0], intervals),
        (_by_key, visited.shape[1], [seen_end]),
    ):
        visits, masked = torch.zeros(2, *visited.shape, dtype=torch.int32, device=DEVICE)
        kernel[(blocks,)](*pointers, visits, masked, layout.tokens, Q=queries, K=keys)
        assert torch.equal(visits, visited.int())
        assert torch.equal(masked.bool()[inside], needed[inside])
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


groups = st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(0, 25), max_size=4)), max_size=5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(groups, st.integers(0, 9), st.sampled_from([(16, 16), (16, 8), (8, 16)]))
def test_tiles_are_exact_for_any_groups(groups, padding, blocks):
    used = sum(prompt + sum(completions) for prompt, completions in groups)
    assert_exact(PackedLayout.from_groups(groups, total=used + padding), *blocks)


def tiles_of(layout, block=128):
    """Return (visited, masked) tiles of one head."""
    layout = layout.to(DEVICE)
    blocks = triton.cdiv(layout.tokens, block)
    visits, masked = torch.zeros(2, blocks, dtype=torch.int32, device=DEVICE)
    _count[(blocks,)](*layout.intervals[:3], visits, masked, layout.tokens, Q=block, K=block)
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
