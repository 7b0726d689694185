"""column_logits equals columns of the full logits: values and both gradients, on any number of vocabulary ranks."""

import pytest
import torch
from torch.testing import assert_close

from megatron_align.kernels import column_logits, column_logits_reference, token_scores
from megatron_align.kernels.token_logprobs import slab
from megatron_align.losses.top_k_divergence import reverse_kl
from tests.harness import kernel_ranks


def inputs(rows, hidden, vocab, k, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    hidden_NH = torch.randn(rows, hidden, dtype=torch.float64, generator=generator)
    weight_VH = torch.randn(vocab, hidden, dtype=torch.float64, generator=generator) / hidden**0.5
    columns_NK = torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(rows)])
    return hidden_NH.to(dtype).requires_grad_(), weight_VH.to(dtype).requires_grad_(), columns_NK


def run(function, hidden, weight, columns, **options):
    values = function(hidden, weight, columns, **options)
    return [values.detach(), *torch.autograd.grad(values.square().sum(), (hidden, weight))]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 3.0}])
@pytest.mark.parametrize("shape", [(100, 20, 123, 7), (3, 5, 31, 31), (1, 8, 1, 1)])
def test_matches_reference_in_float64(shape, options, monkeypatch):
    monkeypatch.setitem(slab.SLAB_BYTES, "cpu", 8000)  # many chunks
    tensors = inputs(*shape)
    got, want = (run(f, *tensors, **options) for f in (column_logits, column_logits_reference))
    for got_t, want_t in zip(got, want, strict=True):
        assert_close(got_t, want_t, rtol=1e-10, atol=1e-12)


def test_bfloat16_gradients_are_as_near_as_the_references():
    tensors = inputs(100, 20, 123, 7, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in tensors[:2]]
    truth = run(column_logits_reference, *exact, tensors[2])
    same, got = (run(f, *tensors) for f in (column_logits_reference, column_logits))
    for got_t, same_t, truth_t in zip(got, same, truth, strict=True):
        allowed = (same_t - truth_t).abs().max() + 1e-3 * truth_t.abs().max()
        assert (got_t - truth_t).abs().max() <= allowed


@pytest.mark.parametrize("world, vocab", [(2, 31), (4, 7)])
def test_vocabulary_ranks_agree_with_one(pool, world, vocab):
    """The last ranks may hold padding rows only."""
    hidden, weight, columns = inputs(9, 12, vocab, 5, torch.float32)
    values, *grads = run(column_logits, hidden, weight, columns)
    padded = torch.cat([weight.detach(), torch.full((-vocab % 16, 12), 9.0)])
    answers = pool.run(world, kernel_ranks.columns, hidden.detach(), padded, columns, vocab)
    for got, hidden_grad, _ in answers:
        assert_close(got, values)
        assert_close(hidden_grad, grads[0])  # complete on every rank
    weight_grad = torch.cat([answer[2] for answer in answers])
    assert_close(weight_grad[:vocab], grads[1])
    assert (weight_grad[vocab:] == 0).all()


def test_a_policy_that_is_its_teacher_has_no_gradient_at_the_teachers_top_k():
    hidden, weight, _ = inputs(6, 12, 40, 1, torch.float32)
    top = token_scores(hidden.detach(), weight.detach(), torch.zeros(6, dtype=torch.int64), top_k=8)
    teacher = column_logits(hidden.detach(), weight.detach(), top.top_tokens_NK)
    assert_close(teacher.log_softmax(1), top.top_logprobs_NK.log_softmax(1))
    value_N = reverse_kl(column_logits(hidden, weight, top.top_tokens_NK), teacher)
    grads = torch.autograd.grad(value_N.sum(), (hidden, weight))
    assert (value_N == 0).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(
    "columns, message",
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"columns \[N = 4, K\]; got torch.int64 \(3, 2\)"),
        (torch.zeros(4, dtype=torch.int64), "columns"),
        (torch.zeros(4, 2), "got torch.float32"),
        (torch.zeros(4, 7, dtype=torch.int64), "1 to 6 columns, the vocabulary; got 7"),
        (torch.zeros(4, 0, dtype=torch.int64), "1 to 6 columns"),
        (torch.full((4, 2), 6), r"tokens in \[0, 6\); got 6 to 6"),
        (torch.full((4, 2), -1), "got -1 to -1"),
    ],
)
def test_what_does_not_fit_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        column_logits(torch.zeros(4, 8), torch.zeros(6, 8), columns)
