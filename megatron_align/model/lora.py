"""Low-rank adapters (LoRA, arXiv:2106.09685) of megatron-core's linear layers; those of its ends: ``lora_ends.py``.

Each Hugging Face module (``q_proj``, ``gate_proj``, ...) has its own A and B, as in PEFT. Sharding is described in
``families/adapter.py``. What ranks exchange has ``rank`` columns:

- column-parallel: under sequence parallel A is applied to this rank's tokens and its result gathered; A's gradient is
  summed over tensor-parallel ranks with those of the norms. Without it, the gradient of A's result is summed.
- row-parallel: A's result is summed over ranks, under sequence parallel also split by tokens; B's gradient is then
  summed over ranks too.

Shapes: T tokens (s on this rank under sequence parallel; S: either), I inputs and O outputs of the layer on this rank,
R rank times the number of adapted modules in the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_align.model import cpu
from megatron_align.model.adapted_linear import ColumnLinear, RowLinear
from megatron_align.model.families import ModelShape, Row
from megatron_align.model.families.adapter import Adapter, adapter_rows, module_name
from megatron_align.model.families.table import rank_slices
from megatron_align.model.layer_adapter import LayerAdapter
from megatron_align.model.lora_ends import EmbeddingAdapter, HeadAdapter
from megatron_align.model.lora_pair import Adaptable
from megatron_align.model.trained_copy import TrainedCopy


class ColumnAdapter(LayerAdapter):
    """The adapter of a column-parallel layer."""

    def __init__(
        self,
        linear: ColumnLinear,
        row: Row,
        shape: ModelShape,
        adapter: Adapter,
        config: TransformerConfig,
    ):
        super().__init__(linear, row, shape, adapter, config)
        slices = rank_slices(row, shape, linear.tp_group.rank(), linear.tp_group.size())
        names = [module_name(name).rpartition(".")[2] for name in row.hf]
        # Rows of this rank's weight, module by module: those of B, and zeros for modules without an adapter.
        positions: list[list[int]] = [[] for _ in names]
        within: list[list[int]] = [[] for _ in names]
        start = 0
        for part, first, last in slices:
            assert part is not None, "linear layers have no padding"
            positions[part] += range(start, start + last - first)
            within[part] += range(first, last)
            start += last - first
        self._parts = [
            (name if name in self else None, len(own)) for name, own in zip(names, within, strict=True)
        ]
        self._names = names
        self._rows = {
            name: torch.tensor(own, dtype=torch.long, device=cpu.device())
            for name, own in zip(names, positions, strict=True)
        }
        order = [place for own in positions for place in own]
        self._order: Tensor | None = None
        if order != list(range(len(order))):
            self._order = torch.tensor(order, dtype=torch.long, device=cpu.device()).argsort()
        # Own rows of each B that every rank holds in full. The table decides, for all ranks alike: a rank may own all
        # rows of such a B, or none, and takes part in the sum of its gradient all the same.
        self._own: dict[str, Tensor] = {
            name: torch.tensor(own, dtype=torch.long, device=cpu.device())
            for name, own in zip(names, within, strict=True)
            if name in self and self.split_rank and self._pair(name).b.split is None
        }

    def forward(self, input_: Tensor, output: Tensor) -> Tensor:
        """Return ``output [T, 1, O]`` with the adapter's share added; ``input_`` is ``[T or s, 1, I]``."""
        a_RI, b_OR = self._factors()
        projected = self._project(input_, a_RI)
        if self.sequence_parallel:
            projected = gather_from_sequence_parallel_region(projected, group=self.tp_group)
        elif self.split_rank:
            projected = copy_to_tensor_model_parallel_region(projected, group=self.tp_group)
        return self._result(output, projected, (a_RI, b_OR))

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A of all modules, and their B as one block-diagonal matrix, its rows in the order of the weight's."""
        factors = {name: self._pair(name)() for name in self}
        a_RI = torch.cat([a for a, _ in factors.values()])
        blocks: list[Tensor] = []
        for name, rows in self._parts:
            if name is None:
                blocks.append(a_RI.new_zeros(rows, 0))
                continue
            blocks.append(self._own_rows(name, factors[name][1]))
        joined = torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]
        return a_RI, joined if self._order is None else joined[self._order]

    def _own_rows(self, name: str, rows: Tensor) -> Tensor:
        """Return this rank's rows of B, or of a magnitude, of a module, of which it may hold others' too."""
        if name not in self._own:
            return rows
        return copy_to_tensor_model_parallel_region(rows, group=self.tp_group)[self._own[name]]

    def _magnitudes(self, norms_O: Tensor) -> Tensor:
        parts = []
        for name in self._names:
            if name in self:
                parts.append(self._own_rows(name, self._pair(name).magnitude))
            else:
                parts.append(norms_O[self._rows[name]])
        joined = torch.cat(parts)
        return joined if self._order is None else joined[self._order]

    @torch.no_grad()
    def _set_magnitudes(self, norms_O: Tensor) -> None:
        for name in self:
            magnitude, own = self._pair(name).magnitude, norms_O[self._rows[name]]
            if name in self._own:
                magnitude.zero_()
                magnitude[self._own[name]] = own
                dist.all_reduce(magnitude, group=self.tp_group)
            else:
                magnitude.copy_(own)


class RowAdapter(LayerAdapter):
    """The adapter of a row-parallel layer."""

    def forward(self, input_: Tensor, output: Tensor) -> Tensor:
        """Return ``output [T or s, 1, O]`` with the adapter's share added; ``input_`` is ``[T, 1, I]``."""
        a_RI, b_OR = self._factors()
        projected = self._project(input_, a_RI)
        if self.sequence_parallel:
            projected = reduce_scatter_to_sequence_parallel_region(projected, group=self.tp_group)
        elif self.split_rank:
            projected = reduce_from_tensor_model_parallel_region(projected, group=self.tp_group)
        return self._result(output, projected, (a_RI, b_OR))

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.pairs[0]()


def attach(
    linears: Mapping[str, Adaptable],
    shape: ModelShape,
    adapter: Adapter,
    table: Iterable[Row],
    config: TransformerConfig,
) -> None:
    """Give every adapted layer its pairs, uninitialised.

    Args:
        linears: this rank's layers by the Megatron name of their weight, layers numbered over the model.
        shape: of the model.
        adapter: which modules have one.
        table: the rows of the layers.
        config: megatron-core's.
    """
    for row in table:
        linear = linears.get(row.megatron)
        if linear is None or not adapter_rows(row, shape, adapter, 1):
            continue
        linear.adapter = _kind(linear)(linear, row, shape, adapter, config)


def _kind(linear: Adaptable) -> Callable[..., LayerAdapter]:
    if isinstance(linear, VocabParallelEmbedding):
        return EmbeddingAdapter
    if isinstance(linear, RowLinear):
        return RowAdapter
    return ColumnAdapter if isinstance(linear, ColumnLinear) else HeadAdapter


def layer_adapters(chunks: Iterable[nn.Module]) -> Iterator[LayerAdapter]:
    """Yield the adapters of all layers of some chunks."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, LayerAdapter))


def trained_copies(chunks: Iterable[nn.Module]) -> Iterator[TrainedCopy]:
    """Yield the trained copies of weights of some chunks."""
    return (module for chunk in chunks for module in chunk.modules() if isinstance(module, TrainedCopy))


def initialise_adapters(chunks: Iterable[nn.Module], seed: int) -> None:
    """Initialise every adapter so that the model computes what its base computes.

    A is drawn from the seed and B is 0; of the embedding A is 0 and B is drawn. DoRA's magnitudes are the lengths of
    the base's rows.
    """
    for adapter in layer_adapters(chunks):
        adapter.initialise(seed)


def merged(weight: Tensor, adapter: LayerAdapter | TrainedCopy | None) -> Tensor:
    """Return a rank's weight ``W + scale x B A``, summed in fp32 and rounded to the weight's dtype; or its copy.

    With DoRA each row of the sum is scaled to its magnitude before it is rounded.
    """
    return weight if adapter is None else adapter.merged(weight)


@contextmanager
def adapters_off(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Compute with the base model, without its adapter, inside a with-block."""
    chunks = list(chunks)
    with ExitStack() as stack:
        for adapter in layer_adapters(chunks):
            stack.enter_context(adapter.off())
        for copy in trained_copies(chunks):
            stack.enter_context(copy.off())
        yield


def reduce_bases(chunks: Iterable[nn.Module]) -> None:
    """Take what adapters started with out of their bases, where they started with a part of it."""
    for adapter in layer_adapters(chunks):
        adapter.reduce_base()
