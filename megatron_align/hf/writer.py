"""Weights -> a Hugging Face folder that is complete or absent, written tensor by tensor.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place
of each tensor), and the tensors' bytes. As the places are known beforehand, nothing need be held to be written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_align.data.tokenize.chat_template import load_tokenizer
from megatron_align.errors import InputError
from megatron_align.hf.safetensors import DTYPES, INDEX, SINGLE
from megatron_align.model.families import ModelShape, read_json, rows
from megatron_align.storage.atomic_write import put_in_place
from megatron_align.storage.direct_io import DirectFile
from megatron_align.storage.journal import Journal

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What a Hugging Face folder holds besides its weights, and a model trained from it keeps.
_ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.py",  # of architectures that transformers does not know; never run by us
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


class TensorSpec(NamedTuple):
    """What a tensor will be, known before its numbers are."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Place(NamedTuple):
    """Where a tensor's bytes go."""

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
    """Writes a folder of safetensors whose tensors are declared beforehand, in any order, holding none of them.

    Everything goes into ``partial``, beside ``folder``, and is renamed at the end: put the other files of the
    model there before :meth:`close`, so that the folder appears whole. As a context manager it closes on
    success, and on an exception leaves no trace. Only one writer per folder.

    Args:
        folder: must be new or empty, unless ``overwrite``; then it is replaced once the new one is whole
        specs: every tensor, in the order in which they fill the shards
        max_bytes: of one shard; a larger tensor gets a shard of its own
        overwrite: replace what ``folder`` holds
        key: what decides the folder's content. A writer with the same key goes on where one that was killed
            or interrupted has stopped, with the shards that were complete (see :meth:`has`)

    Raises:
        InputError: ``folder`` is in the way.
    """

    def __init__(
        self,
        folder: str | Path,
        specs: Mapping[str, TensorSpec],
        max_bytes: int = 5 * 10**9,
        overwrite: bool = False,
        key: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.overwrite = Path(folder).resolve(), overwrite
        self._refuse_occupied()
        self.journal = Journal(self.folder, key)
        self.partial = self.journal.partial
        shards = _pack(specs, max_bytes)
        self._total_bytes = sum(spec.nbytes for spec in specs.values())
        self._places: dict[str, _Place] = {}
        self._headers: dict[Path, bytes] = {}
        self._open: dict[Path, set[str]] = {}  # the tensors that a shard still lacks
        for number, names in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(self.partial / file, {name: specs[name] for name in names})
            self._open[self.partial / file] = set() if file in self.journal.done else set(names)
        self._written: dict[str, int] = dict.fromkeys(specs, 0)  # bytes
        self._file: DirectFile | None = None
        self._path = self.partial  # of the shard that is open
        self._facts: dict[str, Any] = {k: v for facts in self.journal.done.values() for k, v in facts.items()}

    def has(self, name: str) -> bool:
        """Tell whether the tensor is in a shard that is complete."""
        return not self._open[self._places[name].file]

    def facts(self, name: str) -> Any:
        """Return what was noted of a finished tensor, perhaps before a restart."""
        return self._facts[name]

    def write(self, name: str, tensor: Tensor, facts: Any = None) -> None:
        """Write a whole tensor and finish it."""
        if tuple(tensor.shape) != (shape := self._places[name].spec.shape):
            raise ValueError(f"{name} must be {list(shape)}, is {list(tensor.shape)}")
        self.write_flat(name, 0, tensor.detach().reshape(-1))
        self.finish(name, facts)

    def write_flat(self, name: str, start: int, part: Tensor) -> None:
        """Write a tensor's elements from ``start`` on; ``part`` is one-dimensional, of the declared dtype."""
        file, offset, spec = self._places[name]
        self._written[name] += part.nbytes
        if part.dtype != spec.dtype or self._written[name] > spec.nbytes:
            raise ValueError(f"{name} must be {spec}, written once; got {part.numel()} of {part.dtype}")
        view = memoryview(part.cpu().contiguous().view(torch.uint8).numpy())
        with _naming(file):
            if self._path != file:
                self._finish_file()
                self._file, self._path = DirectFile(file), file
                self._file.write(0, memoryview(self._headers[file]))
            self._file.write(offset + start * spec.dtype.itemsize, view)

    def finish(self, name: str, facts: Any = None) -> None:
        """Say that a tensor is written; ``facts`` (a JSON value) are kept for a restart."""
        file, _, spec = self._places[name]
        if self._written[name] != spec.nbytes:
            raise ValueError(f"{name} must be {spec.nbytes} bytes, {self._written[name]} were written")
        self._facts[name] = facts
        self._open[file].remove(name)
        if not self._open[file]:
            with _naming(file):
                self._finish_file()
            names = [other for other, place in self._places.items() if place.file == file]
            self.journal.add(file, {other: self._facts[other] for other in names})

    def close(self) -> None:
        """Write the index, make everything durable, and put the folder in its place."""
        if lost := [name for name in self._places if not self.has(name)]:
            raise ValueError(f"tensors were declared and not written: {', '.join(lost)}")
        self._write_index()
        self.journal.close()
        self._refuse_occupied()
        put_in_place(self.partial, self.folder)

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
            self.journal.leave(kind)

    def _finish_file(self) -> None:
        """Have the shard that is open on the disk, as far as it was written."""
        if self._file:
            file, self._file, self._path = self._file, None, self.partial
            file.finish()

    def _refuse_occupied(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"the exported model needs a folder, found a file at {self.folder}")
        if not self.overwrite and self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(f"the exported model needs a new or empty folder, found files in {self.folder}")

    def _lay_out(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Decide where in a shard each tensor lies, wide elements first so that all are aligned."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, spec in sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize):
            span = [offset, offset + spec.nbytes]
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
            offset = span[1]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._headers[file] = len(text).to_bytes(8, "little") + text
        for name, spec in specs.items():
            start = len(self._headers[file]) + header[name]["data_offsets"][0]
            self._places[name] = _Place(file, start, spec)

    def _write_index(self) -> None:
        if len(self._headers) > 1:
            weight_map = {name: place.file.name for name, place in sorted(self._places.items())}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Say in an error of the disk (full, perhaps) what was being written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"writing the model failed at {file}: {error}") from error


def _pack(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    """Return the names of each shard."""
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards


def copy_assets(source: str | Path, target: str | Path) -> None:
    """Copy configuration, tokenizer, chat templates and licence of an HF folder; links are followed.

    Raises:
        InputError: ``source`` has no config.json.
    """
    source, target = Path(source), Path(target)
    if not (source / "config.json").is_file():
        raise InputError(
            f"a Hugging Face folder needs a file config.json, found none at {source / 'config.json'}"
        )
    for path in sorted({path for pattern in _ASSETS for path in source.glob(pattern)}):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def write_config_architecture(folder: str | Path, shape: ModelShape) -> None:
    """Say in config.json that a language model has become a reward model; it may say so already.

    transformers reads the reward off the last token that is no padding, so the padding token must be known.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    if not shape.is_reward or config.get("architectures") == [shape.architecture]:
        return
    config["architectures"] = [shape.architecture]
    config["num_labels"], config["id2label"], config["label2id"] = 1, {"0": "LABEL_0"}, {"LABEL_0": 0}
    if config.get("pad_token_id") is None:
        tokenizer = load_tokenizer(str(folder))
        padding = tokenizer.pad_token_id
        config["pad_token_id"] = tokenizer.eos_token_id if padding is None else padding
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_config_dtype(folder: str | Path, dtype: torch.dtype) -> None:
    """Say in config.json what the weights are stored in, under the key (or keys) that it already uses.

    ``dtype`` is transformers 5's key, ``torch_dtype`` that of 4; every version reads the latter, which is
    therefore added where there is neither.
    """
    path = Path(folder) / "config.json"
    config = read_json(path)
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
