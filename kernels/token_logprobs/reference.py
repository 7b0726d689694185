"""What the operations mean: plain PyTorch on full logits, one rank, any dtype. Every test compares against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# (number of the slab, its log-probs [n], its statistics by name) -> (its share of the loss, its sums to add up)
SlabFunction = Callable[[int, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


class TokenScores(NamedTuple):
    """What :func:`token_scores` tells of each row, fp32, in nats."""

    logprobs_N: Tensor  # of the target
    entropy_N: Tensor  # of the row's distribution
    log_sum_square_N: Tensor  # log of the sum of squared probabilities
    top_logprobs_NK: Tensor | None  # the K largest, descending; None unless asked for
    top_tokens_NK: Tensor | None  # int64, their tokens


def _log_softmax(hidden_NH: Tensor, weight_VH: Tensor, temperature: float, softcap: float | None) -> Tensor:
    exact = torch.promote_types(hidden_NH.dtype, torch.float32)
    logits_NV = (hidden_NH @ weight_VH.T).to(exact)
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    return (logits_NV / temperature).log_softmax(-1)


def token_logprobs_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Full-logits log-softmax, differentiable. Arguments as :func:`token_logprobs`."""
    logprobs_NV = _log_softmax(hidden_NH, weight_VH, temperature, softcap)
    return logprobs_NV.gather(1, targets_N[:, None])[:, 0]


def token_scores_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    top_k: int = 0,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenScores:
    """Everything :func:`token_scores` gives, from full logits. Arguments as there."""
    logprobs_NV = _log_softmax(hidden_NH, weight_VH, temperature, softcap)
    return TokenScores(
        logprobs_NV.gather(1, targets_N[:, None])[:, 0],
        -(logprobs_NV.exp() * logprobs_NV).sum(1),
        (2 * logprobs_NV).logsumexp(1),
        *(logprobs_NV.topk(top_k) if top_k else (None, None)),
    )


def slab_loss_reference(  # noqa: PLR0913  # as slab_loss
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    slabs: Sequence[tuple[int, int]],
    loss: SlabFunction,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum the loss of every slab, differentiable by autograd. Arguments as :func:`slab_loss`."""
    scores = token_scores_reference(hidden_NH, weight_VH, targets_N, temperature=temperature, softcap=softcap)
    total, totals = scores.logprobs_N.new_zeros(()), {}
    for i, (start, stop) in enumerate(slabs):
        rows = slice(start, stop)
        statistics = {"entropy": scores.entropy_N, "log_sum_square": scores.log_sum_square_N}
        detached = {name: values_N[rows].detach() for name, values_N in statistics.items()}
        value, sums = loss(i, scores.logprobs_N[rows], detached)
        total = total + value
        totals = {name: totals.get(name, 0) + amount.detach() for name, amount in sums.items()}
    return total, totals
