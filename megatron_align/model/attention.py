"""The core attention of a transformer layer: rotary embedding, then attention over the layout of the pack.

Shapes: Q tokens of this context-parallel rank (all T of the pack without context parallelism), H query heads and G
key/value heads of this tensor-parallel rank, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_align.kernels import PackedLayout, packed_attention, packed_attention_reference, rope
from megatron_align.model import cpu
from megatron_align.model.context_parallel import attend_over_ranks
from megatron_align.model.flash import Documents, find_flash
from megatron_align.model.kernel_choice import PolicyConfig
from megatron_align.model.te_attention import TeAttention
from megatron_align.records import ContextPart


@dataclass
class PackParams(PackedSeqParams):
    """The layout and rotary tables of a pack for every layer; megatron-core passes it as ``packed_seq_params``.

    ``qkv_format`` stays ``sbhd``: megatron-core then keeps shapes as they are.
    """

    qkv_format: str = "sbhd"
    layout: PackedLayout = field(kw_only=True)
    cos_QD: Tensor = field(kw_only=True)
    sin_QD: Tensor = field(kw_only=True)
    part: ContextPart | None = field(default=None, kw_only=True)  # as in PackedBatch
    dropout_Q: Tensor | None = field(default=None, kw_only=True)  # of PackedBatch.held_dropout
    documents: Documents | None = field(default=None, kw_only=True)  # where attention goes by documents


# q_QHD, k_TGD, v_TGD, layout, documents, scale -> out_QHD
Kernel = Callable[[Tensor, Tensor, Tensor, PackedLayout, "Documents | None", "float | None"], Tensor]


class PackedCoreAttention(nn.Module):
    """megatron-core's ``core_attention`` for packed documents; holds no parameters."""

    def __init__(
        self,
        config: PolicyConfig,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **unused: object,
    ):
        # Unused: layer_number, mask and attention type, cp_comm_type. The layout replaces them.
        super().__init__()
        self.scale = softmax_scale
        self.context = pg_collection.cp
        self.kernel = _kernel(config)

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
        """Return attention ``[Q, 1, H * D]`` of query ``[Q, 1, H, D]`` over key and value ``[Q, 1, G, D]``."""
        pack = packed_seq_params
        q_QHD, k_QGD = rope(query.squeeze(1), key.squeeze(1), pack.cos_QD, pack.sin_QD)
        qkv = q_QHD, k_QGD, value.squeeze(1)

        def attend(q_QHD: Tensor, k_TGD: Tensor, v_TGD: Tensor, layout: PackedLayout) -> Tensor:
            return self.kernel(q_QHD, k_TGD, v_TGD, layout, pack.documents, self.scale)

        if pack.part is None:
            out_QHD = attend(*qkv, pack.layout)
        else:
            out_QHD = attend_over_ranks(qkv, pack.layout, pack.part, self.context, attend)
        return out_QHD.flatten(1).unsqueeze(1)


def _kernel(config: PolicyConfig) -> Kernel:
    """Return the implementation that ``model.attention`` chooses.

    Raises:
        InputError: its package or chip is missing.
    """
    choice = config.kernels.attention
    if choice == "flash":
        flash = find_flash(config.kv_channels)
        return lambda q, k, v, layout, documents, scale: flash(q, k, v, _given(documents), scale)
    if choice == "te":
        te = TeAttention(config.kv_channels)
        return lambda q, k, v, layout, documents, scale: te(q, k, v, _given(documents), scale)
    if choice == "torch" and cpu.device().type == "cuda":
        return lambda q, k, v, layout, _, scale: packed_attention_reference(q, k, v, layout, scale=scale)
    return lambda q, k, v, layout, _, scale: packed_attention(q, k, v, layout, scale=scale)


def _given(documents: Documents | None) -> Documents:
    assert documents is not None, "the policy makes them wherever attention goes by documents"
    return documents
