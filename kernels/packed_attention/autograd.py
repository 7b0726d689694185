"""The Triton kernels as one differentiable function: allocation, launches, saved tensors.

Shapes: T tokens of a pack, Q queries, H query heads, G key/value heads, D head dim. Saved for backward: the inputs,
out, and the log-sum-exp ``[H, Q]``.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_align.kernels.packed_attention.backward_kernels import dkdv_kernel, dq_kernel
from megatron_align.kernels.packed_attention.forward_kernel import forward_kernel
from megatron_align.kernels.packed_attention.layout import PackedLayout
from megatron_align.kernels.packed_attention.tiles import Tile, Tiles, padded_head_dim


class _Call(NamedTuple):
    """Everything but the tensors of one call."""

    layout: PackedLayout
    scale: float
    tiles: Tiles


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, as Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _options(tile: Tile, head_dim: int) -> dict[str, int]:
    sizes = {
        "BLOCK_Q": tile.queries,
        "BLOCK_K": tile.keys,
        "D": head_dim,
        "D_PADDED": padded_head_dim(head_dim),
    }
    return {**sizes, "num_warps": tile.warps, "num_stages": tile.stages}


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, call: _Call) -> Tensor:
        layout, scale, tiles = call
        queries, heads, head_dim = q_QHD.shape
        out_QHD = torch.empty_like(q_QHD, memory_format=torch.contiguous_format)
        lse2_HQ = torch.empty(heads, queries, dtype=torch.float32, device=q_QHD.device)
        with _on_device(q_QHD):
            forward_kernel[(triton.cdiv(queries, tiles.forward.queries), heads)](
                q_QHD, k_TGD, v_TGD, out_QHD, lse2_HQ, *layout.by_query,
                *_strides(q_QHD, k_TGD, v_TGD, out_QHD), queries, k_TGD.shape[0], scale * math.log2(math.e),
                heads // k_TGD.shape[1], **_options(tiles.forward, head_dim),
            )  # fmt: skip
        ctx.save_for_backward(q_QHD, k_TGD, v_TGD, out_QHD, lse2_HQ, *layout.intervals)
        ctx.scale, ctx.tiles = scale, tiles
        return out_QHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_QHD: Tensor) -> tuple[Tensor | None, ...]:
        q_QHD, k_TGD, v_TGD, out_QHD, lse2_HQ, *intervals = ctx.saved_tensors
        if dout_QHD.stride(-1) != 1:  # for example the gradient of a sum: one expanded number
            dout_QHD = dout_QHD.contiguous()
        queries, heads, head_dim = q_QHD.shape
        tokens, groups, _ = k_TGD.shape
        dq_QHD = torch.empty_like(out_QHD)
        dk_TGD, dv_TGD = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k_TGD, v_TGD))
        delta_HQ = torch.empty_like(lse2_HQ)
        numbers = (queries, tokens, ctx.scale, ctx.scale * math.log2(math.e), heads // groups)
        with _on_device(q_QHD):
            dq_kernel[(triton.cdiv(queries, ctx.tiles.dq.queries), heads)](
                q_QHD, k_TGD, v_TGD, out_QHD, dout_QHD, lse2_HQ, delta_HQ, dq_QHD, *intervals[:4],
                *_strides(q_QHD, k_TGD, v_TGD, out_QHD, dout_QHD), *numbers, **_options(ctx.tiles.dq, head_dim),
            )  # fmt: skip
            dkdv_kernel[(triton.cdiv(tokens, ctx.tiles.dkdv.keys), groups)](
                q_QHD, k_TGD, v_TGD, dout_QHD, lse2_HQ, delta_HQ, dk_TGD, dv_TGD, *intervals[4:],
                *_strides(q_QHD, k_TGD, v_TGD, dout_QHD, dk_TGD), *numbers, **_options(ctx.tiles.dkdv, head_dim),
            )  # fmt: skip
        return dq_QHD, dk_TGD, dv_TGD, None


def _strides(*tensors: Tensor) -> list[int]:
    """Return the token and head strides of each tensor."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def attend(
    q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, scale: float, tiles: Tiles
) -> Tensor:
    """Run the kernels with these tiles. Arguments as :func:`packed_attention`, already validated."""
    return _PackedAttention.apply(q_QHD, k_TGD, v_TGD, _Call(layout, scale, tiles))
