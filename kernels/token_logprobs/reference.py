"""Reference implementation: plain PyTorch on full logits, one rank, any dtype. Every test compares against it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatron_align.kernels.token_logprobs.options import LogitOptions, combine_sums

if TYPE_CHECKING:
    from typing_extensions import Unpack

# (index of the slab, its log-probs [n], its statistics by name) -> (its share of the loss, scalars to be summed)
SlabFunction = Callable[[int, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


class TokenScores(NamedTuple):
    """The result of :func:`token_scores`, per row, fp32, in nats."""

    logprobs_N: Tensor  # of the target
    entropy_N: Tensor  # of the row's distribution
    log_sum_square_N: Tensor  # log of the sum of squared probabilities
    top_logprobs_NK: Tensor | None  # the K largest, descending; None for top_k 0
    top_tokens_NK: Tensor | None  # their tokens, int64


def _logits(
    hidden_NH: Tensor, weight_VH: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> Tensor:
    exact = torch.promote_types(hidden_NH.dtype, torch.float32)
    logits_NV = (hidden_NH @ weight_VH.T).to(exact)
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    return logits_NV / temperature


def column_logits_reference(
    hidden_NH: Tensor, weight_VH: Tensor, columns_NK: Tensor, **options: Unpack[LogitOptions]
) -> Tensor:
    """Return the logits of given tokens from full logits, differentiable. Arguments as :func:`column_logits`."""
    return _logits(hidden_NH, weight_VH, **options).gather(1, columns_NK)


def token_logprobs_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    **options: Unpack[LogitOptions],
) -> Tensor:
    """Return log-probs from full logits, differentiable by autograd. Arguments as :func:`token_logprobs`."""
    logprobs_NV = _logits(hidden_NH, weight_VH, **options).log_softmax(-1)
    return logprobs_NV.gather(1, targets_N[:, None])[:, 0]


def token_scores_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    top_k: int = 0,
    **options: Unpack[LogitOptions],
) -> TokenScores:
    """Return log-probs, entropy, log sum p^2 and top k from full logits. Arguments as :func:`token_scores`."""
    logprobs_NV = _logits(hidden_NH, weight_VH, **options).log_softmax(-1)
    return TokenScores(
        logprobs_NV.gather(1, targets_N[:, None])[:, 0],
        -(logprobs_NV.exp() * logprobs_NV).sum(1),
        (2 * logprobs_NV).logsumexp(1),
        *(logprobs_NV.topk(top_k) if top_k else (None, None)),
    )


def slab_loss_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    slabs: Sequence[tuple[int, int]],
    loss: SlabFunction,
    *,
    entropy_gradient: bool = False,
    **options: Unpack[LogitOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed loss of all slabs from full logits, differentiable. Arguments as :func:`slab_loss`."""
    scores = token_scores_reference(hidden_NH, weight_VH, targets_N, **options)
    total = scores.logprobs_N.new_zeros(())
    totals: dict[str, Tensor] = {}
    for i, (start, stop) in enumerate(slabs):
        rows = slice(start, stop)
        statistics = {"entropy": scores.entropy_N, "log_sum_square": scores.log_sum_square_N}
        given = {name: values_N[rows].detach() for name, values_N in statistics.items()}
        if entropy_gradient:
            given["entropy"] = scores.entropy_N[rows]
        value, sums = loss(i, scores.logprobs_N[rows], given)
        total = total + value
        totals = {
            name: combine_sums(name, totals[name], amount.detach()) if name in totals else amount.detach()
            for name, amount in sums.items()
        }
    return total, totals
