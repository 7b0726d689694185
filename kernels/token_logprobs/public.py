"""The public functions of the log-prob engine: they validate their arguments and start the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_align.kernels.token_logprobs.autograd import SlabLoss, TokenLogprobs
from megatron_align.kernels.token_logprobs.columns import ColumnLogits, check_columns
from megatron_align.kernels.token_logprobs.options import GradientOptions, HeadOptions
from megatron_align.kernels.token_logprobs.reference import SlabFunction, TokenScores
from megatron_align.kernels.token_logprobs.scores import score, top_logits_of
from megatron_align.kernels.token_logprobs.slab_loop import SlabLossCall, check_slabs
from megatron_align.kernels.token_logprobs.vocab_shard import open_shard

if TYPE_CHECKING:
    from typing_extensions import Unpack


def token_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, **options: Unpack[GradientOptions]
) -> Tensor:
    """Return the log-probability of each target, in nats.

    Differentiable, for callers whose loss is not known at forward time: backward recomputes the logits, 8 NHV in total.
    Training uses :func:`slab_loss`, at 6 NHV.

    Args:
        hidden_NH: ``[N, H]``, identical on every rank of ``group``; its gradient is complete on each
            (see ``sum_hidden_grad``).
        weight_VH: ``[V, H]``, this rank's rows of the vocabulary projection, equally many on every rank.
        targets_N: ``[N]`` int64 in ``[0, vocab_size)``; not checked on GPU, as that would synchronise
            (with ``MEGATRON_ALIGN_CHECKS=1`` it is, and so are non-finite hidden states).
        options: ``group=None``, ``temperature=1.0``, ``softcap=None``, ``vocab_size=None``, ``sum_hidden_grad=True``;
            described in ``options.py``.

    Returns:
        ``[N]`` fp32 (fp64 for fp64 inputs), not reduced. N = 0 is allowed.

    Raises:
        ValueError: on shapes, dtypes or options that do not fit, or, on CPU, targets outside the vocabulary.
    """
    shard = open_shard(hidden_NH, weight_VH, targets_N, **options)
    return TokenLogprobs.apply(hidden_NH, weight_VH, targets_N, shard)


def column_logits(
    hidden_NH: Tensor, weight_VH: Tensor, columns_NK: Tensor, **options: Unpack[GradientOptions]
) -> Tensor:
    """Return the logits of K given tokens of each row: a teacher's top k, for a divergence over them.

    Differentiable, 6 NHV in total; of the logits of a slab only these columns are kept. A teacher's tokens and logits
    come from :func:`top_logits`.

    Args:
        hidden_NH: as :func:`token_logprobs`.
        weight_VH: as :func:`token_logprobs`.
        columns_NK: ``[N, K]`` int64 in ``[0, vocab_size)``, 1 to ``vocab_size`` of them, the same on every rank; values
            are checked on CPU only.
        options: as :func:`token_logprobs`.

    Returns:
        ``[N, K]`` fp32 (fp64 for fp64 inputs), the same on every rank of ``group``.

    Raises:
        ValueError: as :func:`token_logprobs`, and on columns.
    """
    first_N = torch.zeros(hidden_NH.shape[:1], dtype=torch.int64, device=hidden_NH.device)
    shard = open_shard(hidden_NH, weight_VH, first_N, **options)
    check_columns(hidden_NH, columns_NK, shard)
    return ColumnLogits.apply(hidden_NH, weight_VH, columns_NK, shard)


@torch.no_grad()
def top_logits(
    hidden_NH: Tensor, weight_VH: Tensor, top_k: int, **options: Unpack[HeadOptions]
) -> tuple[Tensor, Tensor]:
    """Return the ``top_k`` largest logits of each row, descending, and their tokens, in one pass of 2 NHV.

    Without gradients. Of tokens with equal logits the lower ones are taken, and come first, on any number of ranks. The
    logits have the bits that :func:`column_logits` gives for these rows, weights and tokens.

    Args:
        hidden_NH: as :func:`token_logprobs`.
        weight_VH: as :func:`token_logprobs`.
        top_k: 1 to ``vocab_size``.
        options: as :func:`token_scores`.

    Returns:
        ``[N, K]`` fp32 (fp64 for fp64 inputs) and ``[N, K]`` int64, the same on every rank of ``group``.

    Raises:
        ValueError: as :func:`token_logprobs`, and on ``top_k``.
    """
    first_N = torch.zeros(hidden_NH.shape[:1], dtype=torch.int64, device=hidden_NH.device)
    shard = open_shard(hidden_NH, weight_VH, first_N, **options, sum_hidden_grad=False)
    if not 1 <= top_k <= shard.tokens:
        raise ValueError(f"top_logits needs 1 <= top_k <= {shard.tokens}, the vocabulary; got {top_k}")
    return top_logits_of(hidden_NH, shard, top_k)


@torch.no_grad()
def token_scores(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    top_k: int = 0,
    **options: Unpack[HeadOptions],
) -> TokenScores:
    """Return log-prob, entropy, log sum p^2 and the ``top_k`` largest log-probs of each row, in one pass of 2 NHV.

    Without gradients.

    Args:
        hidden_NH: as :func:`token_logprobs`.
        weight_VH: as :func:`token_logprobs`.
        targets_N: as :func:`token_logprobs`.
        top_k: 0 to 1,000 and at most ``vocab_size``; 0: none.
        options: ``group=None``, ``temperature=1.0``, ``softcap=None``, ``vocab_size=None``; see ``options.py``.

    Raises:
        ValueError: as :func:`token_logprobs`, and on ``top_k``.
    """
    shard = open_shard(hidden_NH, weight_VH, targets_N, **options, sum_hidden_grad=False)
    if not 0 <= top_k <= min(1000, shard.tokens):
        raise ValueError(f"token_scores needs 0 <= top_k <= {min(1000, shard.tokens)}; got {top_k}")
    return score(hidden_NH, targets_N, shard, top_k)


def slab_loss(  # noqa: PLR0913 - options that are independent of each other
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    slabs: Sequence[tuple[int, int]],
    loss: SlabFunction,
    *,
    statistics: bool = False,
    entropy_gradient: bool = False,
    **options: Unpack[GradientOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the summed loss of all slabs and compute its gradients on the way: 6 NHV in total.

    Each slab is projected, reduced to log-probs, passed to ``loss``, and overwritten by its gradient. Peak memory is
    one slab, whatever N. A slab of more than :func:`slab_rows` rows is projected twice (8 NHV), but for its last piece.

    The gradients are computed in forward, for an upstream gradient of 1: backward refuses any other (on GPUs by a
    device assertion). If the weight has an fp32 ``main_grad`` they are added to it in forward, so a call with gradients
    enabled must be followed by its backward; evaluate under ``torch.no_grad()``.

    Args:
        hidden_NH: as :func:`token_logprobs`.
        weight_VH: as :func:`token_logprobs`. A frozen one (``requires_grad`` False) costs no GEMM.
        targets_N: as :func:`token_logprobs`.
        slabs: ``(start, stop)`` of each slab, on the host, in order and without gaps, covering all N rows. A loss that
            is not a sum over rows needs complete samples in each. May be empty, and contain empty slabs.
        loss: ``loss(i, logprobs_n, statistics)`` returns slab ``i``'s share of the loss, a scalar already normalised,
            and detached scalars by name, the same names for every slab. It is called once for each slab, in order,
            on every rank with the same log-probs.
        statistics: also pass the rows' detached ``entropy`` and ``log_sum_square`` to ``loss``; else its dict is empty.
        entropy_gradient: of a loss that is differentiated by ``entropy`` too, which then has a gradient; with
            ``statistics``. No further pass: the gradient is added where the logits are overwritten.
        options: as :func:`token_logprobs`.

    Returns:
        The loss, a scalar in fp32 (fp64), and the sums by name of the scalars that ``loss`` returned, with
        ``recomputed_samples``: number of slabs that were projected twice.

    Raises:
        ValueError: as :func:`token_logprobs`, and on slabs that do not cover the rows.
    """
    if entropy_gradient and not statistics:
        raise ValueError(
            "slab_loss passes the entropy to the loss with statistics=True, got entropy_gradient without"
        )
    shard = open_shard(hidden_NH, weight_VH, targets_N, **options)
    check_slabs(slabs, hidden_NH.shape[0])
    call = SlabLossCall(
        shard=shard,
        targets_N=targets_N,
        slabs=slabs,
        loss=loss,
        training=torch.is_grad_enabled(),
        statistics=statistics,
        entropy_gradient=entropy_gradient,
    )
    return SlabLoss.apply(hidden_NH, weight_VH, call), call.sums
