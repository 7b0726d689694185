"""A step is the same on every layout: its packs hold its samples once, and its weights sum to 1 over all ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.config import DataConfig, DataSource, TrainConfig
from megatron_align.data.batching.attention_cost import visible_keys
from megatron_align.data.batching.collate import pack
from megatron_align.data.batching.packing import PackOptions, require_room
from megatron_align.data.batching.sampler import step_order
from megatron_align.data.batching.step_batches import DataRank, StepBatches
from megatron_align.data.sample_table import MemoryTable
from megatron_align.errors import InputError
from tests.data.batching.samples import documents, group


def batches(table, data, train, mixture, normalization, rank=None, **options):
    """The steps of a run, as the training loop builds them."""
    chosen = {"mismatched": options.pop("mismatched", False)}
    order = step_order(table, data, train, mixture)
    return StepBatches(
        table, order, PackOptions.of_data(data, **options), rank or DataRank(), normalization, **chosen
    )


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
    store = MemoryTable(samples, np.arange(len(samples)) * 2 // len(samples))
    mixture = [DataSource(path="a", weight=weights[0]), DataSource(path="b", weight=weights[1])]
    train = TrainConfig(epochs=2, **{f"global_batch_{batch[0]}": batch[1]})
    alone = batches(store, DataConfig(train="x", sequence_length=60), train, mixture, normalization)
    data = DataConfig(train="x", sequence_length=60, packing=packing, share_prefix=share_prefix)
    spread = [
        batches(
            store,
            data,
            train,
            mixture,
            normalization,
            DataRank(ranks=ranks, rank=rank),
            multiple=multiple,
            micro_batch_multiple=fewest,
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
        places = np.concatenate([p for steps in spread for p in steps.step(step).packs.completions])
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
    store = MemoryTable(documents([5, 6, 7]))
    train = TrainConfig(global_batch_size=2, steps=4)
    steps = batches(store, DataConfig(train="x", shuffle=False), train, "x", "token")
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
    store = MemoryTable([group(0, 3, [6]), group(1, 4, [2]), group(2, 7, [2])])
    train = TrainConfig(global_batch_size=3, steps=1)
    for ranks in (1, 2):
        packs = []
        for rank in range(ranks):
            data = DataConfig(train="x", sequence_length=9, shuffle=False)
            own = DataRank(ranks=ranks, rank=rank)
            steps = batches(store, data, train, "x", "example", own, mismatched=True)
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
    store = MemoryTable([group(0, 10, [5, 5])])
    require_room(store, DataConfig(train="x", sequence_length=20))
    require_room(store, DataConfig(train="x", sequence_length=30, share_prefix=False))
    with pytest.raises(InputError, match="share_prefix: false needs .* = 29 tokens .* got 30"):
        require_room(store, DataConfig(train="x", sequence_length=29, share_prefix=False))


def test_steps_of_tokens_do_not_look_at_how_prompts_lie():
    store = MemoryTable([group(i, 10, [3, 3]) for i in range(6)])
    train = TrainConfig(global_batch_tokens=40, epochs=1)
    for share in (True, False):
        data = DataConfig(train="x", sequence_length=60, share_prefix=share, shuffle=False)
        order = step_order(store, data, train, "x")
        assert [order.samples(s).tolist() for s in range(order.steps)] == [[0, 1], [2, 3], [4, 5]]


@settings(deadline=None, max_examples=40)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=3)), min_size=1
    ),
    shared=st.booleans(),
)
def test_visible_keys_of_a_table_are_those_of_each_of_its_samples(groups, shared):
    """The formula on all samples at once equals counting each sample's mask."""
    table = MemoryTable([group(i, prompt, own) for i, (prompt, own) in enumerate(groups)])
    keys_S = visible_keys(table.prompt_lengths, table.completion_counts, table.completion_lengths, shared)
    for sample, keys in zip(map(table.sample, range(len(table))), keys_S, strict=True):
        batch = pack([sample], [1.0], int(table.duplicated_lengths.max()), share_prefix=shared)
        laid = sum(prompt + sum(own) for prompt, own in batch.layout.groups)
        assert int(batch.layout.mask_QT()[:laid, :laid].sum()) == keys
