"""A and B of one Hugging Face module as parameters of this rank, and DoRA's magnitude."""

from __future__ import annotations

from typing import TypeAlias

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_align.model import cpu
from megatron_align.model.adapter_start import normal_row, uniform_row
from megatron_align.model.dropout import feature_keys
from megatron_align.model.families import ModelShape, Row, local_shape
from megatron_align.model.families.adapter import EMBED_TOKENS
from megatron_align.model.families.table import rank_slices

_A, _B, _MAGNITUDE = "lora_A", "lora_B", "magnitude"
Adaptable: TypeAlias = ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding


class Pair(nn.Module):
    """A and B of one Hugging Face module, uninitialised.

    Args:
        module: its Hugging Face name.
        rows: of the weight table: of A, B and DoRA's magnitude.
        linear: the layer that is adapted.
        shape: of the model.
        config: megatron-core's.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter  # of DoRA only

    def __init__(
        self,
        module: str,
        rows: tuple[Row, ...],
        linear: Adaptable,
        shape: ModelShape,
        config: TransformerConfig,
    ):
        super().__init__()
        a, b, *_ = rows
        self.module, self.a, self.b, self.shape, self.tp_group = module, a, b, shape, linear.tp_group
        self._features: Tensor | None = None
        ranks = linear.tp_group.size()
        for name, row in zip((_A, _B, _MAGNITUDE), rows, strict=False):
            size = local_shape(row, shape, ranks)
            weight = nn.Parameter(torch.empty(size, dtype=config.params_dtype, device=cpu.device()))
            if row.split is not None:
                set_tensor_model_parallel_attributes(weight, True, row.split, 1)
            elif isinstance(linear, ColumnParallelLinear) == (name == _A):
                # Applied to this rank's tokens only: megatron-core then sums the gradient over tensor-parallel ranks.
                weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, weight)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return A and B. A call, as megatron-core's hooks then wait for parameters that are still being gathered."""
        return self.lora_A, self.lora_B

    def features(self) -> Tensor:
        """Return the numbers that the dropout of this rank's features of the input is drawn from, ``[2, I]``."""
        if self._features is None:
            own = rank_slices(self.a, self.shape, self.tp_group.rank(), self.tp_group.size())
            [(_, inputs)] = self.a.hf_shapes(self.shape)
            held = (
                torch.cat([torch.arange(s.start, s.stop) for s in own])
                if self.a.split
                else torch.arange(inputs)
            )
            self._features = feature_keys(self.module, held.to(cpu.device()))
        return self._features

    def initialise(self, seed: int) -> None:
        """Set B to 0 and draw A uniformly from +-1 / sqrt(inputs), PEFT's default; every layout draws the same A.

        Of the embedding A is 0, and B has normal values.
        """
        [(rank, inputs)] = self.a.hf_shapes(self.shape)
        if self.module == EMBED_TOKENS:
            with torch.no_grad():
                self.lora_A.zero_()
                rows = [normal_row(seed, self.module, row, rank) for row in range(self.lora_B.shape[0])]
                self.lora_B.copy_(torch.stack(rows))
            return
        drawn = torch.stack([uniform_row(seed, self.module, row, inputs) for row in range(rank)])
        own = rank_slices(self.a, self.shape, self.tp_group.rank(), self.tp_group.size())
        parts = [drawn.narrow(self.a.split or 0, s.start, s.stop - s.start) for s in own]
        with torch.no_grad():
            self.lora_A.copy_(torch.cat(parts, self.a.split or 0))
            self.lora_B.zero_()
