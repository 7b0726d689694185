"""Tokenise once into a memory-mapped folder: complete or absent, keyed by all that decides its content.

A store holds ``tokens.bin`` (int32, samples one after the other), ``scored.bin`` (uint8, 1 where the token is
a target), ``offsets.bin`` and ``scored_counts.bin`` (int64), and ``manifest.json``.

Shapes: S samples of the store, L tokens of one sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import transformers
from rich.console import Console
from rich.progress import track

from megatron_align.data.sources import read_file
from megatron_align.data.templates import Template, load_tokenizer
from megatron_align.errors import InputError
from megatron_align.records import Sample

VERSION = 2
POLL_SECONDS = 0.2
_COLUMNS = {
    "tokens": np.dtype("<i4"),
    "scored": np.dtype("u1"),
    "offsets": np.dtype("<i8"),
    "scored_counts": np.dtype("<i8"),
}
_TOKENIZER_PARTS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
    "additional_chat_templates/*.jinja",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSpec:
    """What decides the content of a store, and where stores are kept.

    Args:
        files: data files, in order
        tokenizer: Hugging Face folder with the tokenizer
        sequence_length: longest sample, in tokens
        too_long: error: refuse a longer one; drop: leave it out; truncate: keep its first tokens
        cache: folder of stores
    """

    files: tuple[str, ...]
    tokenizer: str
    sequence_length: int
    too_long: Literal["error", "drop", "truncate"]
    cache: str

    def inputs(self) -> dict[str, Any]:
        """Return the inputs by content. Raises InputError for a file that cannot be read."""
        folder = Path(self.tokenizer)
        parts = sorted(
            {part for pattern in _TOKENIZER_PARTS for part in folder.glob(pattern) if part.is_file()}
        )
        parts = [part for part in parts if not part.name.endswith(".index.json")]
        return {
            "version": VERSION,
            "transformers": transformers.__version__,
            "data": [{"file": Path(file).name, "sha256": _sha256(file)} for file in self.files],
            "tokenizer": {str(part.relative_to(folder)): _sha256(str(part)) for part in parts},
            "sequence_length": self.sequence_length,
            "too_long": self.too_long,
        }

    def path(self, inputs: dict[str, Any]) -> Path:
        """Return the folder of the store with these inputs."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.cache) / key


def prepare(spec: StoreSpec) -> Path:
    """Return the store of ``spec``, tokenising the data if there is none yet.

    Raises:
        InputError: for bad data or a bad tokenizer, a sample that is too long (``too_long`` error), or no
            sample left; names the place.
    """
    inputs = spec.inputs()
    path = spec.path(inputs)
    if path.exists():
        return path
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.mkdir(parents=True)
        _write(unfinished, spec, inputs)
        _publish(unfinished, path)
    except OSError as error:
        raise InputError(f"{spec.cache}: tokenised data could not be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def prepare_or_wait(spec: StoreSpec, local_rank: int) -> Path:
    """Prepare on local rank 0; the others wait for its store, until it comes or the launcher ends them."""
    if local_rank == 0:
        return prepare(spec)
    path = spec.path(spec.inputs())
    while not path.exists():
        time.sleep(POLL_SECONDS)
    return path


class TokenStore:
    """A store, opened: nothing but the index is read until a sample is asked for.

    Args:
        path: what :func:`prepare` returned.

    Raises:
        InputError: if a file is missing or does not have the size that the manifest tells.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = _read_manifest(self.path)
        columns = {name: self._open(name) for name in _COLUMNS}
        self._tokens, self._scored = columns["tokens"], columns["scored"]
        self._offsets = np.array(columns["offsets"], dtype=np.int64)
        self.scored_counts = np.array(columns["scored_counts"], dtype=np.int64)  # int64[S]
        self.lengths = np.diff(self._offsets)  # int64[S]

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, i: int) -> Sample:
        """Return sample ``i`` (copied out of the map)."""
        if not 0 <= i < len(self):
            raise IndexError(f"store has samples 0..{len(self) - 1}, asked for {i}")
        part = slice(self._offsets[i], self._offsets[i + 1])
        return Sample(np.array(self._tokens[part]), np.array(self._scored[part], dtype=bool))

    def _open(self, name: str) -> np.ndarray:
        file, expected = self.path / f"{name}.bin", self.manifest["bytes"][name]
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise InputError(
                f"{file}: must have {expected} bytes, got {size}: delete the folder, it will be made anew"
            )
        return np.memmap(file, dtype=_COLUMNS[name], mode="r")


class _Writer:
    """Appends samples to the files of a store; only the index stays in memory."""

    def __init__(self, files: dict[str, IO[bytes]]) -> None:
        self._files = files
        self.offsets = [0]
        self.scored_counts: list[int] = []
        self.largest_token = 0

    def add(self, sample: Sample) -> None:
        self._put("tokens", sample.tokens_L)
        self._put("scored", sample.scored_L)
        self.offsets.append(self.offsets[-1] + len(sample.tokens_L))
        self.scored_counts.append(int(sample.scored_L.sum()))
        self.largest_token = max(self.largest_token, int(sample.tokens_L.max()))

    def finish(self) -> None:
        """Write the index, and everything down to the disk: a store that has its name is whole."""
        self._put("offsets", np.array(self.offsets))
        self._put("scored_counts", np.array(self.scored_counts))
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def _put(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values, dtype=_COLUMNS[name]).tobytes())


def _write(folder: Path, spec: StoreSpec, inputs: dict[str, Any]) -> None:
    template = Template(load_tokenizer(spec.tokenizer))
    shapes: list[str] = []
    left_out = {"dropped": 0, "truncated": 0}
    with ExitStack() as stack:
        files = {name: stack.enter_context(_create(folder / f"{name}.bin")) for name in _COLUMNS}
        writer = _Writer(files)
        for sample, where in _progress(_samples(spec, template, shapes)):
            kept = _fit(sample, where, spec, left_out)
            if kept is not None:
                writer.add(kept)
        writer.finish()
    if not writer.scored_counts:
        raise InputError(
            f"{', '.join(spec.files)}: must leave a sample within data.sequence_length = "
            f"{spec.sequence_length} tokens, got none: all {left_out['dropped']} were dropped as too long"
        )
    manifest = {
        **inputs,
        "shapes": shapes,
        "samples": len(writer.scored_counts),
        "tokens": writer.offsets[-1],
        "scored_tokens": sum(writer.scored_counts),
        "largest_token": writer.largest_token,
        **left_out,
        "bytes": {name: (folder / f"{name}.bin").stat().st_size for name in _COLUMNS},
    }
    with open(folder / "manifest.json", "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _create(file: Path) -> IO[bytes]:
    return open(file, "wb")


def _samples(spec: StoreSpec, template: Template, shapes: list[str]) -> Iterator[tuple[Sample, str]]:
    """Yield ``(sample, where)`` of every record, noting the shape of each file."""
    for path in spec.files:
        shape, records = read_file(path)
        shapes.append(shape.name)
        for record in records:
            yield template.sample(record), record.where


def _fit(sample: Sample, where: str, spec: StoreSpec, left_out: dict[str, int]) -> Sample | None:
    """Apply ``too_long``; None: the sample is left out."""
    length, limit = len(sample.tokens_L), spec.sequence_length
    if length <= limit:
        return sample
    if spec.too_long == "error":
        raise InputError(
            f"{where}: a sample must fit in data.sequence_length = {limit} tokens, got {length}; "
            "raise it, or set data.too_long to drop or truncate"
        )
    if spec.too_long == "truncate" and sample.scored_L[:limit].any():
        left_out["truncated"] += 1
        return Sample(sample.tokens_L[:limit], sample.scored_L[:limit])
    left_out["dropped"] += 1
    return None


def _publish(unfinished: Path, path: Path) -> None:
    """Give the finished store its name; another process may have been faster, with the same content."""
    try:
        unfinished.rename(path)
    except OSError:
        if not path.is_dir():
            raise


def _progress(samples: Iterator[tuple[Sample, str]]) -> Iterator[tuple[Sample, str]]:
    console = Console(stderr=True)
    return track(
        samples, description="Tokenising", total=None, console=console, disable=not sys.stderr.isatty()
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        raise InputError(f"{path}: must be a folder of tokenised data with a manifest.json, found none")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}: must be JSON, got {error.msg}: delete the folder, it will be made anew"
        ) from error
    if manifest.get("version") != VERSION:
        raise InputError(f"{file}: must have version {VERSION}, got {manifest.get('version')}")
    return manifest


def _sha256(path: str) -> str:
    if not Path(path).is_file():
        raise InputError(f"{path}: must be a file, found {'a folder' if Path(path).is_dir() else 'nothing'}")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
