"""A pack holds its samples' tokens once and scores the same targets from the tokens before them, prompts shared or
not; slabs are the pack in pieces."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.data.batching.collate import PackValues, pack
from megatron_align.records import Sample
from tests.data.batching.samples import group, sample


def test_a_pack_by_hand():
    one, two = sample([5, 6, 7], [0, 0, 1]), sample([8, 9, 10, 11], [0, 1, 0, 1])
    got = pack([one, two], [0.5, 0.25], tokens=9)
    assert got.tokens_T.tolist() == [5, 6, 7, 8, 9, 10, 11, 0, 0]
    assert got.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert got.layout.own_start_Q.tolist() == [0, 0, 0, 3, 3, 3, 3, 7, 8]
    assert got.rows.row_N.tolist() == [1, 3, 5]
    assert got.rows.target_N.tolist() == [7, 9, 11]
    assert got.rows.sequence_N.tolist() == [0, 1, 1]
    assert got.rows.weight_N.tolist() == [0.5, 0.25, 0.25]
    whole = (got.tokens_T, got.positions_T, got.rows.row_N, got.rows.target_N, got.rows.sequence_N)
    assert all(tensor.dtype == torch.int64 for tensor in whole)
    assert got.rows.weight_N.dtype == torch.float32


def test_a_pack_of_nothing():
    got = pack([], [], tokens=4)
    assert got.tokens_T.tolist() == got.positions_T.tolist() == [0] * 4
    assert got.layout.own_start_Q.tolist() == [0, 1, 2, 3]
    assert [len(rows) for rows in (got.rows.row_N, got.rows.target_N, got.rows.weight_N)] == [0, 0, 0]
    assert got.rows.weight_N.dtype == torch.float32
    assert got.rows.target_N.dtype == torch.int64


def test_a_pack_too_small_is_refused():
    with pytest.raises(ValueError, match="total"):
        pack([sample([1, 2], [0, 1])], [1.0], tokens=1)


def test_a_group_by_hand():
    # prompt 5 6 7, completions 8 9 and 10: the last prompt token (row 2) predicts both 8 and 10
    pair = Sample(np.array([5, 6, 7, 8, 9, 10], np.int32), np.array([0, 0, 0, 1, 1, 1], bool), 3, (2, 1))
    chat = sample([20, 21], [0, 1])
    got = pack([pair, chat], [0.5, 0.25], tokens=9)
    assert got.tokens_T.tolist() == [5, 6, 7, 8, 9, 10, 20, 21, 0]
    assert got.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 0]
    assert got.layout.groups == ((3, (2, 1)), (0, (2,)))
    assert got.rows.row_N.tolist() == [2, 3, 2, 6]
    assert got.rows.target_N.tolist() == [8, 9, 10, 21]
    assert got.rows.sequence_N.tolist() == [0, 0, 1, 2]
    assert got.rows.weight_N.tolist() == [0.5, 0.5, 0.5, 0.25]
    alone = pack([pair, chat], [0.5, 0.25], tokens=11, share_prefix=False)
    assert alone.tokens_T.tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 10, 20, 21]
    assert alone.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]
    assert alone.layout.groups == ((0, (5,)), (0, (4,)), (0, (2,)))
    assert alone.rows.row_N.tolist() == [2, 3, 7, 9]
    assert alone.rows.target_N.tolist() == [8, 9, 10, 21]
    assert alone.rows.sequence_N.tolist() == [0, 0, 1, 2]


def test_what_is_known_of_completions_by_hand():
    pair = Sample(
        np.array([5, 6, 7, 8, 9], np.int32),
        np.array([0, 0, 1, 1, 1], bool),
        2,
        (2, 1),
        scores=(3.0, 1.0),
        margin=0.5,
    )
    single = Sample(np.array([1, 2], np.int32), np.array([0, 1], bool), 1, (1,), label=True)
    columns = {"reference_logprobs": np.array([-4.0, -2.0, -1.0])}
    values = PackValues(np.array([0.5, 0.5, 0.25]), np.array([0.1, 0.2, 0.3]), columns)
    for share, last in ((True, [3, 4, 6]), (False, [3, 6, 8])):
        known = pack([pair, single], [1, 1], 9, values=values, share_prefix=share).rows.completions
        assert known.sample_C.tolist() == [0, 0, 1]
        assert known.length_C.tolist() == [2, 1, 1]
        assert known.last_C.tolist() == last
        assert known.score_C.tolist()[:2] == [3.0, 1.0]
        assert known.score_C[2].isnan()
        assert known.margin_C.tolist()[:2] == [0.5, 0.5]
        assert known.desirable_C.tolist() == [False, False, True]
        assert known.weight_C.tolist() == [0.5, 0.5, 0.25]
        assert known.columns["reference_logprobs"].tolist() == [-4.0, -2.0, -1.0]
    assert pack([single], [1], 2).rows.completions.weight_C.isnan().all()  # not given, not 0


def test_a_scored_prompt_by_hand():
    # prompt 5 6 7, completions 8 9 and 10
    pair = Sample(np.array([5, 6, 7, 8, 9, 10], np.int32), np.array([0, 0, 0, 1, 1, 1], bool), 3, (2, 1))
    chat = sample([20, 21], [0, 1])
    for share, rows in ((True, [0, 1, 2, 3, 2, 6]), (False, [0, 1, 2, 3, 7, 9])):
        got = pack([pair, chat], [0.5, 0.25], tokens=11, share_prefix=share, score_prompt=True).rows
        assert got.row_N.tolist() == rows
        assert got.target_N.tolist() == [6, 7, 8, 9, 10, 21]
        assert got.sequence_N.tolist() == [0, 0, 0, 0, 1, 2]
        assert got.prompt_N.tolist() == [True, True, False, False, False, False]
        assert got.weight_N.tolist() == [0.5] * 5 + [0.25]
        assert got.ends == ((5, 2), (6, 3))
        assert got.completions.length_C.tolist() == [2, 1, 1]
        assert got.completions.rows_C.tolist() == [4, 1, 1]


def test_an_empty_completion_ends_with_its_prompt():
    empty = Sample(np.array([5, 6, 7], np.int32), np.array([0, 0, 1], bool), 2, (1, 0))
    assert pack([empty], [1], 3).rows.completions.last_C.tolist() == [2, 1]


@settings(deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), max_size=8
    ),
    most=st.integers(1, 12),
)
def test_slabs_are_the_pack_in_pieces(groups, most):
    samples = [group(i, *g) for i, g in enumerate(groups)]
    rows = pack(samples, np.arange(len(samples)), 400).rows
    for whole in (True, False):
        parts = rows.slabs(most, whole_samples=whole)
        for name in ("row_N", "target_N", "weight_N"):
            pieces = [getattr(part, name) for part in parts]
            assert torch.equal(torch.cat([getattr(rows, name)[:0], *pieces]), getattr(rows, name))
        for part in parts:
            assert len(part.row_N) > 0
            assert len(part.row_N) <= most or (whole and len(part.ends) == 1)
    shift = completions = 0
    for part in rows.slabs(most, whole_samples=True):
        known = part.completions
        assert part.ends[-1] == (len(part.row_N), len(known.last_C))
        assert known.sample_C.tolist() == [i for i, n in enumerate(counts(part.ends)) for _ in range(n)]
        end = shift + len(part.row_N)
        assert torch.equal(part.sequence_N + completions, rows.sequence_N[shift:end])
        stop = completions + len(known.last_C)
        assert torch.equal(known.last_C, rows.completions.last_C[completions:stop])
        shift, completions = end, stop
    assert shift == len(rows.row_N)


def counts(ends):
    return np.diff([0, *(completions for _, completions in ends)]).tolist()


groups = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=6
)


@settings(deadline=None)
@given(groups=groups, slack=st.integers(0, 5))
def test_shared_and_repeated_prompts_score_the_same(groups, slack):
    samples = [group(i, *g) for i, g in enumerate(groups)]
    repeated = sum(len(c) * p + sum(c) for p, c in groups)
    weights = 1.0 + np.arange(len(samples))
    packs = [pack(samples, weights, repeated + slack, share_prefix=share) for share in (True, False)]
    expected = []  # (tokens seen before the target, target, completion of the pack, weight)
    completion = 0
    for one, weight in zip(samples, weights, strict=True):
        prompt, rest = one.tokens_L[: one.prompt_length], one.prompt_length
        for length in one.completion_lengths:
            own = one.tokens_L[rest : rest + length]
            for t in np.flatnonzero(one.scored_L[rest : rest + length]):
                expected.append(([*prompt, *own[:t]], own[t], completion, weight))
            rest, completion = rest + length, completion + 1
    for got in packs:
        see = got.layout.mask_QT()
        rows = []
        for row, target, sequence, weight in zip(*(column.tolist() for column in columns(got)), strict=True):
            context = got.tokens_T[see[row]].tolist()
            assert got.positions_T[see[row]].tolist() == list(range(len(context)))
            rows.append((context, target, sequence, weight))
        assert rows == expected


def columns(batch):
    return batch.rows.row_N, batch.rows.target_N, batch.rows.sequence_N, batch.rows.weight_N


@pytest.mark.parametrize(
    "wrong",
    [
        Sample(np.arange(3), np.array([1, 0, 1], bool)),
        Sample(np.arange(6), np.array([0, 1, 0, 0, 1, 1], bool), 2, (2, 2)),
        Sample(np.arange(4), np.array([0, 1, 1, 1], bool), 0, (2, 2)),
        Sample(np.arange(6), np.zeros(6, bool), 2, (2, 1)),
    ],
    ids=["first token", "prompt", "no prompt", "tokens left over"],
)
def test_a_target_that_nothing_predicts_is_refused(wrong):
    with pytest.raises(ValueError, match="pack needs"):
        pack([wrong], [1.0], tokens=8)
