"""Rotary position embeddings (RoPE): frequencies with Llama-3.1's scaling, tables of explicit positions.

Shapes: Q tokens of this context-parallel rank, D head dim. ``kernels.rope`` rotates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama-3.1's frequency scaling: low frequencies divided by ``factor``, high ones unchanged, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return the rotary frequencies ``[head_dim / 2]`` in fp32, bit-identical to ``inv_freq`` of ``transformers``."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequency = 1.0 / (theta**exponent)
    if scaling is None:
        return frequency
    old, low, high = scaling.original_max_positions, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequency
    slowed = torch.where(wavelength > old / low, frequency / scaling.factor, frequency)
    ramp = (old / wavelength - low) / (high - low)
    between = (wavelength >= old / high) & (wavelength <= old / low)
    return torch.where(between, (1 - ramp) * slowed / scaling.factor + ramp * slowed, slowed)


def rope_tables(positions_Q: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``cos_QD, sin_QD`` of explicit positions in fp32; ``frequencies`` is ``[D / 2]`` on the same device."""
    angles_QD = torch.outer(positions_Q.float(), frequencies).repeat(1, 2)
    return angles_QD.cos(), angles_QD.sin()
