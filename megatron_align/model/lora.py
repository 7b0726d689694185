"""Low-rank adapters (LoRA, arXiv:2106.09685) of megatron-core's linear layers, its embedding and its output head.

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
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
from megatron_align.model.dora import row_norms, scaled
from megatron_align.model.dropout import current_keys, dropout_keys, dropped_linear
from megatron_align.model.families import ModelShape, Row
from megatron_align.model.families.adapter import Adapter, adapter_rows, module_name, module_of
from megatron_align.model.families.table import rank_slices
from megatron_align.model.lora_pair import Adaptable, Pair


class LayerAdapter(nn.ModuleDict):
    """The pairs of one layer, by the last part of their module's name.

    Args:
        linear: the layer that is adapted.
        row: of the weight table of its weight.
        shape: of the model.
        adapter: rank, scale and modules.
        config: megatron-core's.

    Attributes:
        enabled: whether the adapter is added; off, the model is the base, bit for bit.
    """

    def __init__(
        self, linear: Adaptable, row: Row, shape: ModelShape, adapter: Adapter, config: TransformerConfig
    ):
        super().__init__()
        ranks = linear.tp_group.size()
        self.enabled, self.scale, self.dropout = True, adapter.scale, adapter.dropout
        self.dora = adapter.dora
        self._base = [linear]  # in a list, as it is no module of this one
        for pair in adapter_rows(row, shape, adapter, ranks):
            module = module_of(pair[0].hf[0])
            self[module.rpartition(".")[2]] = Pair(module, pair, linear, shape, config)
        self.tp_group, self.sequence_parallel = linear.tp_group, config.sequence_parallel
        self.split_rank = ranks > 1

    @property
    def pairs(self) -> list[Pair]:
        """The pairs in the order of the layer's Hugging Face modules."""
        return list(self.values())  # type: ignore[arg-type]  # a ModuleDict holds Modules

    def _pair(self, name: str) -> Pair:
        return cast(Pair, self[name])

    def delta(self) -> Tensor:
        """Return ``scale x B A`` of this rank's weight, ``[O, I]`` fp32."""
        a_RI, b_OR = self._factors()
        return self.scale * (b_OR.float() @ a_RI.float())

    def merged(self, weight: Tensor) -> Tensor:
        """Return this rank's weight with the adapter, summed in fp32 and rounded to the weight's dtype."""
        merged = weight.float() + self.delta()
        if self.dora:
            merged *= self._row_factors(*self._factors()).float()[:, None]
        return merged.to(weight.dtype)

    def initialise(self, seed: int) -> None:
        """Initialise A and B of every module; DoRA's magnitudes are the lengths of the base's rows."""
        for pair in self.pairs:
            pair.initialise(seed)
        if self.dora:
            self._set_magnitudes(self._norms(*self._factors()))

    @property
    def linear(self) -> Adaptable:
        """The layer that is adapted."""
        return self._base[0]

    def _norms(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """Return the length of each row of the sum of weight and adapter, ``[O]``."""
        group = self.tp_group if isinstance(self.linear, RowLinear) and self.split_rank else None
        return row_norms(self.linear.weight, a_RI, b_OR, self.scale, group)

    def _row_factors(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """Return DoRA's magnitude over length of each row of this rank's weight, ``[O]``."""
        return self._magnitudes(norms_O := self._norms(a_RI, b_OR)) / norms_O

    def _magnitudes(self, norms_O: Tensor) -> Tensor:
        """Return the magnitude of each row, ``[O]``; of rows without an adapter the length that they have."""
        return self.pairs[0].magnitude

    @torch.no_grad()
    def _set_magnitudes(self, norms_O: Tensor) -> None:
        self.pairs[0].magnitude.copy_(norms_O)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return A ``[R, I]`` and B ``[O, R]`` of all modules of the layer."""
        raise NotImplementedError

    def _project(self, input_: Tensor, a_RI: Tensor) -> Tensor:
        """Return ``input_ [S, 1, I]`` times A of all of the layer's modules, each with a dropout of its own."""
        keys_S = current_keys()
        if not (self.dropout and self.training) or keys_S is None:
            return F.linear(input_, a_RI)
        if len(keys_S) != len(input_):  # under sequence parallelism each rank has a part of the tokens
            keys_S = keys_S.chunk(self.tp_group.size())[self.tp_group.rank()]
        parts = a_RI.split([pair.a.dims[0][0] for pair in self.pairs])
        projected = [
            dropped_linear(input_, part, keys_S, pair.features(), self.dropout)
            for pair, part in zip(self.pairs, parts, strict=True)
        ]
        return torch.cat(projected, -1)

    def _result(self, output: Tensor, projected: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        """Return the layer's output ``[T, 1, O]`` from that of its base and ``projected [T, 1, R]``."""
        if not self.dora:
            return self._add(output, projected, factors[1])
        share = self.scale * F.linear(projected, factors[1])
        return scaled(output, getattr(self.linear, "bias", None), share, self._row_factors(*factors))

    def _add(self, output: Tensor, projected: Tensor, b_OR: Tensor) -> Tensor:
        """Return ``output [T, 1, O] + scale x projected [T, 1, R] B^T``."""
        sum_TO = torch.addmm(output.flatten(0, 1), projected.flatten(0, 1), b_OR.t(), alpha=self.scale)
        return sum_TO.view_as(output)


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


def initialise_adapters(chunks: Iterable[nn.Module], seed: int) -> None:
    """Initialise every adapter so that the model computes what its base computes.

    A is drawn from the seed and B is 0; of the embedding A is 0 and B is drawn. DoRA's magnitudes are the lengths of
    the base's rows.
    """
    for adapter in layer_adapters(chunks):
        adapter.initialise(seed)


def merged(weight: Tensor, adapter: LayerAdapter | None) -> Tensor:
    """Return a rank's weight ``W + scale x B A``, summed in fp32 and rounded to the weight's dtype.

    With DoRA each row of the sum is scaled to its magnitude before it is rounded.
    """
    return weight if adapter is None else adapter.merged(weight)


@contextmanager
def adapters_off(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Compute with the base model, without its adapter, inside a with-block."""
    adapters = list(layer_adapters(chunks))
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True
