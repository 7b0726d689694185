"""The safetensors files of a Hugging Face folder, checked before a weight is read.

No file is loaded completely: training maps the files and copies its slices; passes over entire tensors read blocks
into a buffer, because mapped pages would count as memory until they are reclaimed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_align.errors import InputError, listed
from megatron_align.model.families import Segment, read_json
from megatron_align.storage.atomic_write import advise_page_cache, read_into

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_ELEMENTS = 1 << 22  # read at once in a pass over an entire tensor
# supported dtypes, by safetensors' names
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class _SafetensorsFile:
    """One safetensors file with a checked header; its tensors can be mapped, or read by their offsets.

    Raises:
        InputError: it is corrupt or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.handle = path, open_safetensors(path)

    @cached_property
    def starts(self) -> dict[str, int]:
        """The file offset of each tensor's first byte."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


class HFWeights:
    """The tensors of one Hugging Face folder: ``model.safetensors``, or shards with an index.

    Args:
        folder: of the files.
        single: the name of the file that holds all tensors, if there is one.

    Raises:
        InputError: there are none, or a file is missing, corrupt, or does not match the index.
    """

    def __init__(self, folder: str | Path, single: str = SINGLE) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"no Hugging Face folder at {self.folder}")
        if (self.folder / single).exists():
            file = _SafetensorsFile(self.folder / single)
            self._file = dict.fromkeys(file.handle.keys(), file)
        elif (self.folder / INDEX).exists():
            self._file = _open_shards(self.folder)
        else:
            raise InputError(_no_weights_message(self.folder))

    @property
    def names(self) -> list[str]:
        """The tensors' names, sorted."""
        return sorted(self._file)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as safetensors spells it (``"BF16"``), from the header."""
        return self._slice(name).get_dtype()

    def numel(self, name: str) -> int:
        """Return a tensor's number of elements."""
        return math.prod(self.shape(name))

    def read(self, segment: Segment) -> Tensor:
        """Return a segment of its HF tensor, in the stored dtype, on the CPU."""
        assert segment.name is not None, "padding is stored in no file"
        stop = segment.hf_start + segment.size
        return self._slice(segment.name)[(slice(None),) * segment.dim + (slice(segment.hf_start, stop),)]

    def read_flat(self, name: str, start: int, out: Tensor) -> None:
        """Fill the one-dimensional ``out``, of the tensor's dtype, with its elements from ``start`` on.

        Raises:
            InputError: the file was truncated since it was opened.
        """
        file = self._file[name]
        try:
            read_into(out, file.path, file.starts[name] + start * out.element_size())
        except EOFError as error:
            raise InputError(f"safetensors file is truncated: {file.path} ends within {name}") from error

    def tensor(self, name: str) -> Tensor:
        """Return a complete tensor in the stored dtype, on the CPU; raises as :meth:`read_flat`."""
        flat = torch.empty(self.numel(name), dtype=DTYPES[self.dtype(name)])
        self.read_flat(name, 0, flat)
        return flat.view(self.shape(name))

    def release(self, name: str) -> None:
        """Drop a tensor that will not be read again from the page cache.

        A pass over a model larger than memory then reuses the same pages, which is faster than fresh ones, and does
        not evict other programs' pages.
        """
        file = self._file[name]
        size = self.numel(name) * DTYPES[self.dtype(name)].itemsize
        advise_page_cache(file.path, file.starts[name], size, os.POSIX_FADV_DONTNEED)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's elements in order as one-dimensional blocks, each in the memory of the last."""
        dtype, left = DTYPES[self.dtype(name)], self.numel(name)
        buffer = torch.empty(min(left, BLOCK_ELEMENTS), dtype=dtype)
        for start in range(0, left, BLOCK_ELEMENTS):
            block = buffer[: min(BLOCK_ELEMENTS, left - start)]
            self.read_flat(name, start, block)
            yield block

    def _slice(self, name: str) -> Any:
        return self._file[name].handle.get_slice(name)


def open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(20) == b"version https://git-"
        reason = (
            "it is a git-lfs pointer (run: git lfs pull)" if pointer else f"corrupt or truncated: {error}"
        )
        raise InputError(f"cannot read safetensors file {path}: {reason}") from error


def _open_shards(folder: Path) -> dict[str, _SafetensorsFile]:
    """Return each tensor's open shard, having checked the index against folder and shards."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"weight_map must map tensors to files, found {weight_map!r} in {path}")
    for file in weight_map.values():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise InputError(
                f"weight_map must name safetensors files of its own folder, found {file!r} in {path}"
            )
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"the index names shards that do not exist: {listed(absent)} in {folder}")
    files = {name: _SafetensorsFile(folder / name) for name in names}
    held = {(tensor, name) for name, file in files.items() for tensor in file.handle.keys()}  # noqa: SIM118
    indexed = set(weight_map.items())
    if missing := sorted(f"{tensor} ({name})" for tensor, name in indexed - held):
        raise InputError(
            f"the index names tensors that their shards do not hold: {listed(missing)} in {folder}"
        )
    if unindexed := sorted(f"{tensor} ({name})" for tensor, name in held - indexed):
        raise InputError(
            f"the shards hold tensors that the index does not name: {listed(unindexed)} in {folder}"
        )
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _no_weights_message(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"weights must be safetensors: convert {pickles[0]} to safetensors first, in {folder}"
    unindexed = [name for name in files if name.endswith(".safetensors")]
    if unindexed:
        return f"weights must be {SINGLE} or shards with {INDEX}, found only {unindexed[0]} in {folder}"
    return f"weights must be {SINGLE} or shards with {INDEX}, found neither in {folder}"
