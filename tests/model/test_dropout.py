"""An adapter's dropout: the mask belongs to token and feature wherever they are, and its expectation is no dropout."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_align.data.batching.token_keys import token_keys
from megatron_align.model.dropout import _dropped, dropped_linear, feature_keys
from megatron_align.records import Sample

TOKENS, FEATURES, P = 400, 300, 0.3


@pytest.fixture(scope="module")
def drawn():
    sample = Sample(np.zeros(TOKENS, np.int32), np.zeros(TOKENS, bool))
    keys = torch.from_numpy(token_keys(7, 3, [5], [sample], TOKENS, True))
    return keys, feature_keys("model.layers.0.mlp.up_proj", torch.arange(FEATURES))


def mask(keys, features, p=P):
    return _dropped(torch.ones(len(keys), 1, features.shape[1]), keys, features, p)[:, 0]


def test_the_mask_is_random(drawn):
    """Frequencies of all, of rows, of columns and of equal neighbours are within 5 standard deviations of a coin's."""
    kept = mask(*drawn)
    assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - P)])
    kept = (kept > 0).double()

    def close(values, mean, count):
        assert ((values - mean).abs() < 5 * (mean * (1 - mean) / count) ** 0.5).all()

    close(kept.mean(), 1 - P, kept.numel())
    close(kept.mean(0), 1 - P, TOKENS)
    close(kept.mean(1), 1 - P, FEATURES)
    both = (1 - P) ** 2 + P**2
    close((kept[1:] == kept[:-1]).double().mean(1), both, FEATURES)
    close((kept[:, 1:] == kept[:, :-1]).double().mean(0), both, TOKENS)
    other = (
        mask(drawn[0], feature_keys("model.layers.0.mlp.gate_proj", torch.arange(FEATURES))) > 0
    ).double()
    close((kept == other).double().mean(), both, kept.numel())


def test_a_part_has_its_part_of_the_mask(drawn):
    keys, features = drawn
    part = feature_keys("model.layers.0.mlp.up_proj", torch.arange(100, 200))
    assert torch.equal(mask(keys[50:70], part), mask(keys, features)[50:70, 100:200])


@pytest.mark.parametrize("p", [0.0, 0.5, 0.999])
def test_gradients_are_those_of_the_masked_input(drawn, p):
    keys, features = drawn
    x, a = torch.randn(TOKENS, 1, FEATURES, dtype=torch.double), torch.randn(4, FEATURES, dtype=torch.double)
    kept = mask(keys, features, p).double()[:, None]
    assert p > 0 or (kept == 1).all()
    results = []
    for function in (
        lambda x, a: dropped_linear(x, a, keys, features, p),
        lambda x, a: F.linear(x * (kept > 0) / (1 - p), a),
    ):
        leaves = x.clone().requires_grad_(), a.clone().requires_grad_()
        output = function(*leaves)
        output.square().sum().backward()
        results.append((output, *(leaf.grad for leaf in leaves)))
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want)


def test_keys_name_the_token_not_its_place():
    """Prompts are drawn once, whether they are shared or not; samples, completions, steps and seeds differ."""
    pair = Sample(np.zeros(9, np.int32), np.zeros(9, bool), 4, (3, 2))
    chat = Sample(np.zeros(5, np.int32), np.zeros(5, bool))
    shared = token_keys(1, 2, [6, 3], [pair, chat], 16, True)
    alone = token_keys(1, 2, [3, 6], [chat, pair], 20, False)
    assert np.array_equal(shared[9:14], alone[:5])
    prompt, chosen, rejected = shared[:4], shared[4:7], shared[7:9]
    assert np.array_equal(alone[5:18], np.concatenate([prompt, chosen, prompt, rejected]))
    assert not shared[14:].any()
    assert len(set(shared[:14])) == 14
    for other in (token_keys(2, 2, [6], [pair], 9, True), token_keys(1, 3, [6], [pair], 9, True)):
        assert not set(other) & set(shared)
