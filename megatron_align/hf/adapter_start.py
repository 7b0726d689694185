"""Adapters that start with a part of the base (PiSSA): computed from the sharded base, and converted to plain ones.

The base is W, what A and B started with A0 and B0. Training holds ``W - scale x B0 A0`` in place of W, so that the
model starts as the base. Outside of training the adapter is one of W with twice the rank, as PEFT converts it:
``B A - B0 A0 = [B, -B0] [A; A0]``.

Shapes: O outputs and I inputs of a module, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.model.adapter_start import principal_factors
from megatron_align.model.families import Row, to_hf
from megatron_align.model.families.adapter import (
    START,
    Adapter,
    adaptable_rows,
    adapter_tensors,
    module_name,
)
from megatron_align.model.layer_adapter import LayerAdapter
from megatron_align.model.lora import reduce_bases
from megatron_align.model.policy import Policy

Factors = tuple[Tensor, Tensor]  # A [R, I] and B [O, R]


@dataclass(frozen=True, slots=True)
class _Layer:
    """An adapted layer of this rank's stage: row of its weight, its adapter and its shard of the weight."""

    row: Row
    adapter: LayerAdapter
    weight: Tensor


@torch.no_grad()
def start_with_base(chunks: Sequence[Policy]) -> None:
    """Start A and B of every module with the largest singular values of its weight, which are taken out of the base.

    Collective. Each layer's weight is gathered and decomposed by one of the ranks that hold its stage, the layers being
    distributed over them, and A and B are then sent to the others: all have the same. A rank holds as many gathered
    layers as fit one: its own.
    """
    adapter, groups = chunks[0].adapter, chunks[0].pg_collection
    assert adapter is not None, "the model has an adapter"
    layers = list(_layers(chunks))
    tensor, replicas = groups.tp, groups.dp_cp
    found: dict[str, Factors] = {}
    for first in range(0, len(layers), tensor.size()):
        batch = layers[first : first + tensor.size()]
        if (first // tensor.size()) % replicas.size() != replicas.rank():
            continue
        own: dict[str, Tensor] = {}
        for place, layer in enumerate(batch):
            shards = [torch.empty_like(layer.weight) for _ in range(tensor.size())]
            dist.all_gather(shards, layer.weight.detach().contiguous(), group=tensor)
            if place == tensor.rank():
                own = to_hf(layer.row, shards, chunks[0].shape)
        for name, weight_OI in own.items():
            if module_name(name) in adapter.modules:
                found[name] = principal_factors(weight_OI, adapter.rank, adapter.scale, adapter.init)
    for number, layer in enumerate(layers):
        batch_number, place = divmod(number, tensor.size())
        _set_start(layer, adapter, found, (place, batch_number % replicas.size()), chunks[0])
    reduce_bases(chunks)
    for layer in layers:
        layer.adapter.initialise_magnitudes()


def _layers(chunks: Sequence[Policy]) -> Iterator[_Layer]:
    for chunk in chunks:
        adapters, weights = chunk.layer_adapters(), chunk.base_parameters()
        for row in adaptable_rows(chunk.shape):
            if row.megatron in adapters:
                yield _Layer(row, adapters[row.megatron], weights[row.megatron])


def _set_start(
    layer: _Layer, adapter: Adapter, found: Mapping[str, Factors], owner: tuple[int, int], chunk: Policy
) -> None:
    """Send A and B of a layer's modules from the rank that computed them, and set this rank's part of each.

    Args:
        layer: whose modules are set.
        adapter: of the model.
        found: A and B by tensor, where this rank is the owner.
        owner: tensor rank and replica that has them.
        chunk: one of this rank's chunks.
    """
    groups, weight = chunk.pg_collection, layer.weight
    for name, (outputs, inputs) in zip(layer.row.hf, layer.row.hf_shapes(chunk.shape), strict=True):
        if module_name(name) not in adapter.modules:
            continue
        pair = layer.adapter.pair_of(module_name(name))
        empty = (weight.new_empty(adapter.rank, inputs), weight.new_empty(outputs, adapter.rank))
        factors = [factor.to(weight.dtype).contiguous() for factor in found.get(name, empty)]
        for factor in factors:
            if groups.tp.rank() == owner[0]:
                _broadcast(factor, owner[1], groups.dp_cp)
            _broadcast(factor, owner[0], groups.tp)
        pair.set_start(*factors)


def _broadcast(tensor: Tensor, source: int, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.broadcast(tensor, dist.get_process_group_ranks(group)[source], group=group)


def plain_adapter(adapter: Adapter) -> Adapter:
    """Return the adapter of the unchanged base that computes the same, of twice the rank and the same scale."""
    if not adapter.holds_start:
        return adapter
    factor = math.sqrt(2) if adapter.rslora else 2
    return replace(adapter, rank=2 * adapter.rank, alpha=factor * adapter.alpha, init="default")


def plain_tensors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of :func:`plain_adapter` from those of training, by PEFT's names."""
    plain = {name: tensor for name, tensor in tensors.items() if START not in name}
    for module in adapter.modules if adapter.holds_start else ():
        name_a, name_b = adapter_tensors(module)
        plain[name_a] = torch.cat([tensors[name_a], tensors[name_a.replace(".lora_", START)]])
        plain[name_b] = torch.cat([tensors[name_b], -tensors[name_b.replace(".lora_", START)]], 1)
    return plain


def halves(
    plain: Adapter, tensors: Mapping[str, Tensor]
) -> tuple[tuple[Adapter, dict[str, Tensor]], tuple[Adapter, dict[str, Tensor]]]:
    """Return from a plain adapter the one that takes the start out of the base, and the one that was trained then."""
    rank = plain.rank // 2
    factor = math.sqrt(2) if plain.rslora else 2
    trained = replace(plain, rank=rank, alpha=plain.alpha / factor)
    second, first = {}, dict(tensors)
    for module in plain.modules:
        name_a, name_b = adapter_tensors(module)
        first[name_a], second[name_a] = tensors[name_a][:rank], tensors[name_a][rank:]
        first[name_b], second[name_b] = tensors[name_b][:, :rank], tensors[name_b][:, rank:]
    return (replace(trained, dora=False), second), (trained, first)
