"""Write safetensors shards tensor by tensor, in any order, into a folder that appears atomically.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and offsets
of each tensor), and the tensors' bytes. Since offsets are known beforehand, no tensor has to be kept in memory.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_align.errors import InputError
from megatron_align.hf.safetensors import DTYPES, INDEX, SINGLE
from megatron_align.model.families import ModelShape, rows
from megatron_align.storage.atomic_write import commit_folder, naming_file, resolve_output
from megatron_align.storage.direct_io import DirectFile
from megatron_align.storage.journal import Journal
from megatron_align.storage.mounts import require_replaceable

PYTORCH = {"format": "pt"}  # metadata of a file, as transformers writes it
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Location(NamedTuple):
    """The file and offset of a tensor's bytes."""

    file: Path
    offset: int
    spec: TensorSpec


def hf_specs(shape: ModelShape, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Return every HF tensor of a model in the order of its weight table."""
    return {
        name: TensorSpec(dtype, size)
        for row in rows(shape)
        for name, size in zip(row.hf, row.hf_shapes(shape), strict=True)
    }


class ShardWriter:
    """Write safetensors shards of tensors that are declared beforehand, in any order, keeping none in memory.

    Everything is written to ``partial``, next to ``folder``, and renamed at the end: write the model's other files
    there before :meth:`close`. As a context manager it closes on success and leaves no trace after an exception.
    Only one writer per folder.

    Args:
        folder: must be new or empty, unless ``overwrite``; it is then replaced once the new one is complete.
        specs: every tensor, in the order in which they fill the shards.
        max_bytes: maximum size of a shard; a larger tensor gets its own.
        overwrite: replace an existing folder.
        key: JSON object that determines the folder's content. A writer with the same key as a killed or interrupted
            one resumes after its complete shards (see :meth:`has`).

    Raises:
        InputError: ``folder`` is a file, or holds files and ``overwrite`` is not set.
    """

    def __init__(
        self,
        folder: str | Path,
        specs: Mapping[str, TensorSpec],
        max_bytes: int = 5 * 10**9,
        overwrite: bool = False,
        key: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.overwrite = resolve_output(folder), overwrite
        self._require_free()
        self.journal = Journal(self.folder, key)
        self.partial = self.journal.partial
        shards = _assign_shards(specs, max_bytes)
        self._total_bytes = sum(spec.nbytes for spec in specs.values())
        self._locations: dict[str, _Location] = {}
        self._headers: dict[Path, bytes] = {}
        self._unfinished: dict[Path, set[str]] = {}  # tensors by shard
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._assign_offsets(self.partial / file, {name: specs[name] for name in names})
            self._unfinished[self.partial / file] = set() if file in self.journal.done else set(names)
        self._written: dict[str, int] = dict.fromkeys(specs, 0)  # bytes
        self._file: DirectFile | None = None
        self._path = self.partial  # of the open shard
        self._notes: dict[str, Any] = {k: v for notes in self.journal.done.values() for k, v in notes.items()}

    def has(self, name: str) -> bool:
        """Return whether the tensor is in a complete shard, perhaps from before a restart."""
        return not self._unfinished[self._locations[name].file]

    def notes(self, name: str) -> Any:
        """Return the notes that were given when the tensor was finished, perhaps before a restart."""
        return self._notes[name]

    def write(self, name: str, tensor: Tensor, notes: Any = None) -> None:
        """Write a complete tensor and finish it."""
        if tuple(tensor.shape) != (shape := self._locations[name].spec.shape):
            raise ValueError(f"{name} must be {list(shape)}, is {list(tensor.shape)}")
        self.write_flat(name, 0, tensor.detach().reshape(-1))
        self.finish(name, notes)

    def write_flat(self, name: str, start: int, block: Tensor) -> None:
        """Write a tensor's elements from ``start`` on; ``block`` is one-dimensional, of the declared dtype."""
        file, offset, spec = self._locations[name]
        self._written[name] += block.nbytes
        if block.dtype != spec.dtype or self._written[name] > spec.nbytes:
            raise ValueError(f"{name} must be {spec}, written once; got {block.numel()} of {block.dtype}")
        view = memoryview(block.cpu().contiguous().view(torch.uint8).numpy())
        with naming_file("model", file):
            if self._file is None or self._path != file:
                self._finish_file()
                self._file, self._path = DirectFile(file), file
                self._file.write(0, memoryview(self._headers[file]))
            self._file.write(offset + start * spec.dtype.itemsize, view)

    def finish(self, name: str, notes: Any = None) -> None:
        """Mark a tensor as complete; ``notes`` (a JSON value) are kept for a restart."""
        file, _, spec = self._locations[name]
        if self._written[name] != spec.nbytes:
            raise ValueError(f"{name} must be {spec.nbytes} bytes, {self._written[name]} were written")
        self._notes[name] = notes
        self._unfinished[file].remove(name)
        if not self._unfinished[file]:
            with naming_file("model", file):
                self._finish_file()
            names = [other for other, location in self._locations.items() if location.file == file]
            self.journal.add(file, {other: self._notes[other] for other in names})

    def close(self) -> None:
        """Write the index, force everything onto the disk, and rename the folder."""
        if missing := [name for name in self._locations if not self.has(name)]:
            raise ValueError(f"tensors were declared and not written: {', '.join(missing)}")
        self._write_index()
        self.journal.close()
        self._require_free()
        commit_folder(self.partial, self.folder)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        except BaseException as fault:
            kind = type(fault)
            raise
        finally:
            if self._file:
                self._file.close()
            self.journal.abandon(kind)

    def _finish_file(self) -> None:
        """Force the open shard onto the disk and close it."""
        if self._file:
            file, self._file, self._path = self._file, None, self.partial
            file.finish()

    def _require_free(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"cannot export the model: {self.folder} is a file")
        require_replaceable(self.folder, "the exported model's folder")
        if not self.overwrite and self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"cannot export the model: {self.folder} is not empty")

    def _assign_offsets(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Compute a shard's header and its tensors' offsets."""
        self._headers[file], starts = _header(specs)
        for name, spec in specs.items():
            self._locations[name] = _Location(file, starts[name], spec)

    def _write_index(self) -> None:
        if len(self._headers) > 1:
            weight_map = {name: location.file.name for name, location in sorted(self._locations.items())}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] = PYTORCH) -> None:
    """Write a safetensors file straight from the tensors' memory; it is not forced onto the disk.

    It may be read by whoever may read its folder, unlike the library's, which only its owner may.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
    header, starts = _header(specs, metadata)
    with file.open("wb", buffering=0) as out:
        _write_all(out, memoryview(header))
        for name in sorted(held, key=starts.__getitem__):
            _write_all(out, memoryview(held[name].reshape(-1).view(torch.uint8).numpy()))


def _write_all(out: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) :]


def _header(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] = PYTORCH
) -> tuple[bytes, dict[str, int]]:
    """Return a file's header and where each tensor starts, wide dtypes first so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
        span = [offset, offset + spec.nbytes]
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = len(text) + 8
    starts = {name: data + header[name]["data_offsets"][0] for name in specs}
    return len(text).to_bytes(8, "little") + text, starts


def _assign_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Return the tensors' names by shard."""
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards
