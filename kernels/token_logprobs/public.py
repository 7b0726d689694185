"""The only names other modules import. Check once, say what is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.kernels.token_logprobs.autograd import Job, SlabLoss, TokenLogprobs
from megatron_align.kernels.token_logprobs.head import check_slabs, open_head
from megatron_align.kernels.token_logprobs.reference import SlabFunction, TokenScores
from megatron_align.kernels.token_logprobs.scores import score

# One op, its options by keyword: more arguments than elsewhere.
# ruff: noqa: PLR0913


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    sum_hidden_grad: bool = True,
) -> Tensor:
    """Return the log-probability of each target, in nats.

    Differentiable for callers whose loss is not known at forward time: backward makes the logits again, 8 NHV in all.
    Training goes through :func:`slab_loss`, at 6 NHV.

    Args:
        hidden_NH: ``[N, H]``, the same on every rank of ``group``; its gradient is complete on each
            (see ``sum_hidden_grad``).
        weight_VH: ``[V, H]``, this rank's rows of the vocabulary projection, as many on every rank.
        targets_N: ``[N]`` int64 in ``[0, vocab_size)``; not checked on GPU, as that would synchronise
            (``MEGATRON_ALIGN_CHECKS=1`` does, and looks for hidden states that are not finite).
        group: the vocab-parallel ranks; None: this rank has the whole vocabulary.
        temperature: the logits are divided by it.
        softcap: the projection is bent to ``softcap * tanh(x / softcap)`` first (Gemma 2); None: it is not.
        vocab_size: rows that count; rows from there on are padding. Default: all rows of all ranks.
        sum_hidden_grad: the gradient of ``hidden_NH`` is summed over ``group``. False: each rank gets its own
            vocabulary's share and the caller sums (sequence parallel does, while it scatters).

    Returns:
        ``[N]`` fp32 (fp64 for fp64 inputs), not reduced. N = 0 is allowed.

    Raises:
        ValueError: on shapes, dtypes or options that do not fit, or, on CPU, targets outside the vocabulary.
    """
    head = open_head(
        hidden_NH,
        weight_VH,
        targets_N,
        group=group,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
    )
    sum_over = group if sum_hidden_grad and head.ranks > 1 else None
    return TokenLogprobs.apply(hidden_NH, weight_VH, targets_N, head, sum_over)


@torch.no_grad()
def token_scores(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    top_k: int = 0,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> TokenScores:
    """Return log-prob, entropy, log sum p^2 and the ``top_k`` largest log-probs of each row, in one pass of 2 NHV.

    Without gradients. Arguments as :func:`token_logprobs`, and

    Args:
        top_k: 0 to 1,000 and at most ``vocab_size``; 0: none.

    Raises:
        ValueError: as :func:`token_logprobs`, and on ``top_k``.
    """
    head = open_head(
        hidden_NH,
        weight_VH,
        targets_N,
        group=group,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
    )
    if not 0 <= top_k <= min(1000, head.vocab_size):
        raise ValueError(f"token_scores needs 0 <= top_k <= {min(1000, head.vocab_size)}; got {top_k}")
    return score(hidden_NH, targets_N, head, top_k)


def slab_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    slabs: Sequence[tuple[int, int]],
    loss: SlabFunction,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    statistics: bool = False,
    sum_hidden_grad: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed loss of all slabs, whose gradients are made along the way: 6 NHV in all.

    Each slab is projected, reduced to log-probs, given to ``loss``, overwritten by its gradient, and gone. The peak
    is one slab, whatever N. A slab of over :func:`slab_rows` rows is projected twice (8 NHV), but for its last piece.

    The gradients are made in forward, for an upstream gradient of 1: backward refuses any other (on GPUs by a device
    assertion). Where the weight has an fp32 ``main_grad`` they are added to it in forward, so a call with gradients
    enabled must be followed by its backward; evaluate under ``torch.no_grad()``.

    Args:
        hidden_NH: as :func:`token_logprobs`.
        weight_VH: as :func:`token_logprobs`. A frozen one (``requires_grad`` False) costs no GEMM.
        targets_N: as :func:`token_logprobs`.
        slabs: ``(start, stop)`` of each slab, on the host, one after the other, covering all N rows. A loss that
            is not a sum over rows needs whole samples in each. May be empty, and hold empty slabs.
        loss: ``loss(i, logprobs_n, statistics)`` returns slab ``i``'s share of the loss, a scalar already normalised,
            and detached scalars by name, the same names for every slab. It is called once for each slab, in order,
            on every rank with the same log-probs.
        group: as :func:`token_logprobs`.
        temperature: as :func:`token_logprobs`.
        softcap: as :func:`token_logprobs`.
        vocab_size: as :func:`token_logprobs`.
        statistics: hand ``loss`` the rows' detached ``entropy`` and ``log_sum_square`` too; else the dict is empty.
        sum_hidden_grad: as :func:`token_logprobs`.

    Returns:
        The loss, a scalar in fp32 (fp64), and the sums of what ``loss`` returned by name, with
        ``recomputed_samples``: slabs that were projected twice.

    Raises:
        ValueError: as :func:`token_logprobs`, and on slabs that do not cover the rows.
    """
    head = open_head(
        hidden_NH,
        weight_VH,
        targets_N,
        group=group,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
    )
    check_slabs(slabs, hidden_NH.shape[0])
    job = Job(
        head=head,
        targets_N=targets_N,
        slabs=slabs,
        loss=loss,
        training=torch.is_grad_enabled(),
        statistics=statistics,
        sum_hidden_over=group if sum_hidden_grad and head.ranks > 1 else None,
    )
    return SlabLoss.apply(hidden_NH, weight_VH, job), job.sums
