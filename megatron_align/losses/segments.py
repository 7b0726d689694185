"""Sums, means and backward sums over the completions of a flat row of tokens.

Shapes: N scored tokens of C completions, one completion after the other; ``length_C`` (int64) tokens each, L of the
longest. Nothing is padded: a completion's result does not depend on what else is in the pack.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(values_N: Tensor, length_C: Tensor) -> Tensor:
    """Sum over each completion, ``[C]``, adding token after token; an empty one sums to 0."""
    return torch.segment_reduce(values_N, "sum", lengths=length_C, unsafe=True, initial=0)


def per_token(values_C: Tensor, length_C: Tensor) -> Tensor:
    """Repeat each completion's value for each of its tokens, ``[N]``."""
    return torch.repeat_interleave(values_C, length_C)


def tokens_left(length_C: Tensor) -> Tensor:
    """Return the number of tokens of the same completion that follow each token, ``[N]`` int64: 0 at the last one."""
    total = int(length_C.sum())
    return per_token(length_C.cumsum(0), length_C) - 1 - torch.arange(total, device=length_C.device)


def next_in_segment(values_N: Tensor, length_C: Tensor) -> Tensor:
    """Return the value at the next token of the same completion, ``[N]``; 0 at its last token."""
    following_N = torch.cat([values_N[1:], values_N.new_zeros(min(1, len(values_N)))])
    return following_N.masked_fill(tokens_left(length_C) == 0, 0.0)


def backward_sums(values_N: Tensor, length_C: Tensor, factor: float = 1.0) -> Tensor:
    """Return ``y_t = x_t + factor y_(t+1)`` within each completion, ``[N]`` fp64: discounted returns-to-go.

    A loop over L, so for numbers of a step that are computed once, without gradient.
    """
    left_N = tokens_left(length_C)
    which_N = per_token(torch.arange(len(length_C), device=length_C.device), length_C)
    longest = int(length_C.max()) if len(length_C) else 0
    padded_LC = values_N.new_zeros(longest, len(length_C), dtype=torch.float64)
    padded_LC[left_N, which_N] = values_N.double()  # row 0: each completion's last token
    for t in range(1, longest):
        padded_LC[t] += factor * padded_LC[t - 1]
    return padded_LC[left_N, which_N]


def suffix_sums(values_N: Tensor, length_C: Tensor) -> Tensor:
    """Return the sum from each token to the end of its completion, ``[N]`` fp64; without a loop over tokens."""
    values_N = values_N.double()
    before_N = values_N.cumsum(0) - values_N
    ends_C = values_N.cumsum(0)[length_C.cumsum(0).clamp(min=1) - 1] if len(values_N) else values_N
    return per_token(ends_C, length_C) - before_N
