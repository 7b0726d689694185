"""A checkpoint's weights as Hugging Face's tensors, read row by row of the weight table, without a model.

Tensors are those of one tensor rank: megatron-core writes every layout's shards as parts of them. Layers are
stacked: ``decoder.layers.mlp.linear_fc2.weight`` is ``[layers, ...]``.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_align.checkpoint.chunk_reader import ChunkReader, Source
from megatron_align.checkpoint.metadata import Chunk, Stored, read_stored
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, Row, copy_segments, local_shape, rows
from megatron_align.storage.atomic_write import advise

_LAYERS = "decoder.layers."
_TAIL = 64 << 10  # more than a zip's list of its files takes


def state_key(megatron: str) -> tuple[str, int | None]:
    """Return the name under which a tensor is stored, and its place in the stack of layers."""
    if not megatron.startswith(_LAYERS):
        return megatron, None
    layer, rest = megatron.removeprefix(_LAYERS).split(".", 1)
    return _LAYERS + rest, int(layer)


class Stretch(NamedTuple):
    """A tensor's elements from ``start`` on, one-dimensional, and what was read since the stretch before."""

    name: str
    start: int
    elements: Tensor
    sources: list[Source]


class StateReader:
    """The weights of a checkpoint, of any layout, by the rows of the weight table.

    Raises:
        InputError: the state is incomplete, or not that of the model: all its tensors at fault are named.
    """

    def __init__(self, state: Path, shape: ModelShape) -> None:
        self.state, self.shape = state, shape
        self._stored = dict(_by_layer(read_stored(state), state))
        self._check_names()
        self._check_shapes()
        self._check_files()
        # Where in a chunk its numbers begin is told at its end, so that is fetched ahead.
        self._next = dict(pairwise(chunk for row in rows(shape) for chunk in self._chunks(row)))

    def dtype(self, row: Row) -> torch.dtype:
        """Return the dtype that a row is stored in."""
        return self._stored[row.megatron].dtype

    def group_bytes(self, row: Row) -> int:
        """Return the bytes of a row's HF tensors."""
        return sum(math.prod(size) for size in row.hf_shapes(self.shape)) * self.dtype(row).itemsize

    def streams(self, row: Row) -> bool:
        """Tell whether a row is whole HF tensors, one after the other, and its chunks are whole rows of it."""
        stored, sizes = self._stored[row.megatron], row.hf_shapes(self.shape)
        complete = [(name, 0, size[0]) for name, size in zip(row.hf, sizes, strict=True)]
        segments = [segment for segment in copy_segments(row, self.shape, dim=0) if segment.name is not None]
        in_order = [(segment.name, segment.hf_start, segment.size) for segment in segments] == complete
        return in_order and all(chunk.sizes[1:] == stored.shape[1:] for chunk in stored.chunks)

    def files(self) -> list[Path]:
        """Return the files most of whose bytes are weights."""
        held: Counter[str] = Counter()
        for row in rows(self.shape):
            for chunk in self._stored[row.megatron].chunks:
                held[chunk.file] += chunk.length
        paths = {self.state / name: size for name, size in held.items()}
        return [path for path, size in paths.items() if 2 * size > path.stat().st_size]

    def stretches(self, row: Row, buffers: Iterator[Tensor]) -> Iterator[Stretch]:
        """Yield all of a row's HF tensors.

        Args:
            row: of the weight table.
            buffers: bytes; the next is taken for each stretch of a row that streams, and one for all of another,
                which must hold :meth:`group_bytes`.

        Raises:
            InputError: a chunk cannot be read, or is not what the metadata says.
        """
        if not self.streams(row):
            parts, sources = self._read(row, next(buffers))
            for name, part in parts.items():
                yield Stretch(name, 0, part.view(-1), sources)
                sources = []
            return
        stored = self._stored[row.megatron]
        reader = ChunkReader(self.state, row.megatron, stored.dtype)
        width = math.prod(stored.shape[1:])
        for chunk in self._chunks(row):
            self._expect_next(chunk)
            low = chunk.offsets[0]
            for segment in copy_segments(row, self.shape, dim=0, within=(low, low + chunk.sizes[0])):
                done, size = 0, segment.size * width
                while segment.name is not None and done < size:
                    part = next(buffers).view(stored.dtype)[: size - done]
                    sources = [reader.read(chunk, (segment.start - low) * width + done, part)]
                    yield Stretch(segment.name, segment.hf_start * width + done, part, sources)
                    done += len(part)

    def read(self, row: Row, buffer: Tensor | None = None) -> dict[str, Tensor]:
        """Return a row's HF tensors. Memory: they, and of a tensor that is cut along columns one chunk.

        Args:
            row: of the weight table.
            buffer: bytes that the tensors may lie in, until it is used again.

        Raises:
            InputError: a chunk cannot be read, or is not what the metadata says.
        """
        return self._read(row, buffer)[0]

    def _chunks(self, row: Row) -> list[Chunk]:
        return sorted(self._stored[row.megatron].chunks, key=lambda chunk: chunk.offsets)

    def _expect_next(self, chunk: Chunk) -> None:
        """Let the disk fetch the end of the chunk that will be read after this one."""
        if (expected := self._next.get(chunk)) is not None:
            size = min(_TAIL, expected.length)
            end = expected.start + expected.length
            advise(self.state / expected.file, end - size, size, os.POSIX_FADV_WILLNEED)

    def _read(self, row: Row, buffer: Tensor | None) -> tuple[dict[str, Tensor], list[Source]]:
        """Return a row's HF tensors, and which of their parts lie in them as in the files."""
        stored = self._stored[row.megatron]
        reader, sources = ChunkReader(self.state, row.megatron, stored.dtype), []
        parts = dict(zip(row.hf, _parts(row.hf_shapes(self.shape), stored.dtype, buffer), strict=True))
        dim = row.split or 0
        for chunk in self._chunks(row):
            self._expect_next(chunk)
            whole_rows = dim == 0 and chunk.sizes[1:] == stored.shape[1:]
            width = math.prod(chunk.sizes[1:])
            data = None if whole_rows else torch.empty(chunk.sizes, dtype=stored.dtype)
            if data is not None:
                reader.read(chunk, 0, data)
            low = chunk.offsets[dim]
            for segment in copy_segments(row, self.shape, within=(low, low + chunk.sizes[dim])):
                if segment.name is None:
                    continue
                target = segment.of_hf(parts[segment.name])
                if data is None:
                    sources.append(reader.read(chunk, (segment.start - low) * width, target))
                    continue
                for other, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                    if other != dim:
                        target = target.narrow(other, offset, size)
                target.copy_(data.narrow(dim, segment.start - low, segment.size))
        return parts, sources

    def _check_names(self) -> None:
        wanted = {row.megatron for row in rows(self.shape)}
        missing, unexpected = sorted(wanted - self._stored.keys()), sorted(self._stored.keys() - wanted)
        if missing or unexpected:
            found = {"missing": missing, "unexpected": unexpected}
            facts = [f"{what} {', '.join(names)}" for what, names in found.items() if names]
            raise InputError(
                f"the state must be that of {self.shape.architecture}: {'; '.join(facts)} in {self.state}"
            )

    def _check_shapes(self) -> None:
        wrong = []
        for row in rows(self.shape):
            stored, want = self._stored[row.megatron], list(local_shape(row, self.shape, 1))
            found = list(stored.shape)
            if "vocab" in row.dims[0] and found[1:] == want[1:] and found[0] >= self.shape.vocab_size:
                want = found  # padded for another number of tensor ranks
            if found != want:
                wrong.append(f"{row.megatron} must be {want}, found {found}")
            elif sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(found):
                wrong.append(f"{row.megatron} must be {found}, its chunks are not")
        if wrong:
            raise InputError(f"the state must have config.json's shapes: {'; '.join(wrong)} in {self.state}")

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for row in rows(self.shape):
            for chunk in self._stored[row.megatron].chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        for name, end in sorted(ends.items()):
            path = self.state / name
            if not path.is_file():
                raise InputError(f"a complete checkpoint is needed, found no file {path}")
            if (size := path.stat().st_size) < end:
                raise InputError(
                    f"a complete checkpoint is needed, {path} was cut short at {size:,} of {end:,} bytes"
                )


def _parts(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, buffer: Tensor | None) -> list[Tensor]:
    """Return empty tensors, side by side in ``buffer`` where there is one."""
    if buffer is None:
        return [torch.empty(shape, dtype=dtype) for shape in shapes]
    flat = buffer.view(dtype)
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]


def _by_layer(stored: dict[str, Stored], state: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the model's tensors, layer by layer, leaving aside the optimizer's."""
    for key, tensor in stored.items():
        if key.startswith("optimizer."):
            continue
        if not key.startswith(_LAYERS):
            yield key, tensor
            continue
        layers: list[list[Chunk]] = [[] for _ in range(tensor.shape[0])]
        for chunk in tensor.chunks:
            if chunk.sizes[0] != 1:
                held = range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0])
                raise InputError(f"a chunk of {key} must lie in one layer, found {list(held)} in {state}")
            layers[chunk.offsets[0]].append(chunk._replace(offsets=chunk.offsets[1:], sizes=chunk.sizes[1:]))
        for layer, chunks in enumerate(layers):
            name = key.replace(_LAYERS, f"{_LAYERS}{layer}.", 1)
            yield name, Stored(tensor.dtype, tensor.shape[1:], chunks)
