"""A checkpoint's ``state`` folder, written chunk by chunk without a model, as megatron-core reads it.

What ``dist_checkpointing.save`` would write for one tensor rank, cut finer: chunks of some rows each, in files
that are closed when they are full. ``.metadata`` is put together from torch's own classes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
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

from megatron_align.checkpoint.metadata import COMMON, FORMAT_FILE, FORMAT_OF_STATE, METADATA
from megatron_align.convert.state_reader import state_key
from megatron_align.model.families import ModelShape, Row, local_shape, rows
from megatron_align.storage.checksums import HashingFile
from megatron_align.storage.journal import Journal


class StateWriter:
    """Writes a state folder below a journal's partial folder; a restart goes on after the last full file.

    Args:
        journal: of the checkpoint.
        name: of the state folder.
        shape: of the model.
        dtype: of all its tensors.
        file_bytes: size at which a file is full.

    ``sums`` are the hashes of the full files, by their paths in the partial folder.
    """

    def __init__(
        self, journal: Journal, name: str, shape: ModelShape, dtype: torch.dtype, file_bytes: int = 5 * 10**9
    ) -> None:
        self.journal, self.folder = journal, journal.partial / name
        self.shape, self.dtype, self.file_bytes = shape, dtype, file_bytes
        self.folder.mkdir(exist_ok=True)
        self.sums: dict[str, str] = {name: facts["sha256"] for name, facts in journal.done.items()}
        # The chunks in each file: [name, first row, rows, place, length, notes].
        self._files: dict[str, list[list[Any]]] = {n: facts["chunks"] for n, facts in journal.done.items()}
        self._done = {(entry[0], entry[1]) for entries in self._files.values() for entry in entries}
        self._file: HashingFile | None = None
        self._path, self._name = self.folder, ""

    def has(self, row: Row, start: int) -> bool:
        """Tell whether the chunk that begins with row ``start`` of the tensor is in a file that is full."""
        return (row.megatron, start) in self._done

    def write(self, row: Row, start: int, chunk: Tensor, notes: Any = None) -> None:
        """Write whole rows of a tensor, from ``start`` on; ``notes`` (a JSON value) outlive a restart."""
        if chunk.untyped_storage().nbytes() != chunk.nbytes:
            chunk = chunk.clone()  # saving a slice saves all that it is a slice of
        name, layer = state_key(row.megatron)
        place = self._append(chunk if layer is None else chunk[None])
        self._files[self._name].append([row.megatron, start, len(chunk), *place, notes])
        if place[0] + place[1] >= self.file_bytes:
            self._close()

    def notes(self) -> Iterator[Any]:
        """Yield the notes of all chunks."""
        yield from (entry[-1] for entries in self._files.values() for entry in entries)

    def finish(self) -> None:
        """Write what makes the chunks a checkpoint."""
        storage, extra = {}, {}
        for name in _extra_states(self.shape):  # megatron-core asks for them, they hold nothing
            place = self._append([None])
            storage[MetadataIndex(name)] = _StorageInfo(self._path.name, *place)
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
            name: TensorStorageMetadata(TensorProperties(self.dtype), self._global_size(name, tensors), parts)
            for name, parts in chunks.items()
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
        """Save ``content`` at the end of the open file; return where it lies, and its length."""
        if self._file is None:
            self._path = self.folder / f"__0_{len(self._files)}.distcp"
            self._name = str(self._path.relative_to(self.journal.partial))
            self._files[self._name] = []
        with _naming(self._path):
            self._file = self._file or HashingFile(self._path)
            start = self._file.tell()
            torch.save(content, self._file)
            return start, self._file.tell() - start

    def _close(self) -> None:
        with _naming(self._path):
            self.sums[self._name] = self._file.finish()
        self._file = None
        facts = {"sha256": self.sums[self._name], "chunks": self._files[self._name]}
        self.journal.add(self._path, facts)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in an error of the disk (full, perhaps) what was being written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer says neither file nor reason
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"writing the checkpoint failed at {path}: {reason}") from error


def _extra_states(shape: ModelShape) -> Iterator[str]:
    """Yield the names under which megatron-core's linear layers keep state of their own, none in our case."""
    for row in rows(shape):
        module, _, kind = row.megatron.rpartition(".")
        if kind == "weight" and ".linear_" in module:
            name, layer = state_key(module)
            yield f"{name}._extra_state/shard_{layer}_{shape.num_layers}"
    if not shape.is_reward:
        yield "output_layer._extra_state/shard_0_1"
