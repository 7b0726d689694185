"""Draws follow transformers' distribution; their random numbers depend on seed, prompt, sample and position alone."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_align.errors import InputError
from megatron_align.rollout.sampling import draw, uniforms
from megatron_align.rollout.types import Sampling


def test_random_numbers_are_a_function_of_their_position():
    one = uniforms(7, 3, 1, 50)
    assert np.array_equal(uniforms(7, 3, 1, 20), one[:20])  # a prefix: the length changes nothing
    for other in (uniforms(8, 3, 1, 50), uniforms(7, 4, 1, 50), uniforms(7, 3, 2, 50)):
        assert not set(one) & set(other)
    assert one.min() >= 0
    assert one.max() < 1
    many = uniforms(0, 0, 0, 20000)
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(many.std() - 12**-0.5) < 0.01


def judge(logits_BV, sampling):
    """Return transformers' distribution of the next token."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for warper in warpers:
        logits_BV = warper(None, logits_BV)
    return torch.softmax(logits_BV.double(), -1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8},
        {"top_p": 1e-9},
        {"top_k": 1},
    ],
)
def test_draws_have_the_distribution_of_transformers(options):
    sampling = Sampling(**options)
    logits_BV = 3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    expected_V = judge(logits_BV, sampling)[0]
    count = 20000
    # Evenly spaced random numbers: each token's share is its probability up to 1 / count.
    spaced = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token_B, logprob_B = draw(logits_BV.expand(count, -1), sampling, spaced)
    share_V = torch.bincount(token_B, minlength=40) / count
    assert (share_V - expected_V).abs().max() < 1.5 / count
    reference_V = torch.log_softmax(logits_BV[0].double() / sampling.temperature, -1)
    assert (logprob_B - reference_V[token_B]).abs().max() < 1e-5  # fp32


def test_greedy_takes_the_likeliest_token_with_its_log_prob():
    logits_BV = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    token_B, logprob_B = draw(logits_BV, Sampling(temperature=0), torch.zeros(2, dtype=torch.float64))
    assert token_B.tolist() == [1, 0]
    assert torch.allclose(logprob_B, torch.log_softmax(logits_BV, -1).max(-1).values)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"completions": 0}, "completions"),
        ({"stop": ("",)}, "stop"),
        ({"temperature": 0, "top_p": 0.5}, "no effect"),
        ({"temperature": 0, "completions": 2}, "no effect"),
    ],
)
def test_senseless_options_are_refused(options, part):
    with pytest.raises(InputError, match=part):
        Sampling(**options)
