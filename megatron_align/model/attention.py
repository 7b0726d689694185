"""Attention inside a transformer layer: rotary positions, then attention over the pack's layout.

Shapes: T tokens of the pack, H query heads and G key/value heads of this rank, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_align.kernels import PackedLayout, packed_attention


@dataclass
class PackParams(PackedSeqParams):
    """What every layer needs to know of the pack; travels through megatron-core as ``packed_seq_params``.

    ``qkv_format`` stays ``sbhd``: megatron-core then leaves shapes alone.
    """

    qkv_format: str = "sbhd"
    layout: PackedLayout = field(kw_only=True)
    cos_TD: Tensor = field(kw_only=True)
    sin_TD: Tensor = field(kw_only=True)


def rope_tables(positions_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 ``cos_TD, sin_TD`` of explicit positions; ``inv_freq`` is ``[D / 2]`` fp32, beside them."""
    angles_TD = torch.outer(positions_T.float(), inv_freq).repeat(1, 2)
    return angles_TD.cos(), angles_TD.sin()


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the two halves of each head (the layout of HF Llama weights) in fp32; keeps the dtype."""
    first, second = x_THD.float().chunk(2, dim=-1)
    rotated_THD = torch.cat([-second, first], dim=-1)
    return (x_THD * cos_TD[:, None] + rotated_THD * sin_TD[:, None]).to(x_THD.dtype)


class PackedCoreAttention(nn.Module):
    """megatron-core's ``core_attention`` for packed documents; holds no parameters."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **unused: object):
        # Unused: layer_number, mask and attention type, cp_comm_type, pg_collection. The layout says it all.
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackParams,
        **unused: object,
    ) -> Tensor:
        """Attend. query ``[T, 1, H, D]``, key and value ``[T, 1, G, D]`` -> ``[T, 1, H * D]``."""
        pack = packed_seq_params
        q_THD = apply_rope(query.squeeze(1), pack.cos_TD, pack.sin_TD)
        k_TGD = apply_rope(key.squeeze(1), pack.cos_TD, pack.sin_TD)
        out_THD = packed_attention(q_THD, k_TGD, value.squeeze(1), pack.layout, scale=self.scale)
        return out_THD.flatten(1).unsqueeze(1)
