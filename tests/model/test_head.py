"""The head's loss and gradients are those of its log-probs, on any layout, into main_grad under every kind of DDP."""

import numpy as np
import pytest
import torch

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.collate import pack
from megatron_align.model.head import pick_rows
from megatron_align.records import Sample
from tests.harness import model_ranks
from tests.harness.marks import mark_slow


def batches(scored_share):
    """Two packs of chats and one of a pair with a shared prompt, whose last token has two targets."""
    draw = np.random.default_rng(0)

    def chat(length):
        scored = draw.random(length) < scored_share
        scored[0], scored[-1] = False, True
        return Sample(draw.integers(0, 259, length).astype(np.int32), scored)

    pair = Sample(
        draw.integers(0, 259, 40).astype(np.int32),
        np.arange(40) >= 20,
        prompt_length=20,
        completion_lengths=(12, 8),
    )
    packs = [[chat(30), chat(25)], [chat(60)], [pair]]
    return [pack(samples, [0.01] * len(samples), tokens=64) for samples in packs]


@pytest.fixture(scope="module")
def reference(pool, tiny_models):
    done = {}

    def get(variant, share):
        if (variant, share) not in done:
            arguments = (tiny_models(variant), ParallelConfig(), batches(share), {"through": "logprobs"})
            [done[variant, share]] = pool.run(1, model_ranks.head_gradients, *arguments)
        return done[variant, share]

    return get


OVERLAP = {"overlap_grad_reduce": True}
WAYS = {
    "one": (ParallelConfig(), {}),
    "tp2": (ParallelConfig(tensor=2, sequence=False), {}),
    "tp2_sp": (ParallelConfig(tensor=2), {}),
    "tp4_sp": (ParallelConfig(tensor=4), {}),
    "overlap_grad_reduce": (ParallelConfig(), OVERLAP),
    "overlap_param_gather": (ParallelConfig(), {**OVERLAP, "overlap_param_gather": True}),
    "frozen_head": (ParallelConfig(), {"freeze": True}),
}


CASES = [
    (way, variant, share) for way in WAYS for variant in ("qwen2_tied", "llama3") for share in (1.0, 0.2)
]
# Each way with all rows of a tied head, and few of one of its own; overlap_param_gather reduces gradients so too.
SLOW = [
    case for case in CASES if case[0] == "overlap_grad_reduce" or (case[1] == "llama3") == (case[2] == 1.0)
]


@pytest.mark.parametrize("way, variant, share", mark_slow(CASES, SLOW))
def test_gradients_are_those_of_the_logprobs(pool, tiny_models, reference, variant, way, share):
    """Judge: loss of the log-probs, recomputed, through plain autograd and megatron-core's hook, on one process."""
    parallel, options = WAYS[way]
    want_losses, want = reference(variant, share)
    answers = pool.run(
        parallel.tensor, model_ranks.head_gradients, tiny_models(variant), parallel, batches(share), options
    )
    for losses, grads in answers:
        torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=1e-6)
        frozen = {"output_layer.weight", "embedding.word_embeddings.weight"} if "freeze" in options else set()
        assert grads.keys() == want.keys() - frozen
        for name, grad in grads.items():
            torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "rows, sent",
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], None),
        ([1, 1, 6], 1),
        ([0, 1, 2], 3),
        ([5], 1),
        ([], 1),
        ([7, 4, 4, 0, 5], 3),
        ([0, 1, 2, 3], None),  # one rank has to send all it has
    ],
)
def test_every_scored_row_has_the_index_at_which_it_was_sent(rows, sent):
    row_N = np.array(rows, np.int64)
    picked = pick_rows(row_N, tokens=4, ranks=2)
    assert (None if picked is None else picked.own_RM.shape) == (None if sent is None else (2, sent))
    if picked is not None:
        received = np.arange(8).reshape(2, 4)[np.arange(2)[:, None], picked.own_RM].reshape(-1)
        assert (received[picked.index_N] == row_N).all()
