"""Which samples make a step depends on (seed, epoch, index) only: every sample as often as its source's weight
says, steps of samples or of tokens that follow each other without a gap, computed from the step number alone."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_align.config import DataSource
from megatron_align.data.batching.sampler import EpochOrder, SampleSteps, TokenSteps, passes_per_epoch

FEW = settings(max_examples=100, deadline=None)


def plain(total, seed=0, shuffle=True):
    return EpochOrder(np.zeros(total, np.int32), [1.0], seed, shuffle)


@FEW
@given(
    total=st.integers(1, 40),
    batch=st.integers(1, 50),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_every_sample_once_per_epoch(total, batch, epochs, seed, shuffle):
    order = SampleSteps(plain(total, seed, shuffle), batch, epochs)
    steps = [order.samples(s) for s in range(order.steps)]
    assert all(len(step) == batch for step in steps[:-1])
    run = np.concatenate(steps)
    assert len(run) == epochs * total
    for epoch in run.reshape(epochs, total):
        assert sorted(epoch) == list(range(total))
        assert shuffle or list(epoch) == list(range(total))
    with pytest.raises(ValueError, match="step must be within the run"):
        order.samples(order.steps)


@FEW
@given(
    total=st.integers(1, 40), batch=st.integers(1, 20), other=st.integers(1, 20), seed=st.integers(0, 2**31)
)
def test_the_order_does_not_depend_on_the_batch(total, batch, other, seed):
    def first(n, size):
        order = SampleSteps(plain(total, seed), size)
        return np.concatenate([order.samples(s) for s in range(-(-n // size))])[:n]

    assert np.array_equal(first(60, batch), first(60, other))


def test_epochs_and_seeds_shuffle_differently():
    orders = [*(plain(64, 1).samples(epoch) for epoch in (0, 1)), plain(64, 2).samples(0), np.arange(64)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_shuffle_is_fixed_for_good():
    # a change of these numbers breaks the resuming of every run
    epochs = [plain(10, 1234).samples(epoch).tolist() for epoch in (0, 1)]
    assert epochs == [[5, 6, 3, 9, 7, 4, 1, 2, 8, 0], [9, 2, 0, 7, 6, 1, 8, 4, 5, 3]]
    mixed = EpochOrder(np.array([0, 0, 0, 0, 1, 1]), [0.5, 2.0], 1234)
    assert [mixed.samples(epoch).tolist() for epoch in (0, 1)] == [
        [5, 4, 5, 3, 4, 0],
        [4, 1, 2, 5, 5, 4],
    ]


mixtures = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([1.0, 0.5, 2.0, 0.25, 0.1, 1.5, 3.7])),
    min_size=1,
    max_size=4,
)


@FEW
@given(mixture=mixtures, seed=st.integers(0, 2**40), shuffle=st.booleans(), ordered=st.booleans())
@example(mixture=[(1, 0.1)], seed=0, shuffle=True, ordered=True)
def test_a_mixture_gives_every_sample_its_share(mixture, seed, shuffle, ordered):
    counts, weights = zip(*mixture, strict=True)
    sources = np.repeat(np.arange(len(counts)), counts)
    if not ordered:
        sources = np.random.default_rng(seed).permutation(sources)
    order = EpochOrder(sources, weights, seed, shuffle)
    seen = np.zeros(len(sources), int)
    for epoch in range(20):
        samples = order.samples(epoch)
        assert len(samples) == order.start(epoch + 1) - order.start(epoch)
        times = np.bincount(samples, minlength=len(sources))
        seen += times
        for k, weight in enumerate(map(Fraction, map(str, weights))):
            one, so_far = weight * counts[k], (epoch + 1) * weight
            # per epoch: as many as the weight says, no sample more than once oftener than another
            assert floor(one) <= times[sources == k].sum() <= ceil(one)
            assert set(times[sources == k]) <= {floor(weight), ceil(weight)}
            # over epochs: even as far as whole numbers go, so exactly even after 1 / weight epochs
            assert set(seen[sources == k]) <= {floor(so_far), ceil(so_far)}


def test_half_of_a_source_then_the_other_half():
    order = EpochOrder(np.zeros(40, int), [0.5], seed=3)
    halves = [order.samples(epoch) for epoch in (0, 1)]
    assert sorted(np.concatenate(halves)) == list(range(40))
    in_file_order = EpochOrder(np.array([0, 0, 0, 0, 1]), [0.5, 2], shuffle=False)
    assert [in_file_order.samples(epoch).tolist() for epoch in (0, 1)] == [[0, 1, 4, 4], [2, 3, 4, 4]]


def test_weights_of_one_are_no_mixture():
    one, several = plain(50, 9), EpochOrder(np.repeat([0, 1, 2], [20, 20, 10]), [1.0, 1, 1.0], 9)
    assert all(np.array_equal(one.samples(e), several.samples(e)) for e in range(3))


def taken_one_by_one(lengths, stream, tokens):
    """The rule itself: samples in order while they fit, at least one."""
    steps, room = [[]], tokens
    for i in stream:
        if steps[-1] and lengths[i] > room:
            steps.append([])
            room = tokens
        steps[-1].append(i)
        room -= lengths[i]
    return steps


@FEW
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    tokens=st.integers(1, 200),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 100),
    weight=st.sampled_from([1.0, 0.5, 0.1, 2.3]),
)
@example(lengths=[5], tokens=3, epochs=3, seed=0, weight=1.0)
@example(lengths=[5], tokens=15, epochs=4, seed=0, weight=0.5)
def test_steps_of_tokens(lengths, tokens, epochs, seed, weight):
    lengths = np.array(lengths)
    order = EpochOrder(np.zeros(len(lengths), int), [weight], seed)
    steps = TokenSteps(order, lengths, tokens, epochs)
    expected = taken_one_by_one(lengths, order.between(0, order.start(epochs)), tokens)
    assert [steps.samples(s).tolist() for s in range(steps.steps)] == expected
    with pytest.raises(ValueError, match="step must be within the run"):
        steps.samples(steps.steps)
    # a run that is counted in steps goes the same way, and any step is found without the ones before it
    endless = TokenSteps(EpochOrder(np.zeros(len(lengths), int), [weight], seed), lengths, tokens)
    for step in reversed(range(len(expected) - 1)):
        assert endless.samples(step).tolist() == expected[step]


def test_weights_come_from_the_configuration():
    assert passes_per_epoch("a.jsonl") == (1.0,)
    assert passes_per_epoch(["a.jsonl", DataSource(path="b", weight=0.5)]) == (1.0, 0.5)


@pytest.mark.parametrize("sources, passes", [([], [1]), ([0, 1], [1]), ([0], [0]), ([0], [])])
def test_what_is_no_mixture_is_refused(sources, passes):
    with pytest.raises(ValueError, match="EpochOrder needs"):
        EpochOrder(np.array(sources, int), passes)


@pytest.mark.parametrize("weight", [1e-3, 1e-7, 1e-9])
def test_epochs_without_a_sample_take_no_time(weight):
    """A source of a tiny weight alone: a step spans millions of epochs, and still each sample comes once in turn."""
    order = EpochOrder(np.zeros(10, np.int64), [weight], seed=1)
    seen = order.between(0, 20)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert order.between(7, 12).tolist() == seen[7:12].tolist()
    assert order.between(10**5, 10**5 + 3).tolist() == seen[:3].tolist()
    tokens = TokenSteps(order, np.full(10, 5), 12, epochs=None, steps=4)
    assert [tokens.samples(step).tolist() for step in range(4)] == [
        seen[2 * i : 2 * i + 2].tolist() for i in range(4)
    ]
    assert SampleSteps(order, 4, epochs=3).steps == 1
