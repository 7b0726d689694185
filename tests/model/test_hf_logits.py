"""Law 2: the logits of packed texts equal transformers' logits of each text alone, to 1e-4 absolute in fp32."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.collate import pack
from megatron_align.records import Sample
from tests.harness import model_ranks
from tests.harness.tiny import VARIANTS

LENGTHS = [1, 7, 130, 38]
PADDING = 16


def packed(vocab_size):
    tokens = torch.randint(vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    samples = [Sample(text.numpy(), np.zeros(len(text), bool)) for text in tokens.split(LENGTHS)]
    return pack(samples, [0.0] * len(LENGTHS), sum(LENGTHS) + PADDING)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=4),
        ParallelConfig(tensor=4, sequence=False),
        ParallelConfig(context=2, context_kind="ulysses"),
        ParallelConfig(context=2, context_kind="allgather"),
    ],
    ids=["tp1", "tp2_sp", "tp4_sp", "tp4", "ulysses", "allgather"],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(pool, tiny_models, variant, parallel):
    model = AutoModelForCausalLM.from_pretrained(tiny_models(variant), dtype=torch.float32).eval()
    batch = packed(model.config.vocab_size)
    with torch.no_grad():
        texts = batch.tokens_T[: sum(LENGTHS)].split(LENGTHS)
        want = torch.cat([model(text[None]).logits[0] for text in texts])
    for got in pool.run(
        parallel.tensor * parallel.context, model_ranks.logits, tiny_models(variant), parallel, batch
    ):
        assert got.shape[1] == model.config.vocab_size
        assert (got[: sum(LENGTHS)] - want).abs().max() <= 1e-4
