"""The public functions and their reference; PyTorch on CPUs, Triton on GPUs.

Shapes: R rows in any number of dimensions, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_align.kernels.dispatch import takes_triton


def rms_norm(x_RC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Return the root-mean-square norm of each row, in fp32, scaled in the input dtype as HF Llama does.

    On GPUs backward keeps the input and nothing else; on CPUs it is PyTorch's, and keeps what that does.

    Args:
        x_RC: rows in any number of dimensions; strided ones are read where they lie if columns are contiguous. On GPUs
            bf16, fp16 or fp32, and at most 16,384 columns; on CPUs any float.
        weight_C: on GPUs in the dtype of ``x_RC``. Its gradient is summed in fp32 with the same bits each time.
        eps: added to the mean square.

    Returns:
        Rows in the shape and dtype of ``x_RC``. Differentiable once. Zhang and Sennrich 2019 (arXiv 1910.07467).

    Raises:
        ValueError: on GPUs, if the kernels lack the dtype or the number of columns, or shapes do not fit.
    """
    if not takes_triton(x_RC, "rms_norm"):
        return rms_norm_reference(x_RC, weight_C, eps)
    _check(x_RC, weight_C)
    normalised_RC: Tensor = _Norm.apply(x_RC, weight_C, eps)
    return normalised_RC


def add_rms_norm(x_RC: Tensor, residual_RC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``residual + x`` and its norm, in one pass; backward, of both, is one too and keeps the sum.

    Args:
        x_RC: as :func:`rms_norm`.
        residual_RC: in the shape and dtype of ``x_RC``.
        weight_C: as :func:`rms_norm`.
        eps: as :func:`rms_norm`.

    Raises:
        ValueError: as :func:`rms_norm`.
    """
    if not takes_triton(x_RC, "add_rms_norm"):
        return add_rms_norm_reference(x_RC, residual_RC, weight_C, eps)
    _check(x_RC, weight_C)
    if (residual_RC.shape, residual_RC.dtype) != (x_RC.shape, x_RC.dtype):
        raise ValueError(
            f"add_rms_norm needs a residual of {tuple(x_RC.shape)} in {x_RC.dtype}; got {tuple(residual_RC.shape)} in "
            f"{residual_RC.dtype}"
        )
    both: tuple[Tensor, Tensor] = _AddNorm.apply(x_RC, residual_RC, weight_C, eps)
    return both


def rms_norm_reference(x_RC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Return the norm by PyTorch's own operations, in fp32 at least."""
    exact_RC = x_RC.to(torch.promote_types(x_RC.dtype, torch.float32))
    exact_RC = exact_RC * torch.rsqrt(exact_RC.square().mean(-1, keepdim=True) + eps)
    return weight_C * exact_RC.to(x_RC.dtype)


def add_rms_norm_reference(
    x_RC: Tensor, residual_RC: Tensor, weight_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the sum and its norm by PyTorch's own operations."""
    total_RC = residual_RC + x_RC
    return total_RC, rms_norm_reference(total_RC, weight_C, eps)


def _check(x_RC: Tensor, weight_C: Tensor) -> None:
    # Imported here: the CPU path must work without Triton.
    from megatron_align.kernels.rms_norm.rms_norm_kernels import MOST_COLUMNS

    if weight_C.shape != x_RC.shape[-1:] or weight_C.dtype != x_RC.dtype:
        raise ValueError(
            f"rms_norm needs a weight of {x_RC.shape[-1]} columns in {x_RC.dtype}; got {tuple(weight_C.shape)} in "
            f"{weight_C.dtype}"
        )
    if x_RC.shape[-1] > MOST_COLUMNS:
        raise ValueError(
            f"rms_norm needs at most {MOST_COLUMNS} columns on {x_RC.device}; got {x_RC.shape[-1]}"
        )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        from megatron_align.kernels.rms_norm.rms_norm_kernels import forward

        ctx.save_for_backward(x_RC, weight_C)
        ctx.eps = eps
        return forward(x_RC, None, weight_C, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_RC: Tensor) -> tuple[Tensor, Tensor | None, None]:
        from megatron_align.kernels.rms_norm.rms_norm_kernels import backward

        x_RC, weight_C = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        dx_RC, dweight_C = backward(x_RC, weight_C, dout_RC.contiguous(), None, ctx.eps, trained=trained)
        return dx_RC, dweight_C, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RC: Tensor, residual_RC: Tensor, weight_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from megatron_align.kernels.rms_norm.rms_norm_kernels import forward

        out_RC, total_RC = forward(x_RC, residual_RC, weight_C, eps)
        assert total_RC is not None, "a residual was given"
        ctx.save_for_backward(total_RC, weight_C)
        ctx.eps = eps
        return total_RC, out_RC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal_RC: Tensor, dout_RC: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        from megatron_align.kernels.rms_norm.rms_norm_kernels import backward

        total_RC, weight_C = ctx.saved_tensors
        dx_RC, dweight_C = backward(
            *(total_RC, weight_C, dout_RC.contiguous(), dtotal_RC.contiguous(), ctx.eps),
            trained=ctx.needs_input_grad[2],
        )
        return dx_RC, dx_RC, dweight_C, None
