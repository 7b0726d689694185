"""Columns by name stay aligned with the rows and completions they describe: cut, moved, and on context ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.data.batching.collate import pack
from megatron_align.data.batching.context_parts import ContextRank, take_part
from megatron_align.records import Columns, Sample

GROUPS = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1, max_size=3)), min_size=1, max_size=6
)


def packed(groups, tokens=240):
    """A pack whose columns repeat what is known of each row and completion: its hidden row, its last token."""
    samples = []
    for prompt, completions in groups:
        length = prompt + sum(completions)
        scored = np.arange(length) >= prompt
        samples.append(Sample(np.arange(length, dtype=np.int32), scored, prompt, tuple(completions)))
    batch = pack(samples, [1.0] * len(samples), tokens)
    completions = replace(batch.rows.completions, columns=Columns(last=batch.rows.completions.last_C.float()))
    columns = Columns(old_logprobs=-batch.rows.row_N.float(), advantages=batch.rows.target_N.float())
    return replace(batch, rows=replace(batch.rows, columns=columns, completions=completions))


def require_aligned(rows):
    assert torch.equal(rows.columns["old_logprobs"], -rows.row_N.float())
    assert torch.equal(rows.columns["advantages"], rows.target_N.float())
    assert torch.equal(rows.completions.columns["last"], rows.completions.last_C.float())


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, most=st.integers(1, 12), whole_samples=st.booleans())
def test_slabs_cut_columns_with_their_rows(groups, most, whole_samples):
    """A slab's columns are those of its own rows, and of its own completions where it holds entire samples."""
    rows = packed(groups).rows
    slabs = rows.slabs(most, whole_samples=whole_samples)
    assert sum(len(slab.columns["advantages"]) for slab in slabs) == len(rows.row_N)
    for slab in slabs:
        require_aligned(slab)


@settings(deadline=None, max_examples=30)
@given(groups=GROUPS, ranks=st.sampled_from([2, 3]), kind=st.sampled_from(["ulysses", "allgather"]))
def test_context_ranks_hold_the_columns_of_their_rows(groups, ranks, kind):
    """A context rank reads a row's column at the row's index in the pack; slabs over the ranks keep that."""
    batch = packed(groups)
    for rank in range(ranks):
        own = take_part(batch, ContextRank(ranks=ranks, rank=rank, kind=kind))
        local = own.part.rows
        row_n = own.part.token_Q[local.row_n]
        assert torch.equal(own.rows.columns["old_logprobs"][local.number_n], -row_n.float())
        for whole_samples in (True, False):
            for slab in own.rows.slabs(5, whole_samples=whole_samples, owner_N=own.part.owner_N):
                require_aligned(slab)


def test_columns_move_with_their_rows():
    """``to`` moves every column; none stays on the host."""
    moved = packed([(2, [3, 1])]).to(torch.device("meta")).rows
    for columns in (moved.columns, moved.completions.columns):
        assert columns
        assert all(column.is_meta for column in columns.values())


def test_an_absent_column_is_an_error_that_names_it():
    """A loss that reads a column nobody filled in stops, instead of computing with a filler."""
    rows = packed([(2, [3, 1])]).rows
    assert "reference_logprobs" not in rows.completions.columns
    with pytest.raises(LookupError, match=r"must have a column 'reference_logprobs', found \['last'\]"):
        _ = rows.completions.columns["reference_logprobs"]
    with pytest.raises(LookupError, match="column 'x', found none"):
        _ = Columns()["x"]
