"""The weights of a base with a low-rank adapter, rows or elements at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_align.hf.adapter import WEIGHTS, read_tensors
from megatron_align.hf.safetensors import DTYPES, HFWeights
from megatron_align.model.families.adapter import (
    EMBED_TOKENS,
    MAGNITUDE,
    PEFT,
    Adapter,
    adapter_tensors,
    module_name,
)
from megatron_align.model.families.saved_modules import SCORE

BLOCK_ELEMENTS = 1 << 19  # of a tensor, merged at once: in fp32 they fit a core's cache


@dataclass(frozen=True, slots=True)
class AdapterInputs:
    """A base and an adapter of it.

    Args:
        weights: of the base.
        copies: of the adapter's file, which holds complete modules too.
        adapter: options.
        tensors: A, B and magnitudes by PEFT's names.
    """

    weights: HFWeights
    copies: HFWeights
    adapter: Adapter
    tensors: Mapping[str, Tensor]

    def source(self, name: str) -> tuple[HFWeights, str]:
        """Return which file a Hugging Face tensor is read from, and its name there."""
        module = module_name(name)
        if module in self.adapter.saved or module == SCORE:
            return self.copies, f"{PEFT}{name}"
        return self.weights, name


class AdaptedWeights:
    """The tensors of a base with an adapter, computed in fp32 as they are read.

    Args:
        base: weights of the base.
        folder: PEFT's.
        adapter: of the folder.
    """

    def __init__(self, base: HFWeights, folder: Path, adapter: Adapter):
        self._inputs = AdapterInputs(
            base, HFWeights(folder, WEIGHTS), adapter, read_tensors(folder, copies=False)
        )

    def dtype(self, name: str) -> str:
        """Return the dtype of the elements that :meth:`read_flat` gives."""
        weights, stored = self._inputs.source(name)
        found = weights.dtype(stored)
        return "F32" if is_adapted(name, self._inputs.adapter) and found != "F64" else found

    def numel(self, name: str) -> int:
        """Return a tensor's number of elements."""
        return self._inputs.weights.numel(name)

    def read_flat(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with the merged elements from ``start`` on; of rows that are cut, the part within."""
        weights, stored = self._inputs.source(name)
        if not is_adapted(name, self._inputs.adapter):
            weights.read_flat(stored, start, out)
            return
        columns = self._inputs.weights.shape(name)[1]
        first, last = start // columns, -(-(start + len(out)) // columns)
        block = torch.empty((last - first) * columns, dtype=DTYPES[weights.dtype(stored)])
        weights.read_flat(stored, first * columns, block)
        inputs, rows = self._inputs, slice(first, last)
        merged = merged_rows(name, rows, block.view(-1, columns), inputs.adapter, inputs.tensors)
        begin = start - first * columns
        out.copy_(merged.reshape(-1)[begin : begin + len(out)])

    def release(self, name: str) -> None:
        """Do nothing: the base's own reader drops what all have read."""


def is_adapted(name: str, adapter: Adapter) -> bool:
    """Return whether an adapter changes a Hugging Face tensor."""
    return name.endswith(".weight") and module_name(name) in adapter.modules


def weight_delta(name: str, rows: slice, adapter: Adapter, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return these rows of ``scale x B A``, what an adapter adds to a Hugging Face tensor, in fp32."""
    module = module_name(name)
    a, b = (tensors[factor].float() for factor in adapter_tensors(module))
    if module == EMBED_TOKENS:  # of an embedding A has the vocabulary
        return (a.T[rows] @ b.T).mul_(adapter.scale)
    return (b[rows] @ a).mul_(adapter.scale)


def merged_rows(
    name: str, rows: slice, weight: Tensor, adapter: Adapter, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Return rows of a Hugging Face tensor with the adapter, at least in fp32.

    Args:
        name: of the tensor.
        rows: of it.
        weight: these rows of the base. DoRA's lengths are rounded to its dtype, and divide the magnitudes in the dtype
            that those are stored in or the weight's, the wider: as in training and in PEFT.
        adapter: options.
        tensors: of the adapter, by PEFT's names.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    merged = weight_delta(name, rows, adapter, tensors).to(exact).add_(weight)
    if adapter.dora:
        magnitude = tensors[f"{PEFT}{module_name(name)}{MAGNITUDE}"][rows]
        merged *= (magnitude / merged.norm(dim=1).to(weight.dtype))[:, None].to(exact)
    return merged
