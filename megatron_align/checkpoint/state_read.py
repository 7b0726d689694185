"""A checkpoint's ``state`` folder, read tensor by tensor: torch's distributed-checkpoint files, without a model.

``.metadata`` is a pickle, and a pickle runs whatever it names. Here it may name the classes that torch's metadata
consists of and nothing else; the chunks are read as weights only.

Tensors are those of one tensor rank: megatron-core writes every layout's shards as parts of them. Layers are
stacked: ``decoder.layers.mlp.linear_fc2.weight`` is ``[layers, ...]``.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, Row, local_shape, rows, segments

METADATA = ".metadata"
_LAYERS = "decoder.layers."
_CLASSES = {
    "torch": {"Size"},  # and its dtypes
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of torch's metadata")


def read_metadata(state: Path) -> Metadata:
    """Return what torch's metadata file says, running nothing that it brings along.

    Raises:
        InputError: there is none, or it is damaged or names anything but torch's metadata classes.
    """
    path = state / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"a complete checkpoint is needed, found no file {path}") from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"a complete checkpoint is needed, {path} cannot be read: {reason}") from error
    if not isinstance(metadata, Metadata):
        raise InputError(f"a complete checkpoint is needed, {path} holds a {type(metadata).__name__}")
    return metadata


def state_key(megatron: str) -> tuple[str, int | None]:
    """Return the name under which a tensor is stored, and its place in the stack of layers."""
    if not megatron.startswith(_LAYERS):
        return megatron, None
    layer, rest = megatron.removeprefix(_LAYERS).split(".", 1)
    return _LAYERS + rest, int(layer)


class Chunk(NamedTuple):
    """A part of a tensor of one layer, and where it lies on the disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that the state holds, of one layer where there are layers."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


class StateReader:
    """The weights of a checkpoint, of any layout, by the rows of the weight table.

    Raises:
        InputError: the state is incomplete, or not that of the model: all its tensors at fault are named.
    """

    def __init__(self, state: Path, shape: ModelShape) -> None:
        self.state, self.shape = state, shape
        self._stored = dict(_stored(read_metadata(state), state))
        self._check_names()
        self._check_shapes()
        self._check_files()

    def dtype(self, row: Row) -> torch.dtype:
        """Return the dtype that a row is stored in."""
        return self._stored[row.megatron].dtype

    def read(self, row: Row, buffer: Tensor | None = None) -> dict[str, Tensor]:
        """Return a row's HF tensors. Memory: they, and one chunk.

        Args:
            row: of the weight table.
            buffer: bytes that the tensors may lie in, until it is used again.

        Raises:
            InputError: a chunk cannot be read, or is not what the metadata says.
        """
        stored = self._stored[row.megatron]
        parts = _parts(row.hf_shapes(self.shape), stored.dtype, buffer)
        pieces, dim = segments(row, self.shape, 0, 1), row.split or 0
        for chunk in stored.chunks:
            data = self._read_chunk(row.megatron, chunk, stored.dtype)
            low = chunk.offsets[dim]
            high, position = low + chunk.sizes[dim], 0
            for part, start, stop in pieces:
                first, last = max(low, position), min(high, position + stop - start)
                if part is not None and first < last:
                    target = parts[part]
                    for other, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                        if other != dim:
                            target = target.narrow(other, offset, size)
                    source = data.narrow(dim, first - low, last - first)
                    target.narrow(dim, start + first - position, last - first).copy_(source)
                position += stop - start
        return dict(zip(row.hf, parts, strict=True))

    def _read_chunk(self, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
        path = self.state / chunk.file
        try:
            with path.open("rb") as file:
                data = torch.load(_Window(file, chunk.start, chunk.length), "cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"a complete checkpoint is needed, {name} cannot be read in {path}: {reason}"
            ) from error
        if not isinstance(data, Tensor) or data.dtype != dtype or data.numel() != math.prod(chunk.sizes):
            raise InputError(f"a complete checkpoint is needed, {name} is not what .metadata says in {path}")
        return data.reshape(chunk.sizes)

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


def _stored(metadata: Metadata, state: Path) -> Iterator[tuple[str, Stored]]:
    """Yield the model's tensors, layer by layer, leaving aside the optimizer's."""
    places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or key.startswith("optimizer."):
            continue
        stacked = key.startswith(_LAYERS)
        chunks: dict[int, list[Chunk]] = {}
        for chunk in entry.chunks:
            info = places.get((key, chunk.offsets))
            if info is None or Path(info.relative_path).name != info.relative_path:
                found = "nowhere" if info is None else info.relative_path
                raise InputError(f"a chunk of {key} must lie in a file of {state}, .metadata puts it {found}")
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            layers = range(offsets[0], offsets[0] + sizes[0]) if stacked else [0]
            if len(layers) != 1:
                raise InputError(f"a chunk of {key} must lie in one layer, found {list(layers)} in {state}")
            where = (info.relative_path, info.offset, info.length)
            chunks.setdefault(layers[0], []).append(Chunk(offsets[stacked:], sizes[stacked:], *where))
        for layer in range(entry.size[0]) if stacked else [0]:
            name = key.replace(_LAYERS, f"{_LAYERS}{layer}.", 1) if stacked else key
            shape = tuple(entry.size)[stacked:]
            yield name, Stored(entry.properties.dtype, shape, chunks.get(layer, []))


class _Window(io.RawIOBase):
    """A stretch of an open file, as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count


def _parts(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, buffer: Tensor | None) -> list[Tensor]:
    """Return empty tensors, side by side in ``buffer`` where there is one."""
    if buffer is None:
        return [torch.empty(shape, dtype=dtype) for shape in shapes]
    flat = buffer.view(dtype)
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat[: sum(sizes)].split(sizes), shapes, strict=True)]
