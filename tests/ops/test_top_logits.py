"""top_logits equals a stable sort of the full logits: of ties the lower tokens, on any number of vocabulary ranks.

Its logits have the bits that column_logits gives.
"""

import pytest
import torch

from megatron_align.kernels import column_logits, top_logits
from megatron_align.kernels.token_logprobs import slab
from tests.harness import kernel_ranks


def tied(rows, hidden, vocab):
    """Return small integers, whose products are exact in any order, so that many logits are exactly tied."""
    draw = torch.Generator().manual_seed(vocab)
    return [torch.randint(-2, 3, (count, hidden), generator=draw).float() for count in (rows, vocab)]


def wanted(hidden_NH, weight_VH, top_k):
    value_NV, token_NV = (hidden_NH @ weight_VH.T).float().sort(dim=1, descending=True, stable=True)
    return value_NV[:, :top_k], token_NV[:, :top_k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 7, 40])
def test_ties_go_to_the_lower_tokens(dtype, top_k, monkeypatch):
    monkeypatch.setitem(slab.SLAB_BYTES, "cpu", 1000)  # many chunks
    hidden, weight = (t.to(dtype) for t in tied(30, 8, 40))
    logits, tokens = top_logits(hidden, weight, top_k)
    assert torch.equal(logits, column_logits(hidden, weight, tokens))
    monkeypatch.setitem(slab.SLAB_BYTES, "cpu", 2**27)
    want_logits, want_tokens = wanted(hidden, weight, top_k)
    assert torch.equal(tokens, want_tokens)
    assert torch.equal(logits, want_logits)
    assert (want_logits[:, 1:] == want_logits[:, :-1]).any() or top_k == 1


@pytest.mark.parametrize("world, vocab, top_k", [(4, 7, 6)])
def test_top_of_the_shards_is_the_top_of_the_whole(pool, world, vocab, top_k):
    """The last ranks may hold fewer tokens than the top has, or padding only."""
    hidden, weight = tied(9, 12, vocab)
    padded = torch.cat([weight, torch.full((-vocab % 16, 12), 9.0)])
    want_logits, want_tokens = wanted(hidden, weight, top_k)
    for logits, tokens in pool.run(world, kernel_ranks.top_logits, hidden, padded, top_k, vocab):
        assert torch.equal(tokens, want_tokens)
        assert torch.equal(logits, want_logits)


@pytest.mark.parametrize("top_k", [0, 7])
def test_more_than_the_vocabulary_is_refused(top_k):
    with pytest.raises(ValueError, match=f"1 <= top_k <= 6, the vocabulary; got {top_k}"):
        top_logits(torch.zeros(4, 8), torch.zeros(6, 8), top_k)
