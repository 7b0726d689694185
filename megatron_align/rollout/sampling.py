"""Draw the next token of every row from its logits, reproducibly.

The random number of a draw is a pure function of (seed, prompt key, sample, position), from a counter-based generator
(Philox): it does not depend on which rows share a batch, on their order, or on the number of ranks. A token is drawn by
inverting the cumulative distribution, so that rounding of the logits changes a draw only at an interval's edge.

Shapes: B rows, V tokens of the vocabulary, K tokens that remain after top-k and top-p.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_align.rollout.types import Sampling

_MASK = (1 << 64) - 1


def uniforms(seed: int, key: int, sample: int, count: int) -> np.ndarray:
    """Return the random numbers in [0, 1) of positions 0 to ``count`` of a sample, fp64.

    Args:
        seed: of the run.
        key: of the prompt.
        sample: index of the completion among the prompt's.
        count: number of positions; fewer give a prefix of the same numbers.
    """
    # Positions count in the low words of the counter, so streams of other prompts and samples never meet.
    counter = np.array([0, 0, sample & _MASK, key & _MASK], dtype=np.uint64)
    raw = np.random.Philox(counter=counter, key=np.array([seed & _MASK, 0], dtype=np.uint64)).random_raw(
        count
    )
    return (raw >> np.uint64(11)) * 2.0**-53


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drawn tokens (int64) and their log-probs (fp32), ``[B]`` each.

    As in transformers: temperature first, then top-k, then top-p on what remains. Log-probs are of the full vocabulary
    at the temperature, before top-k and top-p.

    Args:
        logits_BV: any floating dtype.
        sampling: temperature, top_p and top_k are read.
        uniform_B: fp64 random numbers in [0, 1); not read when greedy.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature:
        logits_BV = logits_BV / sampling.temperature
    logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
    token_B = logits_BV.argmax(-1) if not sampling.temperature else _invert(logprobs_BV, sampling, uniform_B)
    return token_B, logprobs_BV.gather(1, token_B[:, None])[:, 0]


def _invert(logprobs_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """Return the token whose interval of the cumulative distribution holds the random number."""
    ids_BK = None
    if sampling.top_k and sampling.top_k < logprobs_BV.shape[1]:
        logprobs_BV, ids_BK = logprobs_BV.topk(sampling.top_k, dim=-1)
    elif sampling.top_p < 1:
        logprobs_BV, ids_BK = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    probs_BK = logprobs_BV.double().exp()
    if sampling.top_p < 1:  # sorted: keep each token before which less than top_p is reached
        probs_BK = probs_BK / probs_BK.sum(-1, keepdim=True)
        before_BK = probs_BK.cumsum(-1) - probs_BK
        kept_BK = before_BK < sampling.top_p
        kept_BK[:, 0] = True
        probs_BK = probs_BK.masked_fill(~kept_BK, 0.0)
    cumulative_BK = probs_BK.cumsum(-1)
    target_B = uniform_B.to(cumulative_BK.device) * cumulative_BK[:, -1]
    index_B = torch.searchsorted(cumulative_BK, target_B[:, None], right=True)[:, 0]
    index_B = index_B.clamp(max=probs_BK.shape[1] - 1)
    return index_B if ids_BK is None else ids_BK.gather(1, index_B[:, None])[:, 0]
