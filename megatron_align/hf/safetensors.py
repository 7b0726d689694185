"""The safetensors files of a Hugging Face folder, found and looked through before a weight is read.

Nothing is loaded whole: training maps the files and copies its slices; passes over whole tensors read into a
buffer of theirs, as mapped pages would count as memory until they are reclaimed.
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

from megatron_align.errors import InputError
from megatron_align.model.families import Segment, read_json
from megatron_align.storage.atomic_write import advise, fill

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STRETCH = 1 << 22  # elements that are read at once in a pass over a whole tensor
# safetensors' names of what weights may be stored in
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class _File:
    """One safetensors file: its header is checked, its tensors can be mapped or read by their place.

    Raises:
        InputError: it is damaged or cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.handle = path, _open(path)

    @cached_property
    def starts(self) -> dict[str, int]:
        """Where in the file each tensor's bytes begin."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


class HFWeights:
    """The tensors of one Hugging Face folder: ``model.safetensors``, or shards with an index.

    Raises:
        InputError: there are none, or a file is missing, damaged, or does not hold what the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"a Hugging Face folder is needed, found none at {self.folder}")
        if (self.folder / SINGLE).exists():
            file = _File(self.folder / SINGLE)
            self._file = dict.fromkeys(file.handle.keys(), file)
        elif (self.folder / INDEX).exists():
            self._file = _open_shards(self.folder)
        else:
            raise InputError(_no_weights(self.folder))

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
        stop = segment.hf_start + segment.size
        return self._slice(segment.name)[(slice(None),) * segment.dim + (slice(segment.hf_start, stop),)]

    def read_flat(self, name: str, start: int, out: Tensor) -> None:
        """Fill the one-dimensional ``out``, of the tensor's dtype, with its elements from ``start`` on.

        Raises:
            InputError: the file was cut short since it was opened.
        """
        file = self._file[name]
        try:
            fill(out, file.path, file.starts[name] + start * out.element_size())
        except EOFError as error:
            raise InputError(
                f"a complete safetensors file is needed, it ends within {name} at {file.path}"
            ) from error

    def release(self, name: str) -> None:
        """Give back the page cache's memory of a tensor that will not be read again.

        A walk through a model larger than the memory then takes the same pages again and again, which is faster
        than fresh ones, and leaves what other programs keep there.
        """
        file = self._file[name]
        size = self.numel(name) * DTYPES[self.dtype(name)].itemsize
        advise(file.path, file.starts[name], size, os.POSIX_FADV_DONTNEED)

    def stretches(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's elements in order, one-dimensional; each stretch takes the memory of the last."""
        dtype, left = DTYPES[self.dtype(name)], self.numel(name)
        buffer = torch.empty(min(left, STRETCH), dtype=dtype)
        for start in range(0, left, STRETCH):
            part = buffer[: min(STRETCH, left - start)]
            self.read_flat(name, start, part)
            yield part

    def _slice(self, name: str) -> Any:
        return self._file[name].handle.get_slice(name)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(20) == b"version https://git-"
        found = "a git-lfs pointer (run: git lfs pull)" if pointer else f"it damaged or cut short ({error})"
        raise InputError(f"a complete safetensors file is needed, found {found} at {path}") from error


def _open_shards(folder: Path) -> dict[str, _File]:
    """Return each tensor's open shard, having checked the index against folder and shards."""
    place = folder / INDEX
    weight_map = read_json(place).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"weight_map must map tensors to files, found {weight_map!r} in {place}")
    for file in weight_map.values():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise InputError(f"weight_map must name safetensors files beside it, found {file!r} in {place}")
    names = sorted(set(weight_map.values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"the index names shards that are not there: {', '.join(absent)} in {folder}")
    files = {name: _File(folder / name) for name in names}
    held = {(tensor, name) for name, file in files.items() for tensor in file.handle.keys()}  # noqa: SIM118
    said = set(weight_map.items())
    if lost := sorted(f"{tensor} ({name})" for tensor, name in said - held):
        raise InputError(
            f"the index names tensors that their shards do not hold: {', '.join(lost)} in {folder}"
        )
    if silent := sorted(f"{tensor} ({name})" for tensor, name in held - said):
        raise InputError(
            f"the shards hold tensors that the index does not name: {', '.join(silent)} in {folder}"
        )
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _no_weights(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return f"the weights must be safetensors: convert {pickles[0]} to safetensors first, in {folder}"
    loose = [name for name in files if name.endswith(".safetensors")]
    if loose:
        return f"the weights must be {SINGLE} or shards with {INDEX}, found only {loose[0]} in {folder}"
    return f"the weights must be {SINGLE} or shards with {INDEX}, found neither in {folder}"
