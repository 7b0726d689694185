"""Log-probs of targets under ``softmax(hidden @ weight.T)``, and losses of them, without ``[N, V]`` logits.

One engine for scoring, supervised fine-tuning and every preference loss. Logits exist one *slab* at a time: a
run of rows, about a GiB on a GPU, that is projected, reduced to a few numbers per row, and in training
overwritten by its own gradient. ``docs/logprobs.md`` tells how it is used and what it costs.

Shapes, in all files here: N scored rows, H hidden, V vocabulary rows on this rank, n rows of one slab or chunk,
R vocabulary ranks, S statistics of a row, K largest log-probs of a row.
Vocab-parallel: rank r of ``group`` holds vocabulary rows ``[r * V, (r + 1) * V)``.
Precision: GEMMs in the input dtype; softmax statistics, log-probs and losses in fp32 at least; the weight's
gradient is summed over slabs in fp32.
"""

from megatron_align.kernels.token_logprobs.autograd import RECOMPUTED
from megatron_align.kernels.token_logprobs.passes import slab_rows
from megatron_align.kernels.token_logprobs.public import TokenScores, slab_loss, token_logprobs, token_scores
from megatron_align.kernels.token_logprobs.reference import (
    slab_loss_reference,
    token_logprobs_reference,
    token_scores_reference,
)

__all__ = [
    "RECOMPUTED",
    "TokenScores",
    "slab_loss",
    "slab_loss_reference",
    "slab_rows",
    "token_logprobs",
    "token_logprobs_reference",
    "token_scores",
    "token_scores_reference",
]
