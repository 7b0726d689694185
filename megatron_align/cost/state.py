"""Memory of the training state: weights, gradients and optimizer state of one rank.

Trained weights and their gradients are stored in megatron-core's buffers, which its distributed optimizer pads: every
tensor starts at a multiple of 64 elements, every bucket ends at one that divides evenly over data x context ranks.
Weights that are not trained (the base of an adapter, ``model.freeze``) are in no buffer, and have nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod

from megatron_align.cost.placement import Chunk, Placement
from megatron_align.hf.adapter import REWARD_HEAD, adapter_table
from megatron_align.model.families import TABLES, ModelShape, local_shape, rows
from megatron_align.model.families.adapter import Adapter, layer_of, start_rows
from megatron_align.model.families.saved_modules import is_tied_copy
from megatron_align.model.tied_embedding import EMBEDDING, has_row

GRADIENT = 4  # bytes: gradients are summed in fp32
MOMENTS = 8  # bytes: Adam's two, fp32
MASTER = 4  # bytes: the fp32 master copy of a bf16 weight
_ALIGNED = 64
_BUCKET = 128


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of the training state on one rank."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Sum of weights, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(placement: Placement, stage: int) -> StateBytes:
    """Return the training state of each rank of a pipeline stage.

    The optimizer's share of the buffers' padding is counted, although it may hold none of it: a few bytes too many.
    fp32 weights are their own master copies. A frozen reference is not included (see :func:`parameter_bytes`).
    """
    chunks = placement.chunks(stage)
    elements = sum(_buffer_elements(placement, chunk) for chunk in chunks)
    frozen = sum(sum(_frozen(placement, chunk)) for chunk in chunks)
    per_element = MOMENTS + (MASTER if placement.precision == "bf16" else 0)
    return StateBytes(
        parameters=(elements + frozen) * placement.itemsize,
        gradients=elements * GRADIENT,
        optimizer=elements // placement.shard_ranks * per_element,
    )


def parameter_bytes(placement: Placement, stage: int) -> int:
    """Return the bytes of a stage's weights on each rank without buffer padding, as a live reference holds them."""
    elements = sum(size for chunk in placement.chunks(stage) for _, size in _named(placement, chunk))
    return elements * placement.itemsize


def parameter_count(shape: ModelShape) -> int:
    """Return the number of parameters of a model, without vocabulary padding; a tied embedding counts once."""
    ends, layer = 0, 0
    for row in TABLES[shape.architecture]:
        count = sum(prod(size) for size in row.hf_shapes(shape))
        if "{i}" in row.megatron:
            layer += count
        elif has_row(row.megatron, shape):
            ends += count
    return ends + layer * shape.num_layers


def trained_count(shape: ModelShape, adapter: Adapter | None, frozen: frozenset[str]) -> int:
    """Return the number of parameters that are trained, without vocabulary padding; a tied embedding counts once."""
    if adapter is not None:
        return sum(prod(row.hf_shapes(shape)[0]) for row in adapter_table(shape, adapter))
    trained = [row for row in rows(shape) if row.megatron not in frozen]
    return sum(prod(size) for row in trained for size in row.hf_shapes(shape))


@lru_cache(maxsize=64)
def _sizes_by_name(shape: ModelShape, tensor: int) -> tuple[tuple[str, int | None, int], ...]:
    """Return name, layer (None: of no layer) and elements on one rank of every tensor of a model."""
    return tuple((row.megatron, layer_of(row), prod(local_shape(row, shape, tensor))) for row in rows(shape))


@lru_cache(maxsize=64)
def _adapter_sizes(
    shape: ModelShape, adapter: Adapter, tensor: int
) -> tuple[tuple[str, int | None, int], ...]:
    """Return name, layer (None: of no layer) and elements on one rank of every A, B, copy and reward head."""
    table = adapter_table(shape, adapter, tensor)
    return tuple((row.megatron, layer_of(row), prod(local_shape(row, shape, tensor))) for row in table)


@lru_cache(maxsize=64)
def _start_sizes(shape: ModelShape, adapter: Adapter, tensor: int) -> tuple[tuple[str, int | None, int], ...]:
    """Return the same of what A and B started with, where the base lacks it."""
    table = start_rows(shape, adapter, tensor)
    return tuple((row.megatron, layer_of(row), prod(local_shape(row, shape, tensor))) for row in table)


def _of_chunk(sizes: tuple[tuple[str, int | None, int], ...], chunk: Chunk) -> list[int]:
    """Return the elements of the tensors of an adapter that a chunk holds."""
    layers = range(chunk.first, chunk.first + chunk.layers)
    return [
        size
        for name, layer, size in sizes
        if (
            layer in layers
            if layer is not None
            else chunk.embeds
            if name.startswith("embedding.")
            else chunk.ends
        )
    ]


def _named(placement: Placement, chunk: Chunk) -> list[tuple[str, int]]:
    """Return name and elements of every tensor of a chunk on one tensor-parallel rank, without an adapter."""
    named = []
    for name, layer, size in _sizes_by_name(placement.shape, placement.parallel.tensor):
        if layer is not None:
            held = chunk.first <= layer < chunk.first + chunk.layers
        else:
            held = chunk.embeds if name == EMBEDDING else chunk.ends
        if held:
            named.append((name, size))
        if name == EMBEDDING and chunk.ends and placement.tied_copies:
            named.append((EMBEDDING, size))
    return named


def _trained(placement: Placement, chunk: Chunk) -> list[int]:
    """Return the elements of every trained tensor of a chunk on one tensor-parallel rank."""
    shape, ranks, adapter = placement.shape, placement.parallel.tensor, placement.adapter
    if adapter is None:
        return [size for name, size in _named(placement, chunk) if name not in placement.frozen]
    sizes = _of_chunk(_adapter_sizes(shape, adapter, ranks), chunk)
    if chunk.ends and placement.tied_copies and is_tied_copy(shape, adapter):
        sizes.append(_embedding_size(placement, chunk))
    return sizes


def _frozen(placement: Placement, chunk: Chunk) -> list[int]:
    """Return the elements of every tensor of a chunk that is not trained, on one tensor-parallel rank."""
    named = _named(placement, chunk)
    if placement.adapter is None:
        return [size for name, size in named if name in placement.frozen]
    base = [size for name, size in named if name != REWARD_HEAD]
    return base + _of_chunk(
        _start_sizes(placement.shape, placement.adapter, placement.parallel.tensor), chunk
    )


def _buffer_elements(placement: Placement, chunk: Chunk) -> int:
    """Return the elements of a chunk's buffer; a tied embedding that two stages share has a separate bucket."""
    sizes = _trained(placement, chunk)
    buckets = [sizes]
    adapter = placement.adapter
    trains_embedding = EMBEDDING not in placement.frozen
    if adapter is not None:
        trains_embedding = is_tied_copy(placement.shape, adapter)
    if placement.tied_copies and (chunk.embeds or chunk.ends) and trains_embedding:
        shared = _embedding_size(placement, chunk)
        sizes.remove(shared)
        buckets.append([shared])
    return sum(_bucket_elements(bucket, placement.shard_ranks) for bucket in buckets)


def _embedding_size(placement: Placement, chunk: Chunk) -> int:
    """Return the elements of a tied embedding that a chunk holds, on one tensor-parallel rank."""
    return next(size for name, size in _named(placement, chunk) if name == EMBEDDING)


def _bucket_elements(sizes: list[int], ranks: int) -> int:
    """Return the padded number of elements of a bucket, which does not depend on the order of its tensors."""
    aligned = sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)
    multiple = lcm(_BUCKET, ranks)
    return -(-aligned // multiple) * multiple
