"""Which tensors the Triton kernels take; every operation of this folder decides by this function."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), then on CPU tensors as well."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes_triton(x: Tensor, operation: str) -> bool:
    """Return whether the Triton kernels of an operation take a tensor: on GPUs, and anywhere in Triton's interpreter.

    All other tensors go to PyTorch's own operations; on a GPU nothing does.

    Raises:
        ValueError: for a dtype that the kernels lack, and in the interpreter for bf16, which it computes wrongly.
    """
    interpreted = is_interpreted()
    if not (x.is_cuda or interpreted):
        return False
    if interpreted and x.dtype == torch.bfloat16:
        raise ValueError(
            f"{operation} needs fp32 or fp16 under TRITON_INTERPRET=1; got bf16, whose bit patterns Triton's "
            "interpreter multiplies as integers"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"{operation} needs bf16, fp16 or fp32 on {x.device}; got {x.dtype}")
    return True
