"""Communication of context-parallel ranks: heads or keys inside attention, log-probs (or rewards) before the loss.

The tokens of a pack are sharded over the ranks (``data/batching/context_parts.py``). ``ulysses`` (Jacobs et al. 2023,
arXiv:2309.14509) exchanges tokens for heads by all-to-all before attention and back after it: each rank attends over
the entire pack with its share of the heads. ``allgather`` (Llama 3, arXiv:2407.21783, section 3.3.2) keeps queries
where they are and gathers keys and values.

A loss needs complete samples, whose rows are on several ranks. A log-prob is one number, so all are gathered: every
rank computes the complete loss, from the same numbers in the same order as one rank would, and takes the gradient of
the rows it holds. Objectives need no code for it.

Shapes: T tokens of a pack, Q = T / R of them on each of R context-parallel ranks; H query heads, G key/value heads and
X of both on this tensor-parallel rank, D head dim; N rows (or completions), n of them here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.kernels import PackedLayout
from megatron_align.records import ContextPart, LocalRows

Group = dist.ProcessGroup
# q_QHD, k_TGD, v_TGD, layout -> out_QHD
Attend = Callable[[Tensor, Tensor, Tensor, PackedLayout], Tensor]


def attend_over_ranks(
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: PackedLayout,
    part: ContextPart,
    group: Group,
    attend: Attend,
) -> Tensor:
    """Attend over a pack whose tokens are sharded over several ranks.

    Args:
        qkv: ``q_QHD``, ``k_QGD``, ``v_QGD`` of this rank's tokens.
        layout: of the entire pack.
        part: this rank's part of the pack.
        group: context-parallel ranks.
        attend: attention of one rank.

    Returns:
        ``out_QHD``.
    """
    if part.kind == "ulysses":
        return _ulysses(qkv, layout, group, attend)
    q_QHD, k_QGD, v_QGD = qkv
    kv_TXD = _GatherTokens.apply(torch.cat([k_QGD, v_QGD], 1), part.order_T, group)
    k_TGD, v_TGD = kv_TXD.chunk(2, dim=1)
    assert part.queries is not None, "allgather needs the layout of this rank's queries"
    return attend(q_QHD, k_TGD, v_TGD, part.queries)


def _ulysses(
    qkv: tuple[Tensor, Tensor, Tensor], layout: PackedLayout, group: Group, attend: Attend
) -> Tensor:
    q_QHD, k_QGD, v_QGD = qkv
    ranks = group.size()
    # Key/value heads that the ranks do not divide are replicated: each rank with queries for them gets a copy.
    copies = math.lcm(k_QGD.shape[1], ranks) // k_QGD.shape[1]
    k_QGD, v_QGD = (x.repeat_interleave(copies, dim=1) for x in (k_QGD, v_QGD))
    # One all-to-all for all three: rank r gets the r-th share of the heads of each.
    shares = [x.unflatten(1, (ranks, -1)) for x in (q_QHD, k_QGD, v_QGD)]
    heads = [share.shape[2] for share in shares]
    x_TXD = _SwapTokensForHeads.apply(torch.cat(shares, 2).flatten(1, 2), group)
    q_THD, k_TGD, v_TGD = x_TXD.split(heads, dim=1)
    out_THD = attend(q_THD, k_TGD, v_TGD, layout)
    return _SwapHeadsForTokens.apply(out_THD, group)


def _swap_tokens_for_heads(x_QXD: Tensor, group: Group) -> Tensor:
    """Return ``[T, X / R, D]``: the tokens of all ranks, in order of rank, with this rank's heads."""
    sent = x_QXD.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)


def _swap_heads_for_tokens(x_TXD: Tensor, group: Group) -> Tensor:
    """Invert :func:`_swap_tokens_for_heads`: return ``[Q, X R, D]``."""
    sent = x_TXD.unflatten(0, (group.size(), -1)).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.transpose(0, 1).flatten(1, 2)


class _SwapTokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_QXD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _swap_tokens_for_heads(x_QXD, group)

    @staticmethod
    def backward(ctx: Any, grad_TXD: Tensor) -> tuple[Tensor, None]:
        return _swap_heads_for_tokens(grad_TXD, ctx.group), None


class _SwapHeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TXD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _swap_heads_for_tokens(x_TXD, group)

    @staticmethod
    def backward(ctx: Any, grad_QXD: Tensor) -> tuple[Tensor, None]:
        return _swap_tokens_for_heads(grad_QXD, ctx.group), None


class _GatherTokens(torch.autograd.Function):
    """Gather the tokens of all ranks in the order of the pack; backward reduce-scatters their gradients."""

    @staticmethod
    def forward(ctx: Any, x_QXD: Tensor, order_T: Tensor, group: Group) -> Tensor:
        ctx.group = group
        ctx.save_for_backward(order_T)
        gathered = x_QXD.new_empty(order_T.shape[0], *x_QXD.shape[1:])
        dist.all_gather_into_tensor(gathered, x_QXD.contiguous(), group=group)
        return torch.empty_like(gathered).index_copy_(0, order_T, gathered)

    @staticmethod
    def backward(ctx: Any, grad_TXD: Tensor) -> tuple[Tensor, None, None]:
        [order_T] = ctx.saved_tensors
        grad_QXD = grad_TXD.new_empty(order_T.shape[0] // ctx.group.size(), *grad_TXD.shape[1:])
        dist.reduce_scatter_tensor(grad_QXD, grad_TXD[order_T], group=ctx.group)
        return grad_QXD, None, None


class _GatherRows(torch.autograd.Function):
    """Gather N rows, each held by one rank, on every rank.

    Every rank then computes the same loss, so the gradient of the rows it holds is complete without communication.
    """

    @staticmethod
    def forward(ctx: Any, values_n: Tensor, index_n: Tensor, size: int, group: Group) -> Tensor:
        ctx.save_for_backward(index_n)
        values_N = values_n.new_zeros(size, *values_n.shape[1:])
        values_N[index_n] = values_n
        dist.all_reduce(values_N, group=group)
        return values_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        [index_n] = ctx.saved_tensors
        return grad_N[index_n], None, None, None


def gather_rows(values_n: Tensor, index_n: Tensor, size: int, group: Group) -> Tensor:
    """Gather the rows of all ranks: ``[N, ...]`` on every rank, bit-identical.

    Args:
        values_n: ``[n, ...]`` of this rank.
        index_n: index of each among the N; every index is on exactly one rank.
        size: N.
        group: context-parallel ranks.
    """
    return _GatherRows.apply(values_n, index_n, size, group)


class ContextSlabs:
    """The slabs of a pack's rows, sharded over context-parallel ranks.

    Args:
        sizes: number of rows of each slab, in order.
        held: the rows that this rank holds; None: all (no context parallelism).
        group: context-parallel ranks.
    """

    def __init__(self, sizes: Sequence[int], held: LocalRows | None, group: Group):
        self._held, self._group = held, group
        self._bounds = np.cumsum([0, *sizes])
        local = self._bounds if held is None else np.searchsorted(held.host_number_n, self._bounds)
        self.ranges = list(pairwise(local.tolist()))  # [start, stop) of each slab among this rank's rows

    def gather(self, i: int, values_n: Tensor) -> Tensor:
        """Return the values of all rows of slab ``i``, given those of this rank's rows."""
        if self._held is None:
            return values_n
        start, stop = self._bounds[i : i + 2].tolist()
        index_n = self._held.number_n[slice(*self.ranges[i])] - start
        return gather_rows(values_n, index_n, stop - start, self._group)
