"""Allocate, launch, save: the kernels as one differentiable function.

Shapes: T tokens of a pack, H query heads, G key/value heads, D head dim. Saved for backward: the inputs, out, and the
log-sum-exp ``[H, T]``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_align.kernels.packed_attention.backward import dkdv_kernel, dq_kernel
from megatron_align.kernels.packed_attention.configs import Tile, Tiles, padded
from megatron_align.kernels.packed_attention.forward import forward_kernel
from megatron_align.kernels.packed_attention.layout import PackedLayout


def _place(x: Tensor):
    """Triton launches on the current device: make the tensor's own current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _options(tile: Tile, head_dim: int) -> dict[str, int]:
    sizes = {"BLOCK_Q": tile.queries, "BLOCK_K": tile.keys, "D": head_dim, "D_PADDED": padded(head_dim)}
    return {**sizes, "num_warps": tile.warps, "num_stages": tile.stages}


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913  # apply() takes no keywords
        ctx: FunctionCtx,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        layout: PackedLayout,
        scale: float,
        tiles: Tiles,
    ) -> Tensor:
        tokens, heads, head_dim = q_THD.shape
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        lse2_HT = torch.empty(heads, tokens, dtype=torch.float32, device=q_THD.device)
        with _place(q_THD):
            forward_kernel[(triton.cdiv(tokens, tiles.forward.queries), heads)](
                q_THD, k_TGD, v_TGD, out_THD, lse2_HT, *layout.intervals[:3],
                *_strides(q_THD, k_TGD, v_TGD, out_THD), tokens, scale * math.log2(math.e),
                heads // k_TGD.shape[1], **_options(tiles.forward, head_dim),
            )  # fmt: skip
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, out_THD, lse2_HT, *layout.intervals)
        ctx.scale, ctx.tiles = scale, tiles
        return out_THD

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_THD, k_TGD, v_TGD, out_THD, lse2_HT, *intervals = ctx.saved_tensors
        if dout_THD.stride(-1) != 1:  # for example the gradient of a sum: one number, expanded
            dout_THD = dout_THD.contiguous()
        tokens, heads, head_dim = q_THD.shape
        groups = k_TGD.shape[1]
        dq_THD = torch.empty_like(out_THD)
        dk_TGD, dv_TGD = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k_TGD, v_TGD))
        delta_HT = torch.empty_like(lse2_HT)
        numbers = (tokens, ctx.scale, ctx.scale * math.log2(math.e), heads // groups)
        with _place(q_THD):
            dq_kernel[(triton.cdiv(tokens, ctx.tiles.dq.queries), heads)](
                q_THD, k_TGD, v_TGD, out_THD, dout_THD, lse2_HT, delta_HT, dq_THD, *intervals[:3],
                *_strides(q_THD, k_TGD, v_TGD, out_THD, dout_THD), *numbers, **_options(ctx.tiles.dq, head_dim),
            )  # fmt: skip
            dkdv_kernel[(triton.cdiv(tokens, ctx.tiles.dkdv.keys), groups)](
                q_THD, k_TGD, v_TGD, dout_THD, lse2_HT, delta_HT, dk_TGD, dv_TGD, intervals[3],
                *_strides(q_THD, k_TGD, v_TGD, dout_THD, dk_TGD), *numbers, **_options(ctx.tiles.dkdv, head_dim),
            )  # fmt: skip
        return dq_THD, dk_TGD, dv_TGD, None, None, None


def _strides(*tensors: Tensor) -> list[int]:
    """Return the strides of tokens and heads, tensor after tensor."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def attend(  # noqa: PLR0913  # the public arguments and the tiles
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, scale: float, tiles: Tiles
) -> Tensor:
    """Run the kernels with these tiles. Arguments as :func:`packed_attention`, already checked."""
    return _PackedAttention.apply(q_THD, k_TGD, v_TGD, layout, scale, tiles)
