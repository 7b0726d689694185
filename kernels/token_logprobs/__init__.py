"""Log-probs of target tokens under ``softmax(hidden @ weight.T)``, and their losses, without ``[N, V]`` logits.

One engine for scoring, supervised fine-tuning and every preference loss. Logits exist one *slab* at a time: a run of
rows, about 1 GiB on a GPU, that is projected, reduced to a few numbers per row, and in training overwritten by its
gradient. Usage and cost: ``docs/logprobs.md``.

Shapes, in all files here: N scored rows, H hidden, V vocabulary rows of this rank, n rows of one slab or chunk,
R vocab-parallel ranks, S statistics of a row, K largest log-probs of a row.
Vocab-parallel: rank r of ``group`` holds vocabulary rows ``[r * V, (r + 1) * V)``.
Precision: GEMMs in the input dtype; softmax statistics, log-probs and losses in fp32 at least; the weight's gradient is
summed over slabs in fp32.

Files: ``public`` validates, ``autograd`` holds the differentiable functions, ``slab_loop`` runs a loss over slabs,
``slab`` the buffer of logits, ``vocab_parallel_softmax`` the two passes over it (``softmax_kernels``: in Triton),
``gradients`` the accumulation, ``columns`` logits of given tokens, ``scores`` scoring with entropy and top k,
``reference`` plain PyTorch.
"""

from megatron_align.kernels.token_logprobs.options import MAXIMUM, combine_sums
from megatron_align.kernels.token_logprobs.public import (
    TokenScores,
    column_logits,
    slab_loss,
    token_logprobs,
    token_scores,
    top_logits,
)
from megatron_align.kernels.token_logprobs.reference import (
    column_logits_reference,
    slab_loss_reference,
    token_logprobs_reference,
    token_scores_reference,
)
from megatron_align.kernels.token_logprobs.slab import slab_rows
from megatron_align.kernels.token_logprobs.slab_loop import RECOMPUTED

__all__ = [
    "MAXIMUM",
    "RECOMPUTED",
    "TokenScores",
    "column_logits",
    "column_logits_reference",
    "combine_sums",
    "slab_loss",
    "slab_loss_reference",
    "slab_rows",
    "token_logprobs",
    "token_logprobs_reference",
    "token_scores",
    "token_scores_reference",
    "top_logits",
]
