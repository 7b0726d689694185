"""What context-parallel ranks exchange: heads or keys inside attention, log-probs (or rewards) before the loss.

A pack's tokens are dealt out over the ranks (``data.context``). ``ulysses`` (Jacobs et al. 2023, arXiv:2309.14509)
swaps them for heads before attention and back after it: each rank attends over the whole pack with its share of the
heads. ``allgather`` (Llama 3, arXiv:2407.21783, section 3.3.2) leaves queries where they are and gathers keys and
values.

A loss needs whole samples, whose rows lie on several ranks. A log-prob is one number, so all are gathered: every rank
computes the whole loss, from the same numbers in the same order as one rank would, and takes the gradient of its own
rows. No objective knows of it.

Shapes: T tokens of a pack, Q = T / R of them on each of R context-parallel ranks; H query heads, G key/value heads and
X of both on this tensor-parallel rank, D head dim; N rows (or completions), n of them here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.kernels import PackedLayout, packed_attention
from megatron_align.records import ContextPart, Held

Group = dist.ProcessGroup


def attend_over_ranks(
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: PackedLayout,
    part: ContextPart,
    group: Group,
    scale: float | None,
) -> Tensor:
    """Attend with tokens that lie on several ranks.

    Args:
        qkv: of this rank's tokens: ``q_QHD``, ``k_QGD``, ``v_QGD``.
        layout: of the whole pack.
        part: this rank's, of the same pack.
        group: context-parallel ranks.
        scale: as in ``packed_attention``.

    Returns:
        ``out_QHD``.
    """
    if part.kind == "ulysses":
        return _over_heads(*qkv, layout, group, scale)
    q_QHD, k_QGD, v_QGD = qkv
    kv_TXD = _GatherTokens.apply(torch.cat([k_QGD, v_QGD], 1), part.order_T, group)
    return packed_attention(q_QHD, *kv_TXD.chunk(2, dim=1), part.queries, scale=scale)


def _over_heads(  # noqa: PLR0913 - an attention's arguments and who shares it
    q_QHD: Tensor, k_QGD: Tensor, v_QGD: Tensor, layout: PackedLayout, group: Group, scale: float | None
) -> Tensor:
    ranks = group.size()
    # Key/value heads that the ranks do not divide are sent to each rank that has queries for them.
    copies = math.lcm(k_QGD.shape[1], ranks) // k_QGD.shape[1]
    k_QGD, v_QGD = (x.repeat_interleave(copies, dim=1) for x in (k_QGD, v_QGD))
    # One message for all three: rank r gets the r-th share of the heads of each.
    shares = [x.unflatten(1, (ranks, -1)) for x in (q_QHD, k_QGD, v_QGD)]
    heads = [share.shape[2] for share in shares]
    x_TXD = _SwapTokensForHeads.apply(torch.cat(shares, 2).flatten(1, 2), group)
    out_THD = packed_attention(*x_TXD.split(heads, dim=1), layout, scale=scale)
    return _SwapHeadsForTokens.apply(out_THD, group)


def _swap_tokens_for_heads(x_QXD: Tensor, group: Group) -> Tensor:
    """Return ``[T, X / R, D]``: all ranks' tokens, one rank after the other, with this rank's heads."""
    sent = x_QXD.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)


def _swap_heads_for_tokens(x_TXD: Tensor, group: Group) -> Tensor:
    """Return ``[Q, X R, D]``: undo :func:`_swap_tokens_for_heads`."""
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
    """All ranks' tokens in the pack's order; their gradients are summed over the ranks that used them."""

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


class _FromAllRanks(torch.autograd.Function):
    """Each of N numbers from the one rank that has it, on every rank.

    Every rank then computes the same loss, so the gradient of its own numbers is complete where it is.
    """

    @staticmethod
    def forward(ctx: Any, values_n: Tensor, number_n: Tensor, size: int, group: Group) -> Tensor:
        ctx.save_for_backward(number_n)
        values_N = values_n.new_zeros(size, *values_n.shape[1:])
        values_N[number_n] = values_n
        dist.all_reduce(values_N, group=group)
        return values_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        [number_n] = ctx.saved_tensors
        return grad_N[number_n], None, None, None


def from_all_ranks(values_n: Tensor, number_n: Tensor, size: int, group: Group) -> Tensor:
    """Return ``[N, ...]`` on every rank, bit by bit as each was.

    Args:
        values_n: ``[n, ...]`` of this rank.
        number_n: which of the N they are; every number is on exactly one rank.
        size: N.
        group: context-parallel ranks.
    """
    return _FromAllRanks.apply(values_n, number_n, size, group)


class SpreadSlabs:
    """Slabs of a pack's rows, whose values this rank has all, or only its own.

    Args:
        sizes: rows of each slab, in order.
        held: which rows are this rank's; None: all.
        group: context-parallel ranks.
    """

    def __init__(self, sizes: Sequence[int], held: Held | None, group: Group):
        self._held, self._group = held, group
        self._bounds = np.cumsum([0, *sizes])
        own = self._bounds if held is None else np.searchsorted(held.host_number_n, self._bounds)
        self.ranges = list(pairwise(own.tolist()))  # of each slab's rows among this rank's

    def whole(self, i: int, values_n: Tensor) -> Tensor:
        """Return the values of all of slab ``i``'s rows."""
        if self._held is None:
            return values_n
        start, stop = self._bounds[i : i + 2].tolist()
        number_n = self._held.number_n[slice(*self.ranges[i])] - start
        return from_all_ranks(values_n, number_n, stop - start, self._group)
