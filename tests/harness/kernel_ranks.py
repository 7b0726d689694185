"""Functions for the pool: the log-prob kernels with the vocabulary sharded over all ranks."""

from __future__ import annotations

import os

import torch

from megatron_align.config import ParallelConfig
from megatron_align.model import parallel
from megatron_align.training.watchdog import join_watched


def logprobs(
    rank_info: parallel.RankInfo,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
):
    """Return log-probs and both gradients, the vocabulary sharded over all ranks."""
    from megatron_align.kernels import token_logprobs

    weights = torch.arange(1, len(targets) + 1)
    return _values_and_gradients(
        rank_info,
        token_logprobs,
        (hidden, weight, targets),
        vocab_size,
        lambda values: (values * weights).sum(),
    )


def columns(
    rank_info: parallel.RankInfo,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    columns: torch.Tensor,
    vocab_size: int,
):
    """Return logits of given tokens and both gradients, the vocabulary sharded over all ranks."""
    from megatron_align.kernels import column_logits

    return _values_and_gradients(
        rank_info, column_logits, (hidden, weight, columns), vocab_size, lambda values: values.square().sum()
    )


def _values_and_gradients(rank_info, kernel, tensors, vocab_size, loss):
    hidden, weight, tokens = tensors
    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        group = parallel.groups().tp
        mine = weight.chunk(rank_info.world_size)[rank_info.rank].clone().requires_grad_()
        hidden = hidden.clone().requires_grad_()
        values = kernel(hidden, mine, tokens, group=group, vocab_size=vocab_size)
        loss(values).backward()
    parallel.leave()
    return values.detach(), hidden.grad, mine.grad


def slab_loss_grads(
    rank_info: parallel.RankInfo,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    slabs: list[tuple[int, int]],
    options: dict[str, float],
):
    """Return loss, summed and local hidden gradient, local weight gradient and sums; the vocabulary is sharded."""
    from megatron_align.kernels import slab_loss
    from tests.harness.logprobs import StatisticsLoss, gradients

    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        options = {"group": parallel.groups().tp, "vocab_size": vocab_size, "statistics": True, **options}
        mine = weight.chunk(rank_info.world_size)[rank_info.rank].clone().requires_grad_()
        tensors = (hidden.clone().requires_grad_(), mine, targets)
        (loss, summed, local_weight), sums = gradients(
            slab_loss, tensors, slabs, StatisticsLoss(slabs), **options
        )
        (_, local, _), _ = gradients(
            slab_loss, tensors, slabs, StatisticsLoss(slabs), sum_hidden_grad=False, **options
        )
    parallel.leave()
    return loss, summed, local, local_weight, sums


def scores(
    rank_info: parallel.RankInfo,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
):
    """Return token_scores with the full vocabulary as top k, sharded over all ranks."""
    from megatron_align.kernels import token_scores

    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        group, mine = parallel.groups().tp, weight.chunk(rank_info.world_size)[rank_info.rank]
        answer = token_scores(hidden, mine, targets, top_k=vocab_size, group=group, vocab_size=vocab_size)
    parallel.leave()
    return answer


def checked_logprobs(rank_info: parallel.RankInfo, rows: list[int]) -> str:
    """Return the error of token_logprobs, with value checks, for these numbers of vocabulary rows on the ranks."""
    from megatron_align.kernels import token_logprobs

    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        weight, targets = torch.zeros(rows[rank_info.rank], 4), torch.zeros(2, dtype=torch.int64)
        os.environ["MEGATRON_ALIGN_CHECKS"] = "1"
        try:
            token_logprobs(torch.zeros(2, 4), weight, targets, group=parallel.groups().tp)
            answer = "agreed"
        except ValueError as error:
            answer = str(error)
        finally:
            del os.environ["MEGATRON_ALIGN_CHECKS"]
    parallel.leave()
    return answer


def top_logits(
    rank_info: parallel.RankInfo, hidden: torch.Tensor, weight: torch.Tensor, top_k: int, vocab_size: int
):
    """Return the largest logits of each row and their tokens, the vocabulary sharded over all ranks."""
    from megatron_align.kernels import top_logits

    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        group, mine = parallel.groups().tp, weight.chunk(rank_info.world_size)[rank_info.rank]
        answer = top_logits(hidden, mine, top_k, group=group, vocab_size=vocab_size)
    parallel.leave()
    return answer
