"""Law 2: the logits of packed texts equal transformers' logits of each text alone, to 1e-4 absolute in fp32."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.collate import pack
from megatron_align.records import Sample
from tests.harness import model_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import VARIANTS

LENGTHS = [1, 7, 130, 38]
PADDING = 16


def packed(vocab_size):
    tokens = torch.randint(vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    samples = [Sample(text.numpy(), np.zeros(len(text), bool)) for text in tokens.split(LENGTHS)]
    return pack(samples, [0.0] * len(LENGTHS), sum(LENGTHS) + PADDING)


LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2_sp": ParallelConfig(tensor=2),
    "tp4_sp": ParallelConfig(tensor=4),
    "tp4": ParallelConfig(tensor=4, sequence=False),
    "ulysses": ParallelConfig(context=2, context_kind="ulysses"),
    "allgather": ParallelConfig(context=2, context_kind="allgather"),
}
# On every commit each variant on one rank, cut into four, and with one kind of context ranks; two of them on
# other tensor ranks.
ALWAYS = {"tp1": VARIANTS, "tp4_sp": VARIANTS, "ulysses": ("qwen2_mha", "llama3", "qwen3", "mistral")}
ALWAYS |= {"allgather": ("qwen2_mha", "qwen2_tied", "qwen2_untied", "llama32_tied")}
ALWAYS |= {"tp2_sp": ("qwen2_mha",), "tp4": ("llama32_tied",)}
CASES = [(variant, layout) for variant in VARIANTS for layout in LAYOUTS]


@pytest.mark.parametrize(
    "variant, layout", mark_slow(CASES, [case for case in CASES if case[0] not in ALWAYS[case[1]]])
)
def test_logits_equal_transformers(pool, tiny_models, variant, layout):
    parallel = LAYOUTS[layout]
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
