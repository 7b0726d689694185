"""Law 5: changing a token of one sample leaves the other samples' log-probs bit-identical, through the whole model."""

import numpy as np
import pytest
import torch

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.collate import pack
from megatron_align.records import Sample
from tests.harness import model_ranks

LENGTHS = (9, 40, 3, 25)


def packs():
    draw = np.random.default_rng(0)
    samples = [Sample(draw.integers(0, 259, n).astype(np.int32), np.arange(n) > 0) for n in LENGTHS]
    changed = samples[1].tokens_L.copy()
    changed[5] = (changed[5] + 1) % 259
    other = [samples[0], Sample(changed, samples[1].scored_L), *samples[2:]]
    return [pack(list(s), [1.0] * len(LENGTHS), tokens=96) for s in (samples, other)]


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2),
        ParallelConfig(context=2, context_kind="ulysses"),
        ParallelConfig(context=2, context_kind="allgather"),
    ],
    ids=["tp1", "tp2_sp", "ulysses", "allgather"],
)
def test_other_samples_do_not_move(pool, tiny_models, parallel):
    batches = packs()
    sequence_N = batches[0].rows.sequence_N
    for before, after in pool.run(
        parallel.tensor * parallel.context, model_ranks.pack_logprobs, tiny_models(), parallel, batches
    ):
        assert torch.equal(before[sequence_N != 1], after[sequence_N != 1])
        moved = (before != after)[sequence_N == 1]
        assert not moved[:4].any()  # causal: what stands before the changed token does not move either
        assert moved[4:].all()
