"""token_logprobs equals full-logits log-softmax: values and both gradients, on any number of vocabulary ranks."""

import pytest
import torch

from megatron_align.kernels import token_logprobs, token_logprobs_reference
from megatron_align.kernels.token_logprobs import slab
from tests.harness import kernel_ranks

SHAPES = [(252, 507, 123), (3, 47, 31), (1, 8, 1), (0, 16, 33)]


def inputs(rows, hidden, vocab, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *s: torch.randn(*s, dtype=torch.float64, generator=generator)  # noqa: E731
    targets = torch.randint(vocab, (rows,), generator=generator)
    hidden_NH, weight_VH = draw(rows, hidden) * scale, draw(vocab, hidden) / hidden**0.5
    return hidden_NH.to(dtype).requires_grad_(), weight_VH.to(dtype).requires_grad_(), targets


def run(function, hidden, weight, targets, **options):
    values = function(hidden, weight, targets, **options)
    grad = torch.linspace(-1, 1, len(targets), dtype=values.dtype)
    return [values.detach(), *torch.autograd.grad(values, (hidden, weight), grad)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference_in_float64(shape, temperature, monkeypatch):
    monkeypatch.setitem(slab.SLAB_BYTES, "cpu", 8000)  # many chunks
    tensors = inputs(*shape)
    got, want = (
        run(f, *tensors, temperature=temperature) for f in (token_logprobs, token_logprobs_reference)
    )
    for got_t, want_t in zip(got, want, strict=True):
        torch.testing.assert_close(got_t, want_t, rtol=1e-9, atol=1e-11)


# fp32 slack: peaked logits reach hundreds, where fp32 is spaced 3e-5, and log-sum-exp rounds once more than
# log_softmax does.
@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0], ids=["usual", "flat", "peaked"])
@pytest.mark.parametrize("dtype, slack", [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_error_is_within_that_of_the_same_dtype_reference(dtype, slack, scale):
    low = inputs(252, 507, 123, dtype, scale)
    exact = [t.detach().double().requires_grad_() for t in low[:2]]
    truth = run(token_logprobs_reference, *exact, low[2])
    same, got = (run(f, *low) for f in (token_logprobs_reference, token_logprobs))
    for got_t, same_t, truth_t in zip(got, same, truth, strict=True):
        allowed = (same_t - truth_t).abs().max() + slack * truth_t.abs().max()
        assert (got_t - truth_t).abs().max() <= allowed
    assert (got[0] <= 0).all()  # a fused engine elsewhere once returned +123


def test_a_large_common_offset_changes_nothing():
    hidden, weight, targets = inputs(9, 16, 33, torch.float32)
    ones = torch.ones(9, 1)
    shifted = torch.cat([weight, torch.full((33, 1), 1e4)], dim=1)  # adds 1e4 to every logit
    got = token_logprobs(torch.cat([hidden, ones], 1), shifted, targets)
    # fp32 logits near 1e4 are spaced 1e-3 apart: no method can do better from here.
    torch.testing.assert_close(got, token_logprobs(hidden, weight, targets), rtol=0, atol=2e-3)


def test_padding_rows_never_count():
    hidden, weight, targets = inputs(9, 16, 33)
    padded = torch.cat([weight.detach(), torch.full((7, 16), 50.0, dtype=torch.float64)]).requires_grad_()
    got = run(token_logprobs, hidden, padded, targets, vocab_size=33)
    want = run(token_logprobs, hidden, weight, targets)
    torch.testing.assert_close(got[:2], want[:2])
    torch.testing.assert_close(got[2][:33], want[2])
    assert (got[2][33:] == 0).all()


@pytest.mark.parametrize("world, rows, vocab", [(2, 9, 31), (4, 9, 31), (4, 5, 7), (2, 0, 31)])
def test_vocabulary_ranks_agree_with_one(pool, world, rows, vocab):
    """The last rank may hold padding rows only: 7 real rows of 16 leave two such ranks of four."""
    hidden, weight, targets = inputs(rows, 12, vocab, torch.float32)
    hidden, weight = hidden.detach(), weight.detach()
    padding = 16 - vocab if vocab < 16 else 32 - vocab
    padded = torch.cat([weight, torch.full((padding, 12), 9.0)])
    values = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)
    grads = torch.autograd.grad((values * torch.arange(1, rows + 1)).sum(), (hidden, weight))
    answers = pool.run(world, kernel_ranks.logprobs, hidden.detach(), padded, targets, vocab)
    for got, hidden_grad, _rest in answers:
        torch.testing.assert_close(got, values.detach())
        torch.testing.assert_close(hidden_grad, grads[0])  # complete on every rank
    weight_grad = torch.cat([answer[2] for answer in answers])
    torch.testing.assert_close(weight_grad[:vocab], grads[1])
    assert (weight_grad[vocab:] == 0).all()


def three(hidden=(4, 8), weight=(6, 8), targets=4):
    return torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64)


BAD = {
    "hidden": (three(hidden=(4, 7)), {}, r"\(4, 7\) and \(6, 8\)"),
    "dtype": ((torch.zeros(4, 8).half(), *three()[1:]), {}, "one dtype"),
    "targets": (three(targets=3), {}, r"targets \[N = 4\]; got torch.int64 \(3,\)"),
    "temperature": (three(), {"temperature": 0.0}, "temperature > 0; got 0.0"),
    "vocabulary": (three(), {"vocab_size": 7}, "vocab_size <= 6 rows over 1 ranks; got 7"),
    "outside": ((*three()[:2], torch.tensor([0, 1, 6, 0])), {}, r"targets in \[0, 6\); got 0 to 6"),
    "negative": ((*three()[:2], torch.tensor([0, -100, 5, 0])), {}, "got -100 to 5"),
    "padded": ((*three()[:2], torch.tensor([0, 5, 1, 0])), {"vocab_size": 5}, r"targets in \[0, 5\)"),
}


@pytest.mark.parametrize("tensors, options, message", BAD.values(), ids=list(BAD))
def test_what_does_not_fit_is_refused(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        token_logprobs(*tensors, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite_are_named_under_checks(value, monkeypatch):
    hidden, weight, targets = three()
    hidden[2, 3] = value
    token_logprobs(hidden, weight, targets)
    monkeypatch.setenv("MEGATRON_ALIGN_CHECKS", "1")
    with pytest.raises(ValueError, match="finite hidden states; row 2 is not"):
        token_logprobs(hidden, weight, targets)


def test_a_vocabulary_that_the_ranks_do_not_divide_is_named_under_checks(pool):
    assert pool.run(2, kernel_ranks.checked_logprobs, [6, 6]) == ["agreed", "agreed"]
    for answer in pool.run(2, kernel_ranks.checked_logprobs, [6, 5]):
        assert "divides the padded vocabulary; got [6, 5]" in answer
