"""Triton kernels of SwiGLU: each element is read once and written once; computed in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of one program
WARPS = 4


@triton.jit
def _forward_kernel(gate_up_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up_ptr + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(gate_up_ptr, dout_ptr, grad_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up_ptr + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    activated = gate * sigmoid
    dgate = dout * up * (sigmoid + activated * (1.0 - sigmoid))
    dtype = grad_ptr.dtype.element_ty
    tl.store(grad_ptr + row * 2 * F + column, dgate.to(dtype), mask=inside)
    tl.store(grad_ptr + row * 2 * F + F + column, (dout * activated).to(dtype), mask=inside)


def forward(gate_up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, ``[..., F]``, of a contiguous ``[..., 2 F]``."""
    columns = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], columns)
    if out.numel():
        with torch.cuda.device_of(gate_up):  # Triton launches on the current device
            _forward_kernel[_grid(out)](gate_up, out, columns, BLOCK=BLOCK, num_warps=WARPS)
    return out


def backward(gate_up: Tensor, dout: Tensor) -> Tensor:
    """Return the gradient ``[..., 2 F]`` of the projection, given that of the product, contiguous."""
    columns = gate_up.shape[-1] // 2
    grad = torch.empty_like(gate_up)
    if grad.numel():
        with torch.cuda.device_of(gate_up):
            _backward_kernel[_grid(dout)](gate_up, dout, grad, columns, BLOCK=BLOCK, num_warps=WARPS)
    return grad


def _grid(product: Tensor) -> tuple[int, int]:
    columns = product.shape[-1]
    return product.numel() // columns, triton.cdiv(columns, BLOCK)
