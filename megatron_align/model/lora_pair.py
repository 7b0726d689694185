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
from megatron_align.model.families import ModelShape, Row, copy_segments, local_shape
from megatron_align.model.families.adapter import EMBED_TOKENS, start_row
from megatron_align.model.families.table import rank_slices

_A, _B, _MAGNITUDE = "lora_A", "lora_B", "magnitude"
_START_A, _START_B = "start_A", "start_B"
Adaptable: TypeAlias = ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding


class Pair(nn.Module):
    """A and B of one Hugging Face module, uninitialised.

    Args:
        module: its Hugging Face name.
        rows: of the weight table: of A, B and DoRA's magnitude.
        linear: the layer that is adapted.
        shape: of the model.
        config: megatron-core's.
        holds_start: keep what A and B started with, which the base lacks.

    Attributes:
        at_start: give what A and B started with.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    magnitude: nn.Parameter  # of DoRA only
    start_A: nn.Parameter  # never trained; parameters, as checkpoints shard them like A and B
    start_B: nn.Parameter

    def __init__(
        self,
        module: str,
        rows: tuple[Row, ...],
        linear: Adaptable,
        shape: ModelShape,
        config: TransformerConfig,
        *,
        holds_start: bool,
    ):
        super().__init__()
        a, b, *_ = rows
        self.at_start = False
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
        for name, row in ((_START_A, start_row(a)), (_START_B, start_row(b))) if holds_start else ():
            size = local_shape(row, shape, ranks)
            held = torch.empty(size, dtype=config.params_dtype, device=cpu.device())
            parameter = nn.Parameter(held, requires_grad=False)
            if row.split is not None:
                set_tensor_model_parallel_attributes(parameter, True, row.split, 1)
            self.register_parameter(name, parameter)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return A and B. A call, as megatron-core's hooks then wait for parameters that are still being gathered."""
        return (self.start_A, self.start_B) if self.at_start else (self.lora_A, self.lora_B)

    @torch.no_grad()
    def set_start(self, a_RI: Tensor, b_OR: Tensor) -> None:
        """Set A and B, and what they started with, to this rank's part of complete ones."""
        for row, complete, parameters in (
            (self.a, a_RI, (self.lora_A, self.start_A)),
            (self.b, b_OR, (self.lora_B, self.start_B)),
        ):
            for segment in copy_segments(row, self.shape, self.tp_group.rank(), self.tp_group.size()):
                for parameter in parameters:
                    segment.of_megatron(parameter).copy_(segment.of_hf(complete))

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
