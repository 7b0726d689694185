"""What a checkpoint's ``state`` folder says that it holds: torch's ``.metadata``, read without running it.

The file is a pickle, and a pickle runs whatever it names. Here it may name the classes that torch's metadata consists
of and nothing else.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_align.errors import InputError

COMMON, FORMAT_FILE = "common.pt", "metadata.json"
# How dist_checkpointing.load recognises the format.
FORMAT_OF_STATE = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
METADATA = ".metadata"
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


class Chunk(NamedTuple):
    """A box of a tensor, and where it lies on the disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that a state holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


def read_stored(state: Path) -> dict[str, Stored]:
    """Return the tensors of a state by their keys; those of all layers are one, stacked.

    Raises:
        InputError: as :func:`read_metadata`, and a chunk lies nowhere, or outside the folder.
    """
    metadata = read_metadata(state)
    places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    found = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in entry.chunks:
            info = places.get((key, chunk.offsets))
            if info is None or Path(info.relative_path).name != info.relative_path:
                place = "nowhere" if info is None else info.relative_path
                raise InputError(f"a chunk of {key} must lie in a file of {state}, .metadata puts it {place}")
            where = (info.relative_path, info.offset, info.length)
            chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), *where))
        found[key] = Stored(entry.properties.dtype, tuple(entry.size), chunks)
    return found
