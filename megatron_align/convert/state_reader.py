"""Read a checkpoint's weights as Hugging Face tensors, row by row of the weight table, without a model.

Stored tensors are those of a single tensor rank: megatron-core writes every layout's shards as parts of them. Layers
are stacked: ``decoder.layers.mlp.linear_fc2.weight`` is ``[layers, ...]``.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_align.checkpoint.tensor_reader import FileRange, StoredTensorReader
from megatron_align.checkpoint.torch_metadata import (
    CRITIC,
    OPTIMIZER,
    REFERENCE,
    StoredShard,
    StoredTensor,
    read_stored_tensors,
)
from megatron_align.errors import InputError, listed
from megatron_align.model.families import ModelShape, Row, copy_segments, local_shape, rows
from megatron_align.storage.atomic_write import advise_page_cache

_LAYERS = "decoder.layers."
_TAIL_BYTES = 64 << 10  # more than the file list at the end of a zip


def state_key(megatron: str) -> tuple[str, int | None]:
    """Return the key that a tensor is stored under, and its index in the stack of layers."""
    if not megatron.startswith(_LAYERS):
        return megatron, None
    layer, rest = megatron.removeprefix(_LAYERS).split(".", 1)
    return _LAYERS + rest, int(layer)


class TensorBlock(NamedTuple):
    """An HF tensor's elements from ``start`` on, one-dimensional, and the file ranges read for it."""

    name: str
    start: int
    elements: Tensor
    ranges: list[FileRange]


class StateReader:
    """Read the weights of a checkpoint of any layout, by the rows of the weight table.

    Args:
        state: the state folder.
        shape: of the model.
        table: rows of all tensors that the checkpoint holds; None: the model's.

    Raises:
        InputError: the state is incomplete or does not match the model; every wrong tensor is named.
    """

    def __init__(
        self, state: Path, shape: ModelShape, table: Sequence[Row] | None = None, *, prefix: str = ""
    ) -> None:
        self.state, self.shape = state, shape
        self.table = list(rows(shape)) if table is None else list(table)
        self._stored = dict(_by_layer(_model_tensors(read_stored_tensors(state), prefix), state))
        self._check_names()
        self._check_shapes()
        self._check_files()
        # Where in a shard its elements begin is recorded at its end, which is therefore prefetched.
        self._next = dict(pairwise(shard for row in self.table for shard in self._shards(row)))

    def dtype(self, row: Row) -> torch.dtype:
        """Return the stored dtype of a row."""
        return self._stored[row.megatron].dtype

    def group_bytes(self, row: Row) -> int:
        """Return the total bytes of a row's HF tensors."""
        return sum(math.prod(size) for size in row.hf_shapes(self.shape)) * self.dtype(row).itemsize

    def can_stream(self, row: Row) -> bool:
        """Return whether a row is its HF tensors one after another, and its shards are complete rows of it."""
        stored, sizes = self._stored[row.megatron], row.hf_shapes(self.shape)
        segments = [segment for segment in copy_segments(row, self.shape, dim=0) if segment.name is not None]
        in_order = [(name, 0, size[0]) for name, size in zip(row.hf, sizes, strict=True)]
        complete = {tuple(stored.shape[1:]), *(tuple(shard.sizes[1:]) for shard in stored.shards)}
        return [(segment.name, segment.hf_start, segment.size) for segment in segments] == in_order and (
            complete == {size[1:] for size in sizes}  # no padding of columns
        )

    def weight_files(self) -> list[Path]:
        """Return the files that consist mostly of weights."""
        weights: Counter[str] = Counter()
        for row in self.table:
            for shard in self._stored[row.megatron].shards:
                weights[shard.file] += shard.length
        paths = {self.state / name: size for name, size in weights.items()}
        return [path for path, size in paths.items() if 2 * size > path.stat().st_size]

    def blocks(self, row: Row, buffers: Iterator[Tensor]) -> Iterator[TensorBlock]:
        """Yield all of a row's HF tensors, in blocks.

        Args:
            row: of the weight table.
            buffers: bytes; one for each block of a row that can be streamed, one for all tensors of another row,
                which must hold :meth:`group_bytes`.

        Raises:
            InputError: a shard cannot be read, or does not match the metadata.
        """
        if not self.can_stream(row):
            tensors, ranges = self._read(row, next(buffers))
            for name, tensor in tensors.items():
                yield TensorBlock(name, 0, tensor.view(-1), ranges)
                ranges = []
            return
        stored = self._stored[row.megatron]
        reader = StoredTensorReader(self.state, row.megatron, stored.dtype)
        width = math.prod(stored.shape[1:])
        for shard in self._shards(row):
            self._prefetch_next(shard)
            low = shard.offsets[0]
            for segment in copy_segments(row, self.shape, dim=0, within=(low, low + shard.sizes[0])):
                done, size = 0, segment.size * width
                while segment.name is not None and done < size:
                    block = next(buffers).view(stored.dtype)[: size - done]
                    ranges = [reader.read(shard, (segment.start - low) * width + done, block)]
                    yield TensorBlock(segment.name, segment.hf_start * width + done, block, ranges)
                    done += len(block)

    def read(self, row: Row, buffer: Tensor | None = None) -> dict[str, Tensor]:
        """Return a row's HF tensors; a tensor that is cut along columns takes the memory of one more shard.

        Args:
            row: of the weight table.
            buffer: bytes to hold the tensors, until it is used again.

        Raises:
            InputError: a shard cannot be read, or does not match the metadata.
        """
        return self._read(row, buffer)[0]

    def _shards(self, row: Row) -> list[StoredShard]:
        return sorted(self._stored[row.megatron].shards, key=lambda shard: shard.offsets)

    def _prefetch_next(self, shard: StoredShard) -> None:
        """Prefetch the end of the shard that is read after this one."""
        if (following := self._next.get(shard)) is not None:
            size = min(_TAIL_BYTES, following.length)
            end = following.start + following.length
            advise_page_cache(self.state / following.file, end - size, size, os.POSIX_FADV_WILLNEED)

    def _read(self, row: Row, buffer: Tensor | None) -> tuple[dict[str, Tensor], list[FileRange]]:
        """Return a row's HF tensors, and the file ranges that were read directly into them."""
        stored = self._stored[row.megatron]
        reader, ranges = StoredTensorReader(self.state, row.megatron, stored.dtype), []
        tensors = dict(zip(row.hf, _allocate(row.hf_shapes(self.shape), stored.dtype, buffer), strict=True))
        dim = row.split or 0
        for shard in self._shards(row):
            self._prefetch_next(shard)
            is_direct = dim == 0 and shard.sizes[1:] == stored.shape[1:]  # complete rows
            width = math.prod(shard.sizes[1:])
            data = None if is_direct else torch.empty(shard.sizes, dtype=stored.dtype)
            if data is not None:
                reader.read(shard, 0, data)
            low = shard.offsets[dim]
            for segment in copy_segments(row, self.shape, within=(low, low + shard.sizes[dim])):
                if segment.name is None:
                    continue
                target = segment.of_hf(tensors[segment.name])
                if data is None:
                    ranges.append(reader.read(shard, (segment.start - low) * width, target))
                    continue
                for other, (offset, size) in enumerate(zip(shard.offsets, shard.sizes, strict=True)):
                    if other != dim:
                        target = target.narrow(other, offset, size)
                target.copy_(data.narrow(dim, segment.start - low, segment.size))
        return tensors, ranges

    def _check_names(self) -> None:
        expected = {row.megatron for row in self.table}
        differences = {
            "missing": sorted(expected - self._stored.keys()),
            "unexpected": sorted(self._stored.keys() - expected),
        }
        found = [f"{kind} {listed(names)}" for kind, names in differences.items() if names]
        if found:
            raise InputError(
                f"checkpoint weights do not match {self.shape.architecture}: {'; '.join(found)} in {self.state}"
            )

    def _check_shapes(self) -> None:
        wrong = []
        for row in self.table:
            stored, expected = self._stored[row.megatron], list(local_shape(row, self.shape, 1))
            actual = list(stored.shape)
            if "vocab" in row.dims[0] and len(actual) == len(expected):
                dim = row.dims[0].index("vocab")  # of an embedding's A the last one
                if actual[dim] >= self.shape.vocab_size:
                    expected[dim] = actual[dim]  # padded for another number of tensor ranks
            if actual != expected:
                wrong.append(f"{row.megatron} must be {expected}, found {actual}")
            elif sum(math.prod(shard.sizes) for shard in stored.shards) != math.prod(actual):
                wrong.append(f"{row.megatron} must be {actual}, its shards do not cover it")
        if wrong:
            raise InputError(
                f"checkpoint tensor shapes do not match config.json: {listed(wrong, '; ')} in {self.state}"
            )

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for row in self.table:
            for shard in self._stored[row.megatron].shards:
                ends[shard.file] = max(ends.get(shard.file, 0), shard.start + shard.length)
        for name, end in sorted(ends.items()):
            path = self.state / name
            if not path.is_file():
                raise InputError(f"checkpoint is incomplete: no file {path}")
            if (size := path.stat().st_size) < end:
                raise InputError(
                    f"checkpoint is incomplete: {path} was truncated to {size:,} of {end:,} bytes"
                )


def _allocate(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, buffer: Tensor | None) -> list[Tensor]:
    """Return uninitialised tensors, one after another in ``buffer`` if it is given."""
    if buffer is None:
        return [torch.empty(shape, dtype=dtype) for shape in shapes]
    flat = buffer.view(dtype)
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]


def _model_tensors(stored: dict[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    """Return the tensors of the model whose names have a prefix; without one those of the trained model."""
    if prefix:
        return {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
    others = (OPTIMIZER, REFERENCE, CRITIC)
    return {key: tensor for key, tensor in stored.items() if not key.startswith(others)}


def _by_layer(stored: dict[str, StoredTensor], state: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield a model's tensors layer by layer."""
    for key, tensor in stored.items():
        if not key.startswith(_LAYERS) or key.removeprefix(_LAYERS).partition(".")[0].isdigit():
            yield key, tensor  # of no layer, or stored for one layer
            continue
        layers: list[list[StoredShard]] = [[] for _ in range(tensor.shape[0])]
        for shard in tensor.shards:
            if shard.sizes[0] != 1:
                held = range(shard.offsets[0], shard.offsets[0] + shard.sizes[0])
                raise InputError(f"a shard of {key} must hold one layer, found {list(held)} in {state}")
            layers[shard.offsets[0]].append(shard._replace(offsets=shard.offsets[1:], sizes=shard.sizes[1:]))
        for layer, shards in enumerate(layers):
            name = key.replace(_LAYERS, f"{_LAYERS}{layer}.", 1)
            yield name, StoredTensor(tensor.dtype, tensor.shape[1:], shards)
