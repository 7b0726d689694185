"""A checkpoint's tensors, read into a model and its optimizer where they are, on any layout.

megatron-core says which box of which stored tensor each of this rank's parameters is. Each rank reads the boxes it
holds, and of masters and moments the stretch that it owns among its data-parallel ranks, straight into its own memory.
megatron-core's own loading would have every data-parallel rank read them whole, into memory of their own size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_align.checkpoint.chunk_reader import ChunkReader
from megatron_align.checkpoint.metadata import Chunk, Stored, read_stored
from megatron_align.errors import InputError

_THREADS = 4  # pieces read at once: more than one core needs, so that the disk has something to do
_OPTIMIZER = "optimizer.state"  # before the names of masters and moments


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a flattened box of a stored tensor, and the memory that takes it.

    Args:
        key: of the stored tensor.
        global_shape: of the whole tensor, as this layout has it.
        offsets: of the box in the tensor.
        sizes: of the box.
        stacked: leading dimensions in which the box is one: the layer.
        may_differ: the tensor may be of another height, filled up: what is not stored becomes zero.
        start: first element of the box that is wanted.
        target: ``[elements]``, contiguous, on any device.
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stacked: int
    may_differ: bool
    start: int
    target: Tensor


def model_pieces(state: dict[str, Any]) -> Iterator[Piece]:
    """Yield what a model's sharded state dict wants."""
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            for box in _boxes(entry):
                yield _piece(box, 0, box.data.detach().view(-1))


def optimizer_pieces(states: Sequence[dict[str, Any]], optimizer: DistributedOptimizer) -> Iterator[Piece]:
    """Yield what this rank wants of masters and moments; ``states`` are those of its model's chunks."""
    entries = {id(entry.data): entry for state in states for entry in nested_values(state)}
    for ranges in optimizer.gbuf_ranges:
        for bucket in (bucket for buckets in ranges.values() for bucket in buckets):
            for parameter, place in bucket["param_map"].items():
                own = optimizer._get_main_param_and_optimizer_states(parameter)
                entry = entries[id(parameter)]
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    # The whole parameter, without memory: its boxes know where in it they begin.
                    whole = torch.empty(entry.data.shape, dtype=torch.float32, device="meta")
                    key = f"{_OPTIMIZER}.{name}.{entry.key}"
                    like = replace(entry, key=key, data=whole, **_dtype_of(entry))
                    for box in _boxes(like):
                        yield from _owned(box, place["param"], own[name].detach())


def _dtype_of(entry: ShardedTensor | ShardedTensorFactory) -> dict[str, Any]:
    return {"dtype": torch.float32} if isinstance(entry, ShardedTensor) else {}


def _boxes(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Return the boxes that a parameter is stored in: gate and up lie apart."""
    return entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]


def _owned(box: ShardedTensor, owned: Any, shard: Tensor) -> Iterator[Piece]:
    """Yield the part of a box that lies in the stretch ``owned`` of its flattened parameter, if any does."""
    begin = box.data.storage_offset()
    start, stop = max(owned.start, begin), min(owned.end, begin + box.data.numel())
    if start < stop:
        yield _piece(box, start - begin, shard[start - owned.start : stop - owned.start])


def _piece(box: ShardedTensor, start: int, target: Tensor) -> Piece:
    return Piece(
        key=box.key,
        global_shape=tuple(box.global_shape),
        offsets=tuple(box.global_offset),
        sizes=(1,) * box.prepend_axis_num + tuple(box.local_shape),
        stacked=box.prepend_axis_num,
        may_differ=box.allow_shape_mismatch,
        start=start,
        target=target,
    )


def read_pieces(state: Path, pieces: Sequence[Piece]) -> None:
    """Fill every piece's memory.

    Raises:
        InputError: a tensor is missing, of another shape, not all there, or cannot be read.
    """
    stored = read_stored(state)
    keys = {piece.key for piece in pieces}
    if missing := sorted(keys - stored.keys()):
        raise InputError(f"the checkpoint must hold this model, it lacks {', '.join(missing)} in {state}")
    for piece in pieces:
        wanted, found = list(piece.global_shape), list(stored[piece.key].shape)
        if piece.may_differ:
            wanted[piece.stacked] = found[piece.stacked]
        if wanted != found:
            raise InputError(f"{piece.key} must be {wanted}, found {found} in {state}")
    readers = {key: ChunkReader(state, key, stored[key].dtype) for key in keys}
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda piece: _fill(piece, stored[piece.key], readers[piece.key]), pieces))


def _fill(piece: Piece, stored: Stored, reader: ChunkReader) -> None:
    dim, target = piece.stacked, piece.target
    width = math.prod(piece.sizes[dim + 1 :])
    if piece.may_differ:
        target.zero_()
        target = target[: max(0, (stored.shape[dim] - piece.offsets[dim]) * width - piece.start)]
    rows = range(piece.start // width, -(-(piece.start + len(target)) // width))
    met = [part for chunk in stored.chunks if (part := _meet(piece, rows, chunk))]
    if all(_same_columns(piece, part.chunk) for part in met):
        missing = len(target)
        for part in met:
            start = max(piece.start, part.rows.start * width)
            stop = min(piece.start + len(target), part.rows.stop * width)
            shift = (part.chunk.offsets[dim] - piece.offsets[dim]) * width
            _read(reader, part.chunk, start - shift, target[start - piece.start : stop - piece.start])
            missing -= stop - start
    else:
        box, missing = _read_columns(piece, rows, met, reader)
        skipped = piece.start - rows.start * width
        target.copy_(box.view(-1)[skipped : skipped + len(target)])
    if missing:
        raise InputError(
            f"a complete checkpoint is needed, {missing:,} numbers of {piece.key} are in no chunk of "
            f"{reader.state}"
        )


class _Part(NamedTuple):
    """A chunk, and the rows of a box that it holds (some columns of)."""

    chunk: Chunk
    rows: range


def _meet(piece: Piece, rows: range, chunk: Chunk) -> _Part | None:
    """Return which of a box's ``rows`` a chunk holds; None: none."""
    dim = piece.stacked
    for i, (offset, size, other, extent) in enumerate(
        zip(piece.offsets, piece.sizes, chunk.offsets, chunk.sizes, strict=True)
    ):
        if i != dim and not max(offset, other) < min(offset + size, other + extent):
            return None
    shift = chunk.offsets[dim] - piece.offsets[dim]
    low, high = max(rows.start, shift), min(rows.stop, shift + chunk.sizes[dim])
    return _Part(chunk, range(low, high)) if low < high else None


def _same_columns(piece: Piece, chunk: Chunk) -> bool:
    tail = piece.stacked + 1
    return chunk.offsets[tail:] == piece.offsets[tail:] and chunk.sizes[tail:] == piece.sizes[tail:]


def _read(reader: ChunkReader, chunk: Chunk, start: int, out: Tensor) -> None:
    """Read a chunk's elements from ``start`` on: straight into ``out`` where bytes can go there as they are."""
    if out.device.type == "cpu" and out.dtype == reader.dtype:
        reader.read(chunk, start, out)
        return
    host = torch.empty(len(out), dtype=reader.dtype)
    reader.read(chunk, start, host)
    out.copy_(host)


def _read_columns(piece: Piece, rows: range, met: list[_Part], reader: ChunkReader) -> tuple[Tensor, int]:
    """Return ``rows`` of a box that chunks cut along columns hold, and how many of its elements none did."""
    dim = piece.stacked
    box = torch.empty(len(rows), *piece.sizes[dim + 1 :], dtype=reader.dtype)
    missing = box.numel()
    for chunk, held in met:
        theirs = torch.empty(len(held), *chunk.sizes[dim + 1 :], dtype=reader.dtype)
        first = held.start + piece.offsets[dim] - chunk.offsets[dim]
        reader.read(chunk, first * math.prod(theirs.shape[1:]), theirs)
        mine = box[held.start - rows.start : held.stop - rows.start]
        for i in range(1, box.ndim):
            offset, other = piece.offsets[dim + i], chunk.offsets[dim + i]
            start, stop = (
                max(offset, other),
                min(offset + piece.sizes[dim + i], other + chunk.sizes[dim + i]),
            )
            mine = mine.narrow(i, start - offset, stop - start)
            theirs = theirs.narrow(i, start - other, stop - start)
        mine.copy_(theirs)
        missing -= mine.numel()
    return box, missing
