"""A chunk's numbers, read straight to where they are wanted: ``torch.save`` leaves them in one stretch of its file."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_align.checkpoint.metadata import Chunk
from megatron_align.errors import InputError
from megatron_align.storage.atomic_write import fill


class Source(NamedTuple):
    """Numbers, and from which byte on they lie in which file."""

    path: Path
    start: int
    numbers: Tensor


class ChunkReader:
    """Reads stretches of the chunks of one tensor.

    Args:
        state: the folder.
        name: of the tensor, for messages.
        dtype: what it is stored in.
    """

    def __init__(self, state: Path, name: str, dtype: torch.dtype) -> None:
        self.state, self.name, self.dtype = state, name, dtype
        self._begins: dict[Chunk, int] = {}

    def read(self, chunk: Chunk, start: int, out: Tensor) -> Source:
        """Fill ``out``, contiguous, in CPU memory and of the stored dtype, with a chunk's elements from ``start`` on.

        Raises:
            InputError: the chunk cannot be read, or is not what the metadata says.
        """
        path = self.state / chunk.file
        if chunk not in self._begins:
            self._begins[chunk] = self._find(path, chunk)
        place = self._begins[chunk] + start * self.dtype.itemsize
        try:
            fill(out, path, place)
        except (OSError, EOFError) as error:
            raise self._unreadable(path, error) from error
        return Source(path, place, out)

    def _find(self, path: Path, chunk: Chunk) -> int:
        """Return where in its file a chunk's numbers begin; they are not read."""
        try:
            with path.open("rb") as file:
                window = _Window(file, chunk.start, chunk.length)
                saved = torch.load(window, map_location="meta", weights_only=True)
                window.seek(0)
                begin = torch._C.PyTorchFileReader(window).get_record_offset("data/0")
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise self._unreadable(path, error) from error
        if (
            not isinstance(saved, Tensor)
            or saved.dtype != self.dtype
            or saved.numel() != math.prod(chunk.sizes)
            or not saved.is_contiguous()
            or saved.storage_offset()
        ):
            raise InputError(
                f"a complete checkpoint is needed, {self.name} is not what .metadata says in {path}"
            )
        return chunk.start + begin

    def _unreadable(self, path: Path, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:200]
        return InputError(f"a complete checkpoint is needed, {self.name} cannot be read in {path}: {reason}")


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
