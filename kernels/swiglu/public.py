"""The public function and its reference; PyTorch on CPUs, Triton on GPUs.

Shapes: T rows, F columns of the feed-forward network on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_align.kernels.dispatch import takes_triton


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` of a joined projection; backward keeps the projection and nothing else.

    Args:
        gate_up: ``[..., 2 F]``, gate before up; contiguous. On GPUs bf16, fp16 or fp32, computed in fp32 and rounded
            once; on CPUs any float, each product rounded.

    Returns:
        ``[..., F]`` in the same dtype. Differentiable once.

    Raises:
        ValueError: if the last dimension is odd, the tensor is not contiguous, or the kernels lack the dtype.
    """
    if gate_up.shape[-1] % 2 or not gate_up.is_contiguous():
        shape = f"{tuple(gate_up.shape)} with strides {gate_up.stride()}"
        raise ValueError(f"swiglu needs a contiguous tensor [..., 2 F]; got {shape}")
    product: Tensor = _SwiGLU.apply(gate_up)
    return product


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Return the same by PyTorch's own operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        if takes_triton(gate_up, "swiglu"):
            # Imported here: the CPU path must work without Triton.
            from megatron_align.kernels.swiglu.swiglu_kernels import forward

            return forward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if takes_triton(gate_up, "swiglu"):
            from megatron_align.kernels.swiglu.swiglu_kernels import backward

            return backward(gate_up, dout.contiguous())
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)
        dgate, dup = grad.chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(dout, activated, out=dup)
        torch.mul(dout, up, out=activated)
        torch.ops.aten.silu_backward.grad_input(activated, gate, grad_input=dgate)
        return grad
