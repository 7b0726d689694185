"""Bytes of weights, gradients and optimizer: what a rank holds from the first step to the last.

Weights and gradients lie in megatron-core's buffers, which its distributed optimizer pads: every tensor begins at a
multiple of 64 elements, every bucket ends at one that data x context ranks share equally.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod

from megatron_align.cost.placement import Chunk, Placement
from megatron_align.model.families import TABLES, ModelShape, Row, local_shape

GRADIENT = 4  # bytes: gradients are summed in fp32
MOMENTS = 8  # bytes: two of Adam's, fp32
MASTER = 4  # bytes: the fp32 copy that a bf16 weight is updated through
_ALIGNED = 64
_BUCKET = 128
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_AT_END = ("decoder.final_layernorm.weight", HEAD, "reward_head.weight")


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Of one rank, in bytes."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(placement: Placement, stage: int) -> StateBytes:
    """Return what each rank of a pipeline stage holds (the last few bytes of padding are no rank's optimizer's).

    fp32 weights are their own masters; a frozen reference is not among this (see :func:`parameter_bytes`).
    """
    elements = sum(_buffer_elements(placement, chunk) for chunk in placement.chunks(stage))
    kept = MOMENTS + (MASTER if placement.precision == "bf16" else 0)
    return StateBytes(
        parameters=elements * placement.itemsize,
        gradients=elements * GRADIENT,
        optimizer=elements // placement.shard_ranks * kept,
    )


def parameter_bytes(placement: Placement, stage: int) -> int:
    """Return the bytes of a stage's weights on each rank, outside of any buffer: what a live reference takes."""
    elements = sum(sum(tensors(placement, chunk)) for chunk in placement.chunks(stage))
    return elements * placement.itemsize


def parameter_count(shape: ModelShape) -> int:
    """Return the number of weights of a model, without vocabulary padding; a tied embedding counts once."""
    ends, layer = 0, 0
    for row in TABLES[shape.architecture]:
        count = sum(prod(size) for size in row.hf_shapes(shape))
        if _of_layer(row):
            layer += count
        elif not (row.megatron == HEAD and shape.tied_embeddings):
            ends += count
    return ends + layer * shape.num_layers


def tensors(placement: Placement, chunk: Chunk) -> list[int]:
    """Return the elements of every tensor of a chunk, on one tensor-parallel rank."""
    layer, first, last = _local_elements(placement.shape, placement.parallel.tensor)
    found = list(layer) * chunk.layers
    if chunk.embeds:
        found += first
    if chunk.ends:
        found += last
        if placement.tied_copies:
            found += first
    return found


@lru_cache(maxsize=64)
def _local_elements(shape: ModelShape, tensor: int) -> tuple[tuple[int, ...], ...]:
    """Return the elements on one rank of the tensors of a layer, of the embedding, and of what follows the layers."""
    rows = TABLES[shape.architecture]

    def sizes(wanted: list[Row]) -> tuple[int, ...]:
        return tuple(prod(local_shape(row, shape, tensor)) for row in wanted)

    ends = [row for row in rows if row.megatron in _AT_END]
    if shape.tied_embeddings:
        ends = [row for row in ends if row.megatron != HEAD]
    return (
        sizes([row.at(0) for row in rows if _of_layer(row)]),
        sizes([row for row in rows if row.megatron == EMBEDDING]),
        sizes(ends),
    )


def _of_layer(row: Row) -> bool:
    return "{i}" in row.megatron


def _buffer_elements(placement: Placement, chunk: Chunk) -> int:
    """Return the elements of a chunk's buffer; a tied embedding that two stages hold has a bucket of its own."""
    found = tensors(placement, chunk)
    buckets = [found]
    if placement.tied_copies and (chunk.embeds or chunk.ends):
        [shared] = _local_elements(placement.shape, placement.parallel.tensor)[1]
        found.remove(shared)
        buckets.append([shared])
    return sum(_bucket_elements(bucket, placement.shard_ranks) for bucket in buckets)


def _bucket_elements(sizes: list[int], ranks: int) -> int:
    """Return the padded length of a bucket; the order of its tensors does not matter."""
    aligned = sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)
    multiple = lcm(_BUCKET, ranks)
    return -(-aligned // multiple) * multiple
