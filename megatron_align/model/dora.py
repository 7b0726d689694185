"""DoRA (arXiv:2402.09353): each row of ``W + scale x B A`` is scaled to a trained length, its magnitude.

The length that a row has is a constant in backward (section 4.3 of the paper), and is rounded to the weight's dtype, as
in PEFT: with B = 0 and the initial magnitudes the model is its base.

Shapes: O outputs and I inputs of a layer on this rank, R rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK_ELEMENTS = 1 << 23  # of a weight, whose sum with B A is formed at once


@torch.no_grad()
def row_norms(
    weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, group: dist.ProcessGroup | None
) -> Tensor:
    """Return the length of each row of ``W + scale x B A``, ``[O]`` in the weight's dtype.

    Args:
        weight_OI: W.
        a_RI: A.
        b_OR: B.
        scale: of the adapter.
        group: ranks that hold other inputs of the same rows; None: this rank holds all.
    """
    squares_O = torch.empty(len(weight_OI), dtype=torch.float32, device=weight_OI.device)
    step = max(1, BLOCK_ELEMENTS // weight_OI.shape[1])
    for first in range(0, len(weight_OI), step):
        rows = slice(first, first + step)
        block = weight_OI[rows].float() + scale * (b_OR[rows].float() @ a_RI.float())
        squares_O[rows] = block.square().sum(1)
    if group is not None:
        dist.all_reduce(squares_O, group=group)
    return squares_O.sqrt().to(weight_OI.dtype)


def scaled(output: Tensor, bias: Tensor | None, share: Tensor, factor_O: Tensor) -> Tensor:
    """Return the output of a layer whose rows are scaled.

    Args:
        output: of the base, ``[T, 1, O]``.
        bias: that it holds, ``[O]``; None: it holds none.
        share: of the adapter, ``scale x B A x``, as ``output``.
        factor_O: magnitude over length of each row.
    """
    base = output if bias is None else output - bias
    return output + (factor_O - 1) * base + factor_O * share
