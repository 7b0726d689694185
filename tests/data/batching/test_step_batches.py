"""A step's packs hold its samples' tokens once, whatever the layout, and score the same targets from the tokens
before them, prompts shared or not; its weights sum to 1 over all ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.config import DataConfig, DataSource, TrainConfig
from megatron_align.data.batching.collate import CompletionValues, pack
from megatron_align.data.batching.packing import visible_keys
from megatron_align.data.batching.step_batches import (
    Share,
    StepBatches,
    require_room,
    row_weights,
    seen_in_samples,
    step_order,
)
from megatron_align.errors import InputError
from megatron_align.records import Sample


def sample(tokens, scored):
    return Sample(np.array(tokens, np.int32), np.array(scored, bool))


def group(i, prompt, completions, weight=1.0):
    """Token t of sample i is 1000 i + t + 1; of each completion the first and every third token are scored."""
    tokens = 1000 * i + np.arange(prompt + sum(completions)) + 1
    scored = np.concatenate([np.zeros(prompt, bool), *(np.arange(c) % 3 == 0 for c in completions)])
    if prompt == 0:
        scored[0] = False
    return Sample(tokens.astype(np.int32), scored, prompt, tuple(completions), weight=weight)


def memory_store(samples, sources=None):
    """Stands in for a TokenStore."""

    class Store(SimpleNamespace):
        def __len__(self):
            return len(samples)

    def column(values, dtype=np.int64):
        return np.array(list(values), dtype)

    lengths = column(len(s.tokens_L) for s in samples)
    prompts = column(s.prompt_length for s in samples)
    completions = column(max(1, len(s.completion_lengths)) for s in samples)
    return Store(
        sample=samples.__getitem__,
        lengths=lengths,
        prompt_lengths=prompts,
        completion_counts=completions,
        all_completion_lengths=column(
            n for s in samples for n in s.completion_lengths or (len(s.tokens_L) - s.prompt_length,)
        ),
        completion_offsets=np.concatenate([[0], np.cumsum(completions)]),
        completion_scored=np.concatenate([s.completion_scored() for s in samples]),
        duplicated_lengths=lengths + (completions - 1) * prompts,
        scored_counts=column(s.scored_L.sum() for s in samples),
        weights=column((s.weight for s in samples), np.float64),
        sources=column([0] * len(samples) if sources is None else sources, np.int32),
    )


def documents(lengths):
    """Token t of sample i is 1000 i + t + 1, every third one is scored."""
    samples = []
    for i, length in enumerate(lengths):
        scored = np.arange(length) % 3 == i % 3
        scored[[0, -1]] = False, True
        samples.append(sample(1000 * i + np.arange(length) + 1, scored))
    return samples


def test_a_pack_by_hand():
    one, two = sample([5, 6, 7], [0, 0, 1]), sample([8, 9, 10, 11], [0, 1, 0, 1])
    got = pack([one, two], [0.5, 0.25], tokens=9, pad_id=3)
    assert got.tokens_T.tolist() == [5, 6, 7, 8, 9, 10, 11, 3, 3]
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
    values = CompletionValues(np.array([0.5, 0.5, 0.25]), np.array([0.1, 0.2, 0.3]), columns)
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


@settings(deadline=None)  # machines are shared
@given(counts=st.lists(st.integers(1, 10_000), min_size=1, max_size=300))
def test_weights_sum_to_one(counts):
    for normalization in ("token", "sample"):
        weights = row_weights(np.array(counts), normalization)
        assert weights.dtype == np.float64
        np.testing.assert_allclose(weights @ np.array(counts), 1.0, rtol=1e-12)


def test_what_weighs_the_same():
    counts = np.array([1, 3])
    assert row_weights(counts, "token").tolist() == [0.25, 0.25]
    assert (row_weights(counts, "sample") * counts).tolist() == [0.5, 0.5]


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.01, 100.0)), min_size=1, max_size=100))
def test_weights_of_samples(rows):
    counts, weights = (np.array(column) for column in zip(*rows, strict=True))
    for normalization in ("token", "sample"):
        got = row_weights(counts, normalization, weights)
        np.testing.assert_allclose(got @ counts, 1.0, rtol=1e-12)
        share = got * (counts if normalization == "sample" else 1) / weights
        np.testing.assert_allclose(share, share[0], rtol=1e-12)
        ones = row_weights(counts, normalization, np.ones(len(counts)))
        plain = 1.0 / counts.sum() if normalization == "token" else 1.0 / (len(counts) * counts.astype(float))
        assert np.array_equal(ones, np.broadcast_to(plain, len(counts)))
        assert np.array_equal(ones, row_weights(counts, normalization))


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]])
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="row_weights needs"):
        row_weights(np.array([1, 3]), "token", np.array(weights))


def test_a_sample_of_weight_2_counts_as_two():
    counts = np.array([4, 2, 2])
    for normalization in ("token", "sample"):
        once = row_weights(counts[:2], normalization, np.array([1.0, 2.0]))
        twice = row_weights(counts, normalization)
        assert once[0] == twice[0]
        assert once[1] == twice[1] + twice[2]


stored = st.one_of(
    st.lists(st.integers(2, 40), min_size=1, max_size=30).map(documents),
    st.lists(
        st.tuples(
            st.integers(1, 10),
            st.lists(st.integers(1, 10), min_size=1, max_size=3),
            st.sampled_from([1, 0.5]),
        ),
        min_size=1,
        max_size=20,
    ).map(lambda rows: [group(i, *row) for i, row in enumerate(rows)]),
)


@settings(max_examples=80, deadline=None)
@given(
    samples=stored,
    batch=st.one_of(
        st.integers(1, 20).map(lambda n: ("size", n)), st.integers(1, 300).map(lambda n: ("tokens", n))
    ),
    weights=st.tuples(st.sampled_from([1.0, 0.5, 2.0]), st.sampled_from([1.0, 1.5])),
    ranks=st.integers(1, 5),
    multiple=st.sampled_from([1, 4, 6]),
    packing=st.booleans(),
    share_prefix=st.booleans(),
    normalization=st.sampled_from(["token", "sample"]),
    fewest=st.integers(1, 3),
)
def test_a_step_is_the_same_on_every_layout(
    samples, batch, weights, ranks, multiple, packing, share_prefix, normalization, fewest
):
    store = memory_store(samples, np.arange(len(samples)) * 2 // len(samples))
    mixture = [DataSource(path="a", weight=weights[0]), DataSource(path="b", weight=weights[1])]
    train = TrainConfig(epochs=2, **{f"global_batch_{batch[0]}": batch[1]})
    alone = StepBatches(
        store, DataConfig(train="x", sequence_length=60), train, mixture, normalization, Share()
    )
    data = DataConfig(train="x", sequence_length=60, packing=packing, share_prefix=share_prefix)
    spread = [
        StepBatches(
            store,
            data,
            train,
            mixture,
            normalization,
            Share(ranks=ranks, rank=rank, multiple=multiple, micro_batch_multiple=fewest),
        )
        for rank in range(ranks)
    ]
    assert {steps.steps for steps in spread} == {alone.steps}
    seen = 0
    for step in range(alone.steps):
        here, (counts, *others) = alone.step(step), [steps.step(step).counts for steps in spread]
        whole = [batch for steps in spread for batch in steps.step(step).batches]
        assert sorted(scored(whole)) == sorted(scored(here.batches))
        assert all(other == counts for other in others)
        assert (counts.samples, counts.tokens) == (here.counts.samples, here.counts.tokens)
        assert batch[0] == "size" or counts.samples == 1 or counts.tokens <= batch[1]
        places = np.concatenate([p for steps in spread for p in steps.step(step).packs.places])
        assert sorted(places) == list(range(len(here.stored_C)))
        assert (counts.scored_tokens, counts.weight) == (here.counts.scored_tokens, here.counts.weight)
        assert counts.laid_tokens == sum(int((b.tokens_T != 0).sum()) for b in whole)
        assert share_prefix is False or counts.laid_tokens == counts.tokens
        assert counts.padded_tokens == sum(len(b.tokens_T) for b in whole)
        assert counts.scored_tokens == sum(len(b.rows.row_N) for b in whole)
        assert counts.micro_batches == len(whole) // ranks
        assert counts.micro_batches % fewest == 0
        assert len({len(b.tokens_T) for b in whole}) == 1
        assert len(whole[0].tokens_T) <= -(-60 // multiple) * multiple
        assert len(whole[0].tokens_T) % multiple == 0
        total = sum(float(b.rows.weight_N.double().sum()) for b in whole)
        np.testing.assert_allclose(total, 1.0, rtol=1e-6)
        assert_completions_weigh_one(whole)
        seen += counts.samples
    per_source = np.bincount(store.sources, minlength=2)
    assert seen == sum(int(np.ceil(2 * w * n)) for w, n in zip(weights, per_source, strict=True))


def assert_completions_weigh_one(batches):
    """Taken once per sample, weights sum to 1; so do those of the tokens of all first (chosen) completions."""
    per_sample = per_token = 0.0
    for rows in (batch.rows for batch in batches):
        known = rows.completions
        firsts = np.unique(known.sample_C.numpy(), return_index=True)[1]
        per_sample += float(known.weight_C[firsts].double().sum())
        per_token += float((known.token_weight_C * known.length_C)[firsts].double().sum())
        assert (
            known.length_C.tolist() == torch.bincount(rows.sequence_N, minlength=len(known.last_C)).tolist()
        )
    np.testing.assert_allclose([per_sample, per_token], 1.0, rtol=1e-5)


def scored(batches):
    """Return (token, target, weight) of every row; a completion's first target comes right after the prompt."""
    rows = []
    for batch in batches:
        read = (batch.tokens_T[batch.rows.row_N], batch.rows.target_N, batch.rows.weight_N)
        rows += list(zip(*(column.tolist() for column in read), strict=True))
    assert all(token < target and token // 1000 == target // 1000 for token, target, _ in rows)
    return rows


def test_steps_win_over_epochs_and_samples_come_around():
    store = memory_store(documents([5, 6, 7]))
    train = TrainConfig(global_batch_size=2, steps=4)
    steps = StepBatches(store, DataConfig(train="x", shuffle=False), train, "x", "token", Share())
    assert steps.steps == 4
    assert [
        sorted({t // 1000 for b in steps.step(s).batches for t in b.rows.target_N.tolist()}) for s in range(4)
    ] == [
        [0, 1],
        [0, 2],
        [1, 2],
        [0, 1],
    ]


def test_a_prompt_with_the_completion_before_it():
    store = memory_store([group(0, 3, [6]), group(1, 4, [2]), group(2, 7, [2])])
    train = TrainConfig(global_batch_size=3, steps=1)
    for ranks in (1, 2):
        packs = []
        for rank in range(ranks):
            data = DataConfig(train="x", sequence_length=9, shuffle=False)
            share = Share(ranks=ranks, rank=rank)
            steps = StepBatches(store, data, train, "x", "example", share, mismatched=True)
            packs += steps.step(0).mismatched.batches
        rows = {}
        for batch in packs:
            for start, stop in zip(*edges(batch), strict=True):
                tokens = batch.tokens_T[start:stop].tolist()
                rows[tokens[0] // 1000] = tokens
        # the first takes the last one's; 9 tokens fit
        assert rows[0] == [1, 2, 3, 2008, 2009]
        assert rows[1] == [1001, 1002, 1003, 1004, 4, 5, 6, 7, 8]
        assert rows[2] == [*range(2001, 2008), 1005, 1006]
        targets = sorted(t for batch in packs for t in batch.rows.target_N.tolist())
        assert targets == [4, 7, 1005, 2008]  # as they were scored beside their own prompts


def edges(batch):
    stops = np.cumsum([length for _, lengths in batch.layout.groups for length in lengths]).tolist()
    return [0, *stops][: len(stops)], stops


def test_repeated_prompts_that_do_not_fit_are_refused():
    store = memory_store([group(0, 10, [5, 5])])
    require_room(store, DataConfig(train="x", sequence_length=20))
    require_room(store, DataConfig(train="x", sequence_length=30, share_prefix=False))
    with pytest.raises(InputError, match="share_prefix: false needs .* = 29 tokens .* got 30"):
        require_room(store, DataConfig(train="x", sequence_length=29, share_prefix=False))


def test_steps_of_tokens_do_not_look_at_how_prompts_lie():
    store = memory_store([group(i, 10, [3, 3]) for i in range(6)])
    train = TrainConfig(global_batch_tokens=40, epochs=1)
    for share in (True, False):
        data = DataConfig(train="x", sequence_length=60, share_prefix=share, shuffle=False)
        order = step_order(store, data, train, "x")
        assert [order.samples(s).tolist() for s in range(order.steps)] == [[0, 1], [2, 3], [4, 5]]


@given(
    groups=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1
    ),
    shared=st.booleans(),
)
def test_what_samples_see_is_what_each_of_them_sees(groups, shared):
    store = memory_store([group(i, prompt, own) for i, (prompt, own) in enumerate(groups)])
    assert seen_in_samples(store, shared).tolist() == [visible_keys(p, own, shared) for p, own in groups]
