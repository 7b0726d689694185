"""token_scores equals the scores of full logits: log-prob, entropy, log sum p^2, top k; on any ranks."""

import math

import pytest
import torch

from megatron_align.kernels import token_scores, token_scores_reference
from megatron_align.kernels.token_logprobs import slab
from tests.harness import kernel_ranks
from tests.harness.logprobs import Costs, draw


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "temperature": 0.7}], ids=["plain", "softcap"])
@pytest.mark.parametrize("shape", [(252, 507, 123), (3, 47, 31), (1, 8, 1), (0, 16, 33)])
def test_equals_full_logits(shape, options, monkeypatch):
    tensors = draw(*shape)
    monkeypatch.setitem(slab.SLAB_BYTES, "cpu", 8 * 20 * shape[2])  # 20 rows
    for top_k in (0, min(5, shape[2]), shape[2]):
        got = token_scores(*tensors, top_k=top_k, **options)
        want = token_scores_reference(*tensors, top_k=top_k, **options)
        for got_t, want_t in zip(got, want, strict=True):
            assert (got_t is None) == (want_t is None)
            if got_t is not None:
                torch.testing.assert_close(got_t, want_t, rtol=1e-9, atol=1e-11)
                assert not got_t.requires_grad


def test_the_reports_top_500_in_bf16():
    """arXiv:2410.14940 takes the KL over the reference's 500 likeliest tokens. Of bf16 ties any may come first."""
    tensors = draw(40, 64, 32256, torch.bfloat16, scale=4.0)
    with Costs() as costs:
        got = token_scores(*tensors, top_k=500)
    assert costs.flops == 2 * 40 * 64 * 32256
    want = token_scores_reference(*tensors, top_k=500)
    torch.testing.assert_close(got.top_logprobs_NK, want.top_logprobs_NK, rtol=1e-5, atol=1e-5)
    logits_NV = (tensors[0] @ tensors[1].T).float().log_softmax(-1)
    own_NK = logits_NV.gather(1, got.top_tokens_NK)
    torch.testing.assert_close(own_NK, got.top_logprobs_NK, rtol=1e-5, atol=1e-5)


def test_ends_of_the_scale():
    """Flat: entropy log V, log sum p^2 = -log V. Peaked: both 0."""
    hidden, weight, targets = draw(4, 8, 50, torch.float32)
    flat = token_scores(hidden * 0, weight, targets)
    torch.testing.assert_close(flat.entropy_N, torch.full((4,), math.log(50)))
    torch.testing.assert_close(flat.log_sum_square_N, torch.full((4,), -math.log(50)))
    peaked = token_scores(hidden * 1e4, weight, targets)
    torch.testing.assert_close(peaked.entropy_N, torch.zeros(4))
    torch.testing.assert_close(peaked.log_sum_square_N, torch.zeros(4))


@pytest.mark.parametrize("top_k", [-1, 11, 1001])
def test_more_than_the_vocabulary_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k <= 10; got {top_k}"):
        token_scores(*draw(4, 8, 10), top_k=top_k)


@pytest.mark.parametrize("world, rows, vocab", [(2, 9, 31), (4, 5, 7), (2, 0, 31)])
def test_vocabulary_ranks_agree_with_one(pool, world, rows, vocab):
    """Also where a rank has fewer than k real rows, or none: padding is never among the largest."""
    hidden, weight, targets = (t.detach() for t in draw(rows, 12, vocab, torch.float32))
    padded = torch.cat([weight, torch.full((16 * (1 + vocab // 16) - vocab, 12), 9.0)])
    want = token_scores(hidden, weight, targets, top_k=vocab)
    for got in pool.run(world, kernel_ranks.scores, hidden, padded, targets, vocab):
        torch.testing.assert_close(tuple(got), tuple(want))
