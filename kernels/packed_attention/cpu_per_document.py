"""CPU implementation: PyTorch's attention on each causal document, its prefix concatenated to its keys and values.

Shapes: T tokens of a pack, Q queries, H query heads, G key/value heads, D head dim; R queries of one document, S keys
that they see.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.kernels.packed_attention.layout import PackedLayout


def attend_per_document(
    q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, scale: float
) -> Tensor:
    """Return the attention of all documents, any dtype. Arguments as :func:`packed_attention`."""
    heads_per_group = q_QHD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_TGD, v_TGD))
    documents = list(_documents(layout.groups))
    positions_Q = layout.own_end_Q - 1
    ends = torch.searchsorted(
        positions_Q, torch.tensor([own.stop for _, own in documents], dtype=torch.int32)
    )
    outputs = []
    row = 0
    for (prompt, own), end in zip(documents, ends.tolist(), strict=True):
        if end > row:
            own = slice(own.start, int(positions_Q[end - 1]) + 1)  # no query here sees later keys
            mask_RS = _mask(prompt, own, positions_Q[row:end])
            k_SHD, v_SHD = (
                torch.cat([x[prompt], x[own]]) if _length(prompt) else x[own] for x in (k_THD, v_THD)
            )
            outputs.append(_attend(q_QHD[row:end], k_SHD, v_SHD, scale, mask_RS))
        row = end
    # Padding sees only itself: its output is its value. Indexing makes autograd keep a copy of these rows only.
    outputs.append(v_THD[positions_Q[row:].long()])
    return torch.cat(outputs)


def _documents(groups: tuple[tuple[int, tuple[int, ...]], ...]) -> Iterator[tuple[slice, slice]]:
    """Yield each causal document as (prompt that it shares, its own tokens), in order of position."""
    start = 0
    for prompt, completions in groups:
        # The prompt and its first completion are one causal document.
        end = start + prompt + sum(completions[:1])
        yield slice(start, start), slice(start, end)
        for length in completions[1:]:
            yield slice(start, start + prompt), slice(end, end + length)
            end += length
        start = end


def _length(tokens: slice) -> int:
    return tokens.stop - tokens.start


def _mask(prompt: slice, own: slice, positions_R: Tensor) -> Tensor | None:
    """Return the mask ``[R, S]`` over prompt and own tokens; None: plain causal."""
    if not _length(prompt) and _length(own) == len(positions_R):
        return None
    own_positions = torch.arange(own.start, own.stop)
    see_own = own_positions <= positions_R[:, None]
    return F.pad(see_own, (_length(prompt), 0), value=True)


def _attend(q_RHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, scale: float, mask_RS: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_RHD, k_SHD, v_SHD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_RS, is_causal=mask_RS is None, scale=scale)
    return out[0].transpose(0, 1)
