"""Reference implementation: softmax over scores under a dense mask. Every test compares against it.

Shapes: T tokens of a pack, Q queries, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.kernels.packed_attention.layout import PackedLayout


def packed_attention_reference(
    q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, *, scale: float | None = None
) -> Tensor:
    """Compute dense-mask attention, differentiable, in Q x T memory. Arguments as :func:`packed_attention`."""
    heads_per_group = q_THD.shape[1] // k_TGD.shape[1]
    exact = torch.promote_types(q_THD.dtype, torch.float32)
    q_HQD, k_HTD, v_HTD = (
        x.to(exact).repeat_interleave(repeats, dim=1).transpose(0, 1)
        for x, repeats in ((q_THD, 1), (k_TGD, heads_per_group), (v_TGD, heads_per_group))
    )
    scores_HQT = q_HQD @ k_HTD.transpose(1, 2) * (q_THD.shape[-1] ** -0.5 if scale is None else scale)
    weights_HQT = scores_HQT.masked_fill(~layout.mask_QT(), float("-inf")).softmax(-1)
    return (weights_HQT @ v_HTD).transpose(0, 1).to(q_THD.dtype)


def visible_tiles_reference(layout: PackedLayout, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """Return which tiles have a visible pair, and which of them need no mask. For tests and pictures: Q x T memory.

    Args:
        layout: the intervals of the pack.
        queries: rows of a tile.
        keys: columns of a tile. Rows past Q and columns past T are ignored.

    Returns:
        Two bool tensors ``[query blocks, key blocks]``.
    """
    mask_QT = layout.mask_QT()
    padding = (0, -layout.tokens % keys, 0, -layout.queries % queries)
    tiles = [
        F.pad(mask_QT, padding, value=value).unflatten(1, (-1, keys)).unflatten(0, (-1, queries))
        for value in (False, True)
    ]
    return tiles[0].any(3).any(1), tiles[1].all(3).all(1)
