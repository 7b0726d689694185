"""Read ranges of a checkpoint's stored tensors into memory, however the tensors are cut into shards on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_align.checkpoint.tensor_reader import StoredTensorReader
from megatron_align.checkpoint.torch_metadata import StoredShard, StoredTensor, read_stored_tensors
from megatron_align.errors import InputError, listed

_THREADS = 4  # concurrent reads: more than one core needs, to keep the disk busy


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A range of a flattened box of a stored tensor, and the memory to read it into.

    Args:
        key: of the stored tensor.
        global_shape: of the entire tensor, in this layout.
        offsets: of the box in the tensor.
        sizes: of the box.
        layer_dims: number of leading dimensions in which the box has size 1: the layer.
        allow_padding: the stored tensor may have another number of rows (vocabulary padding); missing rows become
            zero.
        start: first requested element of the flattened box.
        target: ``[elements]``, contiguous, on any device.
    """

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    layer_dims: int
    allow_padding: bool
    start: int
    target: Tensor


def read_tensors(state: Path, requests: Sequence[ReadRequest]) -> None:
    """Fill the memory of every request.

    Raises:
        InputError: a tensor is missing, incomplete or unreadable, or has another shape.
    """
    stored = read_stored_tensors(state)
    keys = {request.key for request in requests}
    if missing := sorted(keys - stored.keys()):
        raise InputError(f"checkpoint does not match the model: missing {listed(missing)} in {state}")
    for request in requests:
        expected, actual = list(request.global_shape), list(stored[request.key].shape)
        if request.allow_padding:
            expected[request.layer_dims] = actual[request.layer_dims]
        if expected != actual:
            raise InputError(f"{request.key} must have shape {expected}, found {actual} in {state}")
    readers = {key: StoredTensorReader(state, key, stored[key].dtype) for key in keys}
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda request: _read(request, stored[request.key], readers[request.key]), requests))


def _read(request: ReadRequest, stored: StoredTensor, reader: StoredTensorReader) -> None:
    dim, target = request.layer_dims, request.target
    width = math.prod(request.sizes[dim + 1 :])
    if request.allow_padding:
        target.zero_()
        target = target[: max(0, (stored.shape[dim] - request.offsets[dim]) * width - request.start)]
    rows = range(request.start // width, -(-(request.start + len(target)) // width))
    overlaps = [overlap for shard in stored.shards if (overlap := _overlap(request, rows, shard))]
    if all(_has_same_columns(request, overlap.shard) for overlap in overlaps):
        missing = len(target)
        for overlap in overlaps:
            start = max(request.start, overlap.rows.start * width)
            stop = min(request.start + len(target), overlap.rows.stop * width)
            shift = (overlap.shard.offsets[dim] - request.offsets[dim]) * width
            out = target[start - request.start : stop - request.start]
            _read_range(reader, overlap.shard, start - shift, out)
            missing -= stop - start
    else:
        box, missing = _read_columns(request, rows, overlaps, reader)
        skipped = request.start - rows.start * width
        target.copy_(box.view(-1)[skipped : skipped + len(target)])
    if missing:
        raise InputError(
            f"checkpoint is incomplete: {missing:,} elements of {request.key} are in no shard of {reader.state}"
        )


class _Overlap(NamedTuple):
    """A shard, and the rows of a requested box that it holds, completely or some columns of them."""

    shard: StoredShard
    rows: range


def _overlap(request: ReadRequest, rows: range, shard: StoredShard) -> _Overlap | None:
    """Return which of a box's ``rows`` a shard holds; None: none."""
    dim = request.layer_dims
    for i, (offset, size, other, extent) in enumerate(
        zip(request.offsets, request.sizes, shard.offsets, shard.sizes, strict=True)
    ):
        if i != dim and not max(offset, other) < min(offset + size, other + extent):
            return None
    shift = shard.offsets[dim] - request.offsets[dim]
    low, high = max(rows.start, shift), min(rows.stop, shift + shard.sizes[dim])
    return _Overlap(shard, range(low, high)) if low < high else None


def _has_same_columns(request: ReadRequest, shard: StoredShard) -> bool:
    tail = request.layer_dims + 1
    return shard.offsets[tail:] == request.offsets[tail:] and shard.sizes[tail:] == request.sizes[tail:]


def _read_range(reader: StoredTensorReader, shard: StoredShard, start: int, out: Tensor) -> None:
    """Read a shard's elements from ``start`` on, directly into ``out`` where device and dtype allow it."""
    if out.device.type == "cpu" and out.dtype == reader.dtype:
        reader.read(shard, start, out)
        return
    host = torch.empty(len(out), dtype=reader.dtype)
    reader.read(shard, start, host)
    out.copy_(host)


def _read_columns(
    request: ReadRequest, rows: range, overlaps: list[_Overlap], reader: StoredTensorReader
) -> tuple[Tensor, int]:
    """Return ``rows`` of a box whose shards are cut along columns, and how many of its elements no shard holds."""
    dim = request.layer_dims
    box = torch.empty(len(rows), *request.sizes[dim + 1 :], dtype=reader.dtype)
    missing = box.numel()
    for shard, held in overlaps:
        theirs = torch.empty(len(held), *shard.sizes[dim + 1 :], dtype=reader.dtype)
        first = held.start + request.offsets[dim] - shard.offsets[dim]
        reader.read(shard, first * math.prod(theirs.shape[1:]), theirs)
        mine = box[held.start - rows.start : held.stop - rows.start]
        for i in range(1, box.ndim):
            offset, other = request.offsets[dim + i], shard.offsets[dim + i]
            start = max(offset, other)
            stop = min(offset + request.sizes[dim + i], other + shard.sizes[dim + i])
            mine = mine.narrow(i, start - offset, stop - start)
            theirs = theirs.narrow(i, start - other, stop - start)
        mine.copy_(theirs)
        missing -= mine.numel()
    return box, missing
