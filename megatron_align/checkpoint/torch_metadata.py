"""Read ``.metadata`` of a checkpoint's ``state`` folder (torch.distributed.checkpoint) without running its pickle.

Unpickling runs whatever the file names. Here it may name the classes that torch's metadata consist of, and no others.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    TensorStorageMetadata,
)

from megatron_align.errors import InputError, one_line

# Prefixes of the names of tensors that are not the model's: of the optimizers, a reference that moves, and a critic.
OPTIMIZER, REFERENCE, CRITIC = "optimizer.", "reference.", "critic."
COMMON, FORMAT_FILE, METADATA = "common.pt", "metadata.json", ".metadata"
# dist_checkpointing.load recognises the format by these entries.
FORMAT_OF_STATE = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
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
# Python 3.11.0 to 3.11.4 pickle an enum member as a call of this function (Debian 12 has 3.11.2), other interpreters
# as a call of its class with its value. Protocols below 3 name the module as Python 2 did.
_GETATTR = (("builtins", "getattr"), ("__builtin__", "getattr"))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _GETATTR:
            return _memory_format
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of torch's metadata")


def _memory_format(enum: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """Return a member of the one enum of torch's metadata by its exact name, where a pickle calls ``getattr``."""
    if enum is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(
            f"it calls builtins.getattr for {name!r} of {enum!r}, which is not part of torch's metadata"
        )
    return _MEM_FORMAT_ENCODING.__members__[name]


def read_torch_metadata(state: Path) -> Metadata:
    """Return the content of ``.metadata`` without running code that it names.

    Raises:
        InputError: it is missing or corrupt, or names anything but torch's metadata classes.
    """
    path = state / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"checkpoint is incomplete: no file {path}") from error
    except Exception as error:  # a corrupt pickle can raise anything
        reason = one_line(error, 300)
        raise InputError(f"checkpoint is corrupt: {path} cannot be read: {reason}") from error
    if not isinstance(metadata, Metadata):
        raise InputError(f"checkpoint is corrupt: {path} holds a {type(metadata).__name__}, not Metadata")
    return metadata


class StoredShard(NamedTuple):
    """A box of a stored tensor (torch's chunk), and the byte range of the file that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a state folder."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: list[StoredShard]


def read_stored_tensors(state: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a state folder by their keys; those of all layers are one stacked tensor.

    Raises:
        InputError: as :func:`read_torch_metadata`, or a shard is in no file, or in one outside the folder.
    """
    metadata = read_torch_metadata(state)
    locations = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
    stored = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        shards = []
        for chunk in entry.chunks:
            info = locations.get((key, chunk.offsets))
            if info is None or Path(info.relative_path).name != info.relative_path:
                file = "no file" if info is None else info.relative_path
                raise InputError(
                    f"checkpoint is corrupt: .metadata places a shard of {key} in {file}, not in a file of {state}"
                )
            location = (info.relative_path, info.offset, info.length)
            shards.append(StoredShard(tuple(chunk.offsets), tuple(chunk.sizes), *location))
        stored[key] = StoredTensor(entry.properties.dtype, tuple(entry.size), shards)
    return stored
