"""Low-rank adapters of the embedding and of the output head; see ``lora.py``, whose letters name the shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_align.model.dropout import dropout_keys
from megatron_align.model.families import ModelShape, Row
from megatron_align.model.families.adapter import Adapter
from megatron_align.model.layer_adapter import LayerAdapter


class EmbeddingAdapter(LayerAdapter):
    """The adapter of the embedding, whose A is sharded over the vocabulary."""

    def __init__(
        self,
        linear: VocabParallelEmbedding,
        row: Row,
        shape: ModelShape,
        adapter: Adapter,
        config: TransformerConfig,
    ):
        super().__init__(linear, row, shape, adapter, config)
        self.first, self.last = linear.vocab_start_index, linear.vocab_end_index

    def forward(self, tokens_T: Tensor, output: Tensor) -> Tensor:
        """Return the embedded tokens ``output [T or s, 1, H]`` with the adapter's share added."""
        a_RV, b_HR = self.pairs[0]()
        is_own_T = (tokens_T >= self.first) & (tokens_T < self.last)
        own_T = torch.where(is_own_T, tokens_T - self.first, 0)
        projected = torch.where(is_own_T[:, None], F.embedding(own_T, a_RV.T), 0)[:, None]
        if self.sequence_parallel:
            projected = reduce_scatter_to_sequence_parallel_region(projected, group=self.tp_group)
        elif self.split_rank:
            projected = reduce_from_tensor_model_parallel_region(projected, group=self.tp_group)
        return self._add(output, projected, b_HR)

    def delta(self) -> Tensor:
        """See :class:`LayerAdapter`; the embedding's weight is ``[V, H]``."""
        a_RV, b_HR = self.pairs[0]()
        return self.scale * (a_RV.T.float() @ b_HR.T.float())


class HeadAdapter(LayerAdapter):
    """The adapter of the output head, which never stores logits: A's result is appended to the hidden states.

    ``[h | scale x h A^T] [W | B]^T`` are the logits, so that the log-prob engine computes them in slabs as usual. Under
    sequence parallelism the gradient of A is then summed over ranks, as that of hidden states is.
    """

    def forward(self, hidden_nH: Tensor, weight_VH: Tensor, keys_n: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return scored rows and weight with ``rank`` more columns; ``keys_n``: of the rows' tokens."""
        a_RH, b_VR = self._factors()
        with dropout_keys(keys_n):
            projected = self._project(hidden_nH[:, None], a_RH)[:, 0]
        return torch.cat([hidden_nH, self.scale * projected], 1), torch.cat([weight_VH, b_VR], 1)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.pairs[0]()
