"""The public function and its reference; PyTorch on CPUs, Triton on GPUs.

Shapes: Q tokens of this rank, H query heads and G key heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_align.kernels.dispatch import takes_triton


def rope(q_QHD: Tensor, k_QGD: Tensor, cos_QD: Tensor, sin_QD: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the two halves of each head (the layout of HF Llama weights) by the angles of its token, in fp32.

    Backward rotates the gradients by the negative angles and keeps the tables alone.

    Args:
        q_QHD: queries; strided ones are read where they lie if the last dimension is contiguous. On GPUs bf16, fp16 or
            fp32; on CPUs any float.
        k_QGD: keys, in the same dtype.
        cos_QD: of each token's angles, at the positions that it has in its document: fp32, contiguous, the second half
            of each row equal to the first.
        sin_QD: as ``cos_QD``.

    Returns:
        Queries and keys in their dtype. Differentiable once.

    Raises:
        ValueError: if shapes do not fit each other, or the kernels lack the dtype.
    """
    _check(q_QHD, k_QGD, cos_QD, sin_QD)
    if not takes_triton(q_QHD, "rope"):
        return rope_reference(q_QHD, k_QGD, cos_QD, sin_QD)
    rotated: tuple[Tensor, Tensor] = _Rope.apply(q_QHD, k_QGD, cos_QD, sin_QD)
    return rotated


def rope_reference(q_QHD: Tensor, k_QGD: Tensor, cos_QD: Tensor, sin_QD: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries and keys by PyTorch's own operations, in fp32 at least."""
    return _rotate(q_QHD, cos_QD, sin_QD), _rotate(k_QGD, cos_QD, sin_QD)


def _rotate(x_QHD: Tensor, cos_QD: Tensor, sin_QD: Tensor) -> Tensor:
    first, second = x_QHD.to(torch.promote_types(x_QHD.dtype, torch.float32)).chunk(2, dim=-1)
    turned_QHD = torch.cat([-second, first], dim=-1)
    return (x_QHD * cos_QD[:, None] + turned_QHD * sin_QD[:, None]).to(x_QHD.dtype)


def _check(q_QHD: Tensor, k_QGD: Tensor, cos_QD: Tensor, sin_QD: Tensor) -> None:
    tokens, _, dim = q_QHD.shape
    table, keys = (tokens, dim), (tokens, k_QGD.shape[1], dim)
    shapes = [tuple(x.shape) for x in (q_QHD, k_QGD, cos_QD, sin_QD)]
    if dim % 2 or shapes[1:] != [keys, table, table]:
        raise ValueError(f"rope needs q [Q, H, D], k [Q, G, D] and tables [Q, D] with D even; got {shapes}")
    if k_QGD.dtype != q_QHD.dtype:
        raise ValueError(f"rope needs q and k of one dtype; got {q_QHD.dtype} and {k_QGD.dtype}")
    if any(x.dtype != torch.float32 or not x.is_contiguous() for x in (cos_QD, sin_QD)):
        raise ValueError(f"rope needs contiguous tables in fp32; got {cos_QD.dtype} and {sin_QD.dtype}")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_QHD: Tensor, k_QGD: Tensor, cos_QD: Tensor, sin_QD: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Imported here: the CPU path must work without Triton.
        from megatron_align.kernels.rope.rope_kernels import rotate

        ctx.save_for_backward(cos_QD, sin_QD)
        return rotate(q_QHD, k_QGD, cos_QD, sin_QD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_QHD: Tensor, dk_QGD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from megatron_align.kernels.rope.rope_kernels import rotate

        return *rotate(dq_QHD, dk_QGD, *ctx.saved_tensors, back=True), None, None
