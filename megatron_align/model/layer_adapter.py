"""The base class of low-rank adapters of every kind of layer; see ``lora.py``, whose letters name the shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_align.model.adapted_linear import RowLinear
from megatron_align.model.dora import row_norms, scaled
from megatron_align.model.dropout import current_keys, dropped_linear
from megatron_align.model.families import ModelShape, Row
from megatron_align.model.families.adapter import Adapter, adapter_rows, module_of
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
        is_reduced: the base lacks what A and B started with.
    """

    def __init__(
        self, linear: Adaptable, row: Row, shape: ModelShape, adapter: Adapter, config: TransformerConfig
    ):
        super().__init__()
        ranks = linear.tp_group.size()
        self.enabled, self.scale, self.dropout = True, adapter.scale, adapter.dropout
        self.dora, self.holds_start, self.is_reduced = adapter.dora, adapter.holds_start, False
        self._at_start = False
        self._base = [linear]  # in a list, as it is no module of this one
        for pair in adapter_rows(row, shape, adapter, ranks):
            module = module_of(pair[0].hf[0])
            self[module.rpartition(".")[2]] = Pair(
                module, pair, linear, shape, config, holds_start=adapter.holds_start
            )
        self.tp_group, self.sequence_parallel = linear.tp_group, config.sequence_parallel
        self.split_rank = ranks > 1

    @property
    def pairs(self) -> list[Pair]:
        """The pairs in the order of the layer's Hugging Face modules."""
        return list(self.values())  # type: ignore[arg-type]  # a ModuleDict holds Modules

    def pair_of(self, module: str) -> Pair:
        """Return A and B of a Hugging Face module of the layer."""
        return self._pair(module.rpartition(".")[2])

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
        self.initialise_magnitudes()

    def initialise_magnitudes(self) -> None:
        """Set DoRA's magnitudes, if it has any, to the lengths of the rows of the sum."""
        if self.dora:
            self._set_magnitudes(self._norms(*self._factors()))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute with the base inside a with-block: without the adapter, or with what it started with in its place."""
        self.enabled = self.is_reduced
        self._set_at_start(self.is_reduced)
        try:
            yield
        finally:
            self.enabled = True
            self._set_at_start(False)

    @torch.no_grad()
    def reduce_base(self) -> None:
        """Take what A and B started with out of the base, rounded once to its dtype; once after each loading of it."""
        if not self.holds_start or self.is_reduced:
            return
        self._set_at_start(True)
        weight = self.linear.weight
        weight.copy_(weight.float() - self.delta())
        self._set_at_start(False)
        self.is_reduced = True

    def _set_at_start(self, at_start: bool) -> None:
        self._at_start = at_start
        for pair in self.pairs:
            pair.at_start = at_start

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
        if not (self.dropout and self.training) or keys_S is None or self._at_start:
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
        if not self.dora or self._at_start:
            return self._add(output, projected, factors[1])
        share = self.scale * F.linear(projected, factors[1])
        return scaled(output, getattr(self.linear, "bias", None), share, self._row_factors(*factors))

    def _add(self, output: Tensor, projected: Tensor, b_OR: Tensor) -> Tensor:
        """Return ``output [T, 1, O] + scale x projected [T, 1, R] B^T``."""
        sum_TO = torch.addmm(output.flatten(0, 1), projected.flatten(0, 1), b_OR.t(), alpha=self.scale)
        return sum_TO.view_as(output)
