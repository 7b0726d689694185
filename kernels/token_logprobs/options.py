"""Keyword options that the functions of the log-prob engine share."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist

MAXIMUM = "_max"  # a sum of a loss whose name ends so is a maximum: its parts combine by the larger one


def combine_sums(name: str, one: Tensor, other: Tensor) -> Tensor:
    """Return a loss's sum of this name over two parts of the rows."""
    return torch.maximum(one, other) if name.endswith(MAXIMUM) else one + other


class LogitOptions(TypedDict, total=False):
    """How logits come from the projection ``hidden @ weight.T``.

    Keys:
        temperature: the logits are divided by it; > 0, default 1.
        softcap: logits are first capped smoothly to ``softcap * tanh(x / softcap)`` (Gemma 2); default None: no cap.
    """

    temperature: float
    softcap: float | None


class HeadOptions(LogitOptions, total=False):
    """Which rows of the vocabulary this rank's weight holds.

    Keys:
        group: vocab-parallel ranks; default None: this rank holds the entire vocabulary.
        vocab_size: number of real tokens; rows from there on are padding. Default: all rows of all ranks.
    """

    group: dist.ProcessGroup | None
    vocab_size: int | None


class GradientOptions(HeadOptions, total=False):
    """How gradients are reduced over the vocab-parallel ranks.

    Keys:
        sum_hidden_grad: sum the gradient of the hidden states over ``group``; default True. False: each rank gets the
            contribution of its vocabulary rows and the caller sums (sequence parallelism does, in its reduce-scatter).
    """

    sum_hidden_grad: bool
