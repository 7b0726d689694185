"""A base model and an adapter, read as one model row by row of the weight table, as their run exports it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_align.checkpoint.card import describe_differences
from megatron_align.checkpoint.folder import find_checkpoint
from megatron_align.checkpoint.integrity import require_intact
from megatron_align.convert.open_adapter import StoredAdapter
from megatron_align.convert.open_checkpoint import open_checkpoint, open_state
from megatron_align.errors import InputError
from megatron_align.hf.adapter_start import halves
from megatron_align.hf.hub import model_folder
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.hf.safetensors import HFWeights
from megatron_align.merge.adapted_weights import BLOCK_ELEMENTS, is_adapted, merged_rows, weight_delta
from megatron_align.model.families import ModelShape, Row
from megatron_align.model.families.adapter import PEFT


class RowReader(Protocol):
    """A model whose Hugging Face tensors can be read by the rows of the weight table."""

    shape: ModelShape

    def read(self, row: Row) -> dict[str, Tensor]:
        """Return a row's Hugging Face tensors."""
        ...


class _HFRows:
    """The weights of a Hugging Face folder by the rows of the weight table."""

    def __init__(self, weights: HFWeights, shape: ModelShape) -> None:
        self.weights, self.shape = weights, shape

    def read(self, row: Row) -> dict[str, Tensor]:
        tensors = {}
        for name in row.hf:
            tensors[name] = self.weights.tensor(name)
            self.weights.release(name)
        return tensors


def open_base(path: str | Path) -> tuple[Path, RowReader]:
    """Open a base model: Hugging Face folder, name on the hub, checkpoint, or a run's folder (its newest checkpoint).

    Returns:
        The folder of its weights, and the reader of them.

    Raises:
        InputError: it is missing, incomplete or corrupt.
    """
    if (checkpoint := find_checkpoint(path)) is not None:
        opened = open_checkpoint(checkpoint)
        require_intact(checkpoint)
        return checkpoint, open_state(opened)
    folder = model_folder(path)
    weights, shape = open_hf(folder)
    require_tied_head(weights, shape)
    return folder, _HFRows(weights, shape)


class MergedState:
    """The tensors ``W + scale x B A``, summed in fp32 and rounded once.

    Args:
        base: the base model. A reward model's adapter may have a language model as its base.
        adapter: of this base.
        trained: dtype in which the base was trained on; its weights are cast to it first, as the run did.
        written: dtype of the result.

    Raises:
        InputError: the base is of another architecture or size than the adapter's model.
    """

    def __init__(
        self, base: RowReader, adapter: StoredAdapter, trained: torch.dtype, written: torch.dtype
    ) -> None:
        self.base, self.adapter, self.trained, self.written = base, adapter, trained, written
        self.shape = adapter.shape
        plain = (adapter.adapter, adapter.tensors)
        self._parts = halves(*plain) if adapter.holds_start else (plain,)
        like = base.shape.as_reward() if self.shape.is_reward else base.shape
        if facts := describe_differences(self.shape, like):
            raise InputError(
                f"the base is another model than the adapter's: {facts} (adapter {adapter.folder})"
            )

    def read(self, row: Row) -> dict[str, Tensor]:
        """Return a row's Hugging Face tensors in the dtype of the result; those of a reward head are the adapter's."""
        trained = {name: self.adapter.tensors.get(f"{PEFT}{name}") for name in row.hf}
        if all(tensor is not None for tensor in trained.values()):
            return {name: tensor.to(self.written) for name, tensor in trained.items() if tensor is not None}
        merged = {}
        for name, tensor in self.base.read(row).items():
            weight = tensor.to(self.trained)
            merged[name] = self._merged(name, weight) if self.adapts(name) else weight.to(self.written)
        return merged

    def adapts(self, name: str) -> bool:
        """Return whether the adapter changes a Hugging Face tensor."""
        return is_adapted(name, self.adapter.adapter)

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        merged = torch.empty_like(weight, dtype=self.written)
        step = max(1, BLOCK_ELEMENTS // math.prod(weight.shape[1:]))
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            *starts, trained = self._parts
            block = weight[rows]
            for start in starts:
                block = merged_rows(name, rows, block, *start).to(self.trained)
            merged[rows] = merged_rows(name, rows, block, *trained).to(self.written)
        return merged

    def rounding(self, name: str, merged: Tensor) -> Tensor:
        """Return by how much two correct results of :meth:`read` may differ, element by element, in fp64.

        Both are rounded to the dtype of the result, and the products of fp32 are summed in any order.
        """
        absolute: Mapping[str, Tensor] = {key: tensor.abs() for key, tensor in self.adapter.tensors.items()}
        terms = weight_delta(name, slice(None), self.adapter.adapter, absolute).double()
        fp32 = (
            2
            * (self.adapter.adapter.rank + 2)
            * torch.finfo(torch.float32).eps
            * (terms + merged.double().abs())
        )
        if self.adapter.holds_start:  # the base without it may be rounded to another neighbour
            fp32 = fp32 + torch.finfo(self.trained).eps * (terms + merged.double().abs())
        # A length may be rounded to another neighbour, and so may the magnitude that is divided by it.
        lengths = 2 * torch.finfo(self.trained).eps if self.adapter.adapter.dora else 0.0
        return fp32 + (torch.finfo(self.written).eps + lengths) * merged.double().abs()
