"""A step's packs hold its samples' tokens once, whatever the layout; its weights sum to 1 over all ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.config import DataConfig, TrainConfig
from megatron_align.data.batch import Share, StepBatches, pack, row_weights
from megatron_align.records import Sample


def sample(tokens, scored):
    return Sample(np.array(tokens, np.int32), np.array(scored, bool))


def memory_store(lengths):
    """Stands in for a TokenStore: token t of sample i is 1000 i + t + 1, every third one is scored."""
    samples = []
    for i, length in enumerate(lengths):
        scored = np.arange(length) % 3 == i % 3
        scored[[0, -1]] = False, True
        samples.append(sample(1000 * i + np.arange(length) + 1, scored))

    class Store(SimpleNamespace):
        def __len__(self):
            return len(samples)

    return Store(
        sample=samples.__getitem__,
        lengths=np.array(lengths, np.int64),
        scored_counts=np.array([s.scored_L.sum() for s in samples], np.int64),
    )


def test_a_pack_by_hand():
    one, two = sample([5, 6, 7], [0, 0, 1]), sample([8, 9, 10, 11], [0, 1, 0, 1])
    got = pack([one, two], [0.5, 0.25], tokens=9, pad_id=3)
    assert got.tokens_T.tolist() == [5, 6, 7, 8, 9, 10, 11, 3, 3]
    assert got.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0]
    assert got.layout.own_start_T.tolist() == [0, 0, 0, 3, 3, 3, 3, 7, 8]
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
    assert got.layout.own_start_T.tolist() == [0, 1, 2, 3]
    assert [len(rows) for rows in (got.rows.row_N, got.rows.target_N, got.rows.weight_N)] == [0, 0, 0]
    assert got.rows.weight_N.dtype == torch.float32
    assert got.rows.target_N.dtype == torch.int64


def test_a_pack_too_small_is_refused():
    with pytest.raises(ValueError, match="total"):
        pack([sample([1, 2], [0, 1])], [1.0], tokens=1)


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


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    batch=st.integers(1, 20),
    ranks=st.integers(1, 5),
    multiple=st.sampled_from([1, 4, 6]),
    packing=st.booleans(),
    normalization=st.sampled_from(["token", "sample"]),
    fewest=st.integers(1, 3),
)
def test_a_step_is_the_same_on_every_layout(lengths, batch, ranks, multiple, packing, normalization, fewest):
    store = memory_store(lengths)
    data = DataConfig(train="x", sequence_length=40, packing=packing)
    train = TrainConfig(global_batch_size=batch, epochs=2)
    alone = StepBatches(store, data, train, normalization, Share())
    shares = [
        Share(ranks=ranks, rank=rank, multiple=multiple, micro_batch_multiple=fewest) for rank in range(ranks)
    ]
    spread = [StepBatches(store, data, train, normalization, share) for share in shares]
    assert alone.steps == -(-2 * len(lengths) // batch)
    for step in range(alone.steps):
        whole = [batch for steps in spread for batch in steps.batches(step)]
        assert sorted(scored(whole)) == sorted(scored(alone.batches(step)))
        counts = spread[0].counts(step)
        assert all(steps.counts(step) == counts for steps in spread)
        assert counts.samples == alone.counts(step).samples == min(batch, 2 * len(lengths) - step * batch)
        assert counts.tokens == sum(int((b.tokens_T != 0).sum()) for b in whole)
        assert counts.padded_tokens == sum(len(b.tokens_T) for b in whole)
        assert counts.scored_tokens == sum(len(b.rows.row_N) for b in whole)
        assert counts.micro_batches == len(whole) // ranks
        assert counts.micro_batches % fewest == 0
        assert len({len(b.tokens_T) for b in whole}) == 1
        assert len(whole[0].tokens_T) % multiple == 0
        np.testing.assert_allclose(sum(float(b.rows.weight_N.double().sum()) for b in whole), 1.0, rtol=1e-6)


def scored(batches):
    """Return (token, target, weight) of every row, and check that the token lies right before its target."""
    rows = []
    for batch in batches:
        columns = (batch.tokens_T[batch.rows.row_N], batch.rows.target_N, batch.rows.weight_N)
        rows += list(zip(*(column.tolist() for column in columns), strict=True))
    assert all(target == token + 1 for token, target, _ in rows)
    return rows


def test_steps_win_over_epochs_and_samples_come_around():
    store = memory_store([5, 6, 7])
    train = TrainConfig(global_batch_size=2, steps=4)
    steps = StepBatches(store, DataConfig(train="x", shuffle=False), train, "token", Share())
    assert steps.steps == 4
    assert [
        sorted({t // 1000 for b in steps.batches(s) for t in b.rows.target_N.tolist()}) for s in range(4)
    ] == [
        [0, 1],
        [0, 2],
        [1, 2],
        [0, 1],
    ]
