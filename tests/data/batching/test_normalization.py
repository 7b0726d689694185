"""The weights of a step's scored tokens sum to 1, whatever is normalised by and however samples are weighted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_align.data.batching.normalization import row_weights


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
