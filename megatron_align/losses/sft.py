"""Supervised fine-tuning: the negative log-likelihood of the trained tokens.

Shapes: N scored rows.
"""

from torch import Tensor


def sft_loss(logprobs_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return ``-weight * logprob`` of each row, ``[N]`` fp32, in nats.

    Not reduced. The weights hold the global normaliser, so the sum over every row of the step's global batch
    is the step's loss, however rows fall over packs and ranks.
    """
    return -weight_N * logprobs_N
