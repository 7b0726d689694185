"""Initial values of adapters: functions of seed, module and row, so that every layout has the same."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def uniform_row(seed: int, module: str, row: int, inputs: int) -> Tensor:
    """Return one row of a linear layer's A, ``[inputs]`` fp32 in +-1 / sqrt(inputs)."""
    return (2 * torch.rand(inputs, generator=_generator(seed, module, row)) - 1) / math.sqrt(inputs)


def normal_row(seed: int, module: str, row: int, size: int) -> Tensor:
    """Return one row of an embedding's B, ``[size]`` fp32 of the standard normal distribution."""
    return torch.randn(size, generator=_generator(seed, module, row))


def _generator(seed: int, module: str, row: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{module}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
