"""Dropout of an adapter's input whose mask is a function of token, module and feature, whatever the layout.

No generator has a state: forward, backward and recomputation compute the same mask again, and nothing of it is saved.
Inputs that tensor-parallel ranks replicate get the same mask on each; of sharded ones each rank draws its part.

Shapes: S tokens of the input on this rank, I its features on this rank, R rank of the adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_MULTIPLIERS = (
    0x7FEB352D,
    0x2C1B3C6D,
    0x297A2D39,
)  # of integer hashes that were found by search, C. Wellons 2018
_current: list[Tensor | None] = [None]


@contextmanager
def dropout_keys(keys_Q: Tensor | None) -> Iterator[None]:
    """Compute with the keys of a pack's tokens inside a with-block; None: nothing is dropped."""
    before, _current[0] = _current[0], keys_Q
    try:
        yield
    finally:
        _current[0] = before


def current_keys() -> Tensor | None:
    """Return the keys of the pack that is computed: int64 ``[Q]``, of the tokens of this context-parallel rank."""
    return _current[0]


def feature_keys(module: str, features: Tensor) -> Tensor:
    """Return two int32 numbers for each feature of a module's input, ``[2, I]``, on the device of ``features``.

    Args:
        module: Hugging Face name.
        features: int64 ``[I]``, indices in the input of the complete module.
    """
    digest = hashlib.sha256(module.encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:8], "little"))
    drawn = generator.random_raw(int(features.max()) + 1).view(np.int32).reshape(-1, 2)
    return torch.from_numpy(drawn).to(features.device)[features].T.contiguous()


def _dropped(input_: Tensor, keys_S: Tensor, features_2I: Tensor, probability: float) -> Tensor:
    """Return ``input_ [S, 1, I]`` with elements set to 0 at this probability, others divided by 1 - probability."""
    low_S, high_S = keys_S.to(torch.int32), (keys_S >> 32).to(torch.int32)
    hash_SI = low_S[:, None] ^ features_2I[0]
    hash_SI.mul_(_MULTIPLIERS[0])
    hash_SI.bitwise_xor_((hash_SI >> 15) & 0x1FFFF)  # the shift of int32 keeps the sign
    hash_SI.add_(high_S[:, None]).bitwise_xor_(features_2I[1])
    hash_SI.mul_(_MULTIPLIERS[1])
    hash_SI.bitwise_xor_((hash_SI >> 12) & 0xFFFFF)
    hash_SI.mul_(_MULTIPLIERS[2])
    hash_SI.bitwise_xor_((hash_SI >> 15) & 0x1FFFF)
    kept_SI = hash_SI >= round(probability * 2**32) - 2**31
    return torch.where(kept_SI[:, None], input_ * (1 / (1 - probability)), 0)


class _DroppedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_: Tensor, a_RI: Tensor, keys_S: Tensor, features_2I: Tensor, probability: float
    ) -> Tensor:
        ctx.save_for_backward(input_, a_RI, keys_S, features_2I)
        ctx.probability = probability
        return F.linear(_dropped(input_, keys_S, features_2I, probability), a_RI)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        input_, a_RI, keys_S, features_2I = ctx.saved_tensors
        d_input = d_a = None
        if ctx.needs_input_grad[0]:
            d_input = _dropped(grad @ a_RI, keys_S, features_2I, ctx.probability)
        if ctx.needs_input_grad[1]:
            dropped = _dropped(input_, keys_S, features_2I, ctx.probability)
            d_a = grad.flatten(0, 1).T @ dropped.flatten(0, 1)
        return d_input, d_a, None, None, None


def dropped_linear(
    input_: Tensor, a_RI: Tensor, keys_S: Tensor, features_2I: Tensor, probability: float
) -> Tensor:
    """Return ``dropout(input_) A^T``, ``[S, 1, R]``.

    Args:
        input_: ``[S, 1, I]``.
        a_RI: A.
        keys_S: int64, of the tokens.
        features_2I: of :func:`feature_keys`.
        probability: that an element is dropped.
    """
    return _DroppedLinear.apply(input_, a_RI, keys_S, features_2I, probability)
