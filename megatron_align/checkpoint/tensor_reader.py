"""Read the shards of a stored tensor directly into memory.

``torch.save`` writes a shard's elements contiguously, so that any range of them can be read without unpickling.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from megatron_align.checkpoint.torch_metadata import StoredShard
from megatron_align.errors import InputError, one_line
from megatron_align.storage.atomic_write import read_into


class FileRange(NamedTuple):
    """Elements that were read, and the file and byte offset that they came from."""

    path: Path
    start: int
    elements: Tensor


class StoredTensorReader:
    """Read ranges of the shards of one tensor.

    Args:
        state: the state folder.
        name: of the tensor, for error messages.
        dtype: of the stored elements.
    """

    def __init__(self, state: Path, name: str, dtype: torch.dtype) -> None:
        self.state, self.name, self.dtype = state, name, dtype
        self._begins: dict[StoredShard, int] = {}

    def read(self, shard: StoredShard, start: int, out: Tensor) -> FileRange:
        """Fill ``out``, contiguous, in CPU memory and of the stored dtype, with a shard's elements from ``start`` on.

        Raises:
            InputError: the shard cannot be read, or does not match the metadata.
        """
        path = self.state / shard.file
        if shard not in self._begins:
            self._begins[shard] = self._find_begin(path, shard)
        offset = self._begins[shard] + start * self.dtype.itemsize
        try:
            read_into(out, path, offset)
        except (OSError, EOFError) as error:
            raise self._unreadable(path, error) from error
        return FileRange(path, offset, out)

    def _find_begin(self, path: Path, shard: StoredShard) -> int:
        """Return the file offset of a shard's first element, without reading the elements."""
        try:
            with path.open("rb") as file:
                window = cast(IO[bytes], _FileWindow(file, shard.start, shard.length))
                saved = torch.load(window, map_location="meta", weights_only=True)
                window.seek(0)
                reader: Any = torch._C.PyTorchFileReader(window)
                begin = reader.get_record_offset("data/0")
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise self._unreadable(path, error) from error
        if (
            not isinstance(saved, Tensor)
            or saved.dtype != self.dtype
            or saved.numel() != math.prod(shard.sizes)
            or not saved.is_contiguous()
            or saved.storage_offset()
        ):
            raise InputError(f"checkpoint is corrupt: {self.name} does not match .metadata in {path}")
        return shard.start + begin

    def _unreadable(self, path: Path, error: Exception) -> InputError:
        reason = one_line(error, 200)
        return InputError(f"checkpoint is corrupt: {self.name} cannot be read in {path}: {reason}")


class _FileWindow(io.RawIOBase):
    """A range of an open file, presented as a file."""

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
