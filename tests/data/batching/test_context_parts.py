"""A pack split over context-parallel ranks: every token and every scored row is on one rank, each row with the token
that it is scored from, and slabs are cut at the same rows on all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.data.batching.collate import pack
from megatron_align.data.batching.context_parts import ContextRank, take_part
from megatron_align.records import Sample

KINDS = ("ulysses", "allgather")


@st.composite
def packs(draw):
    """A pack of groups, prompts shared or not, and padding; ranks that divide it."""
    ranks = draw(st.sampled_from([2, 3, 4]))
    groups = draw(
        st.lists(
            st.tuples(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=2, max_size=3)), max_size=5
        )
    )
    samples = []
    for prompt, completions in groups:
        length = prompt + sum(completions)
        scored = np.arange(length) >= prompt
        samples.append(Sample(np.arange(length, dtype=np.int32), scored, prompt, tuple(completions)))
    share_prefix = draw(st.booleans())
    laid = sum(
        len(s.tokens_L) + (0 if share_prefix else s.prompt_length * (len(s.completion_lengths) - 1))
        for s in samples
    )
    tokens = ranks * (-(-laid // ranks) + draw(st.integers(0, 5)))
    batch = pack(samples, [1.0] * len(samples), max(tokens, ranks), share_prefix=share_prefix)
    return batch, ranks


@pytest.mark.parametrize("kind", KINDS)
@given(dealt=packs(), most=st.integers(1, 20), whole_samples=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_token_and_row_is_on_one_rank(kind, dealt, most, whole_samples):
    batch, ranks = dealt
    parts = [take_part(batch, ContextRank(ranks=ranks, rank=r, kind=kind)).part for r in range(ranks)]
    tokens = torch.cat([part.token_Q for part in parts])
    assert torch.equal(tokens.sort().values, torch.arange(batch.layout.tokens))
    for held, row_N in (("rows", batch.rows.row_N), ("last", batch.rows.completions.last_C)):
        numbers = torch.cat([getattr(part, held).number_n for part in parts])
        assert torch.equal(numbers.sort().values, torch.arange(len(row_N)))
        for part in parts:
            mine = getattr(part, held)
            assert torch.equal(part.token_Q[mine.row_n], row_N[mine.number_n])
            assert (mine.host_number_n.tolist(), mine.host_row_n.tolist()) == (
                mine.number_n.tolist(),
                mine.row_n.tolist(),
            )
    for part in parts:
        assert (part.owner_N == parts[0].owner_N).all()
        if kind == "allgather":
            assert torch.equal(part.order_T, tokens)
            assert torch.equal(part.queries.mask_QT(), batch.layout.mask_QT()[part.token_Q])
    slabs = batch.rows.slabs(most, whole_samples=whole_samples, owner_N=parts[0].owner_N)
    assert sum(len(slab.row_N) for slab in slabs) == len(batch.rows.row_N)
    at = 0
    for slab in slabs:
        owner_n = parts[0].owner_N[at : at + len(slab.row_N)]
        assert np.bincount(owner_n, minlength=1).max() <= most or (whole_samples and len(slab.ends) == 1)
        at += len(slab.row_N)


@pytest.mark.parametrize("whole_samples", [True, False])
def test_slabs_over_ranks_are_as_long_as_the_fullest_rank_allows(whole_samples):
    samples = [Sample(np.zeros(9, np.int32), np.arange(9) > 0) for _ in range(6)]  # 8 rows each
    rows = pack(samples, [1.0] * 6, 54).rows
    alternating = np.arange(48) % 2
    sizes = {
        owners: [len(slab.row_N) for slab in rows.slabs(8, whole_samples=whole_samples, owner_N=owner_N)]
        for owners, owner_N in {"one": None, "alternating": alternating, "first": alternating * 0}.items()
    }
    assert sizes == {"one": [8] * 6, "alternating": [16] * 3, "first": [8] * 6}


def test_a_pack_that_ranks_do_not_divide_is_refused():
    batch = pack([Sample(np.zeros(9, np.int32), np.arange(9) > 0)], [1.0], 9)
    assert take_part(batch, None) is batch
    for kind in KINDS:
        with pytest.raises(ValueError, match="positive multiple of ranks; got 9 tokens, 2 ranks"):
            take_part(batch, ContextRank(ranks=2, rank=0, kind=kind))
