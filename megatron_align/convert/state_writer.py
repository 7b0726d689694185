"""Write a checkpoint's ``state`` folder block by block, without a model, in megatron-core's format.

The result is what ``dist_checkpointing.save`` would write for one tensor rank, cut finer: blocks of rows, in files of
limited size. ``.metadata`` is built from torch's own classes, in which a block is a chunk.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_align.checkpoint.torch_metadata import COMMON, FORMAT_FILE, FORMAT_OF_STATE, METADATA
from megatron_align.convert.state_reader import state_key
from megatron_align.model.families import ModelShape, Row, local_shape, rows
from megatron_align.storage.atomic_write import naming_file
from megatron_align.storage.checksums import HashingFile
from megatron_align.storage.journal import Journal


class StateWriter:
    """Write a state folder in a journal's partial folder; a restart resumes after the last complete file.

    Args:
        journal: of the checkpoint.
        name: of the state folder.
        shape: of the model.
        dtype: of all its tensors.
        file_bytes: size at which a file is closed.

    ``checksums`` are those of the complete files, by their paths in the partial folder.
    """

    def __init__(
        self, journal: Journal, name: str, shape: ModelShape, dtype: torch.dtype, file_bytes: int = 5 * 10**9
    ) -> None:
        self.journal, self.folder = journal, journal.partial / name
        self.shape, self.dtype, self.file_bytes = shape, dtype, file_bytes
        self.folder.mkdir(exist_ok=True)
        self.checksums: dict[str, str] = {n: notes["sha256"] for n, notes in journal.done.items()}
        # The blocks in each file: [tensor, first row, rows, offset, length, notes].
        self._files: dict[str, list[list[Any]]] = {n: notes["blocks"] for n, notes in journal.done.items()}
        self._done = {(entry[0], entry[1]) for entries in self._files.values() for entry in entries}
        self._file: HashingFile | None = None
        self._path, self._name = self.folder, ""

    def has(self, row: Row, start: int) -> bool:
        """Return whether the block that begins at row ``start`` of the tensor is in a complete file."""
        return (row.megatron, start) in self._done

    def write(self, row: Row, start: int, block: Tensor, notes: Any = None) -> None:
        """Write rows of a tensor, from ``start`` on; ``notes`` (a JSON value) are kept for a restart."""
        if block.untyped_storage().nbytes() != block.nbytes:
            block = block.clone()  # torch.save would write the entire storage
        _, layer = state_key(row.megatron)
        offset, length = self._append(block if layer is None else block[None])
        self._files[self._name].append([row.megatron, start, len(block), offset, length, notes])
        if offset + length >= self.file_bytes:
            self._close()

    def notes(self) -> Iterator[Any]:
        """Yield the notes of all blocks."""
        yield from (entry[-1] for entries in self._files.values() for entry in entries)

    def finish(self) -> None:
        """Write the metadata files."""
        storage, extra = {}, {}
        for name in _extra_states(self.shape):  # megatron-core expects them, they hold nothing
            location = self._append([None])
            storage[MetadataIndex(name)] = _StorageInfo(self._path.name, *location)
            extra[name] = BytesStorageMetadata()
        self._close()
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        tensors = {row.megatron: row for row in rows(self.shape)}
        for file, entries in self._files.items():
            for megatron, start, count, offset, length, _ in entries:
                name, layer = state_key(megatron)
                stack = [] if layer is None else [layer]
                tail = local_shape(tensors[megatron], self.shape, 1)[1:]
                offsets = torch.Size([*stack, start, *[0] * len(tail)])
                sizes = torch.Size([*[1] * len(stack), count, *tail])
                chunks.setdefault(name, []).append(ChunkStorageMetadata(offsets, sizes))
                storage[MetadataIndex(name, offsets)] = _StorageInfo(Path(file).name, offset, length)
        stored = {
            name: TensorStorageMetadata(TensorProperties(self.dtype), self._global_size(name, tensors), own)
            for name, own in chunks.items()
        }
        metadata = Metadata({**stored, **extra}, storage_data=storage)
        (self.folder / METADATA).write_bytes(pickle.dumps(metadata))
        torch.save({}, self.folder / COMMON)
        (self.folder / FORMAT_FILE).write_text(json.dumps(FORMAT_OF_STATE), encoding="utf-8")

    def _global_size(self, name: str, tensors: dict[str, Row]) -> torch.Size:
        layers = [row for megatron, row in tensors.items() if state_key(megatron)[0] == name]
        stack = [len(layers)] if state_key(layers[0].megatron)[1] is not None else []
        return torch.Size([*stack, *local_shape(layers[0], self.shape, 1)])

    def _append(self, content: Any) -> tuple[int, int]:
        """Save ``content`` at the end of the open file; return its offset and length."""
        if self._file is None:
            self._path = self.folder / f"__0_{len(self._files)}.distcp"
            self._name = str(self._path.relative_to(self.journal.partial))
            self._files[self._name] = []
        with naming_file("checkpoint", self._path):
            self._file = self._file or HashingFile(self._path)
            start = self._file.tell()
            self._file.save(content)
            return start, self._file.tell() - start

    def _close(self) -> None:
        assert self._file is not None, "no file is open"
        with naming_file("checkpoint", self._path):
            self.checksums[self._name] = self._file.finish()
        self._file = None
        notes = {"sha256": self.checksums[self._name], "blocks": self._files[self._name]}
        self.journal.add(self._path, notes)


def _extra_states(shape: ModelShape) -> Iterator[str]:
    """Yield the keys of the extra states that megatron-core's linear layers have; they are empty here."""
    for row in rows(shape):
        module, _, kind = row.megatron.rpartition(".")
        if kind == "weight" and ".linear_" in module:
            name, layer = state_key(module)
            yield f"{name}._extra_state/shard_{layer}_{shape.num_layers}"
    if not shape.is_reward:
        yield "output_layer._extra_state/shard_0_1"
