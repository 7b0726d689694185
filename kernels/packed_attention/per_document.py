"""The CPU's path: PyTorch's own attention on each causal document, prefixes concatenated.

Shapes: T tokens of a pack, H query heads, G key/value heads, D head dim, S tokens of one document, P prompt tokens,
C tokens of one completion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_align.kernels.packed_attention.layout import PackedLayout


def per_document(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout, scale: float) -> Tensor:
    """Return the attention of all documents, any dtype. Arguments as :func:`packed_attention`."""
    heads_per_group = q_THD.shape[1] // k_TGD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_TGD, v_TGD))
    outputs = []
    start = 0
    for prompt, completions in layout.groups:
        # The prompt and its first completion are one causal document.
        trunk = slice(start, start + prompt + sum(completions[:1]))
        if trunk.stop > trunk.start:
            outputs.append(_attend(q_THD[trunk], k_THD[trunk], v_THD[trunk], scale, None))
        own_start = trunk.stop
        for length in completions[1:]:
            own = slice(own_start, own_start + length)
            if length:
                see_CS = torch.ones(length, prompt + length, dtype=torch.bool).tril(prompt)
                k_SHD, v_SHD = (torch.cat([x[start : start + prompt], x[own]]) for x in (k_THD, v_THD))
                outputs.append(_attend(q_THD[own], k_SHD, v_SHD, scale, see_CS))
            own_start += length
        start = own_start
    outputs.append(v_THD[start:])  # padding: softmax over the token alone is 1
    return torch.cat(outputs)


def _attend(q_SHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, scale: float, mask_SS: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_SHD, k_SHD, v_SHD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_SS, is_causal=mask_SS is None, scale=scale)
    return out[0].transpose(0, 1)
