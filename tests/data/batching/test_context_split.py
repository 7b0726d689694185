"""Shards of a pack divide its tokens evenly over the ranks, and its attention work: within 1.05 of the mean on
packs of mixed lengths, and never above the mean plus the work of one token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.data.batching.context_split import (
    MAX_IMBALANCE,
    attention_work,
    balanced_shards,
    contiguous_shards,
)
from megatron_align.kernels.packed_attention import PackedLayout

groups = st.lists(st.tuples(st.integers(0, 60), st.lists(st.integers(0, 60), max_size=4)), max_size=8)
ranks = st.integers(1, 16)


def room_for(groups, ranks, slack=0):
    """Return a multiple of ``ranks`` that holds the groups and ``slack`` more."""
    return max(1, -(-(sum(p + sum(c) for p, c in groups) + slack) // ranks)) * ranks


@settings(max_examples=50, deadline=None, derandomize=True)
@given(groups, st.integers(0, 20))
def test_work_counts_the_keys_that_the_mask_shows(groups, padding):
    layout = PackedLayout.from_groups(groups, room_for(groups, 1, padding))
    assert attention_work(groups, layout.tokens).tolist() == layout.mask_QT().sum(1).tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(groups, st.integers(0, 200), ranks)
def test_every_token_is_on_one_rank_and_ranks_are_level(groups, padding, ranks):
    tokens = room_for(groups, ranks, padding)
    shards = balanced_shards(groups, tokens, ranks)
    assert shards.dtype == np.int64
    assert shards.shape == (ranks, tokens // ranks)
    assert sorted(shards.flatten()) == list(range(tokens))
    assert (np.diff(shards) > 0).all()
    work_T = attention_work(groups, tokens)
    work_R = work_T[shards].sum(1)
    assert work_R.max() <= max(MAX_IMBALANCE * work_R.mean(), work_R.mean() + work_T.max())
    assert np.array_equal(shards, balanced_shards(groups, tokens, ranks))


PACKS = {
    "one document": [(0, [16384])],
    "mostly padding": [(0, [700]), (0, [90])],
    "a long and many short": [(0, [9000]), *[(0, [120])] * 60],
    "pairs": [(900, [500, 700]), (2000, [300, 250]), (60, [2500, 2600]), (1500, [1200, 400])],
    "a group of 8": [(3000, [900, 1400, 300, 2000, 1100, 800, 1600, 1200])],
}


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize(
    "pack", [*PACKS.values(), *range(10)], ids=[*PACKS, *map("chat {}".format, range(10))]
)
def test_packs_of_16k_are_level(pack, ranks):
    if isinstance(pack, int):  # lognormal chat lengths, as in benchmarks/context_parallel.py
        drawn = np.random.default_rng(pack).lognormal(np.log(815) - 0.5, 1.0, 200).astype(int)
        pack = [(0, [length]) for length in drawn[np.cumsum(drawn) <= 16384]]
    tokens = 16384 // ranks * ranks
    pack = pack if sum(p + sum(c) for p, c in pack) <= tokens else [(0, [tokens])]
    work_R = attention_work(pack, tokens)[balanced_shards(pack, tokens, ranks)].sum(1)
    assert work_R.max() <= MAX_IMBALANCE * work_R.mean()


def test_stretches_fill_the_kernels_blocks():
    """From row 0 on, every 128 rows of a rank are neighbours in the pack; also where 128 does not divide its tokens."""
    shards = balanced_shards([(0, [6000]), (1000, [2000, 2000]), (0, [4000])], 15000, 8)  # 1,875 tokens each
    for block in np.split(shards, range(128, 1875, 128), axis=1):
        assert (np.diff(block) == 1).all()


def test_a_document_is_shared_out_by_hand():
    """Eight tokens see 1, 2, ... 8 keys: 18 for both ranks, in stretches as long as that allows."""
    assert balanced_shards([(0, [8])], 8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_stretches_for_ulysses_follow_each_other():
    assert contiguous_shards(6, 3).tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("tokens, ranks", [(7, 2), (0, 2), (4, 0)])
@pytest.mark.parametrize("shard", [contiguous_shards, lambda *sizes: balanced_shards([], *sizes)])
def test_tokens_that_do_not_divide_are_refused(shard, tokens, ranks):
    with pytest.raises(ValueError, match=f"multiple of ranks; got {tokens} tokens, {ranks} ranks"):
        shard(tokens, ranks)


def test_groups_longer_than_the_pack_are_refused():
    with pytest.raises(ValueError, match="within 4 tokens; got 5"):
        balanced_shards([(2, [3])], 4, 2)
