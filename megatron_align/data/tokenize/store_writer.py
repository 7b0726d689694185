"""Join part files into the columns of a token store, and write its manifest."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_align.data.store import COLUMNS, COLUMNS_OF_KIND, MANIFEST
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.part_files import LEFT_OUT, Counts, counts_of, part_file, read_part
from megatron_align.data.tokenize.work_dir import WorkDir
from megatron_align.storage.fsync import fsync_open


class _Column:
    """One file of the store, hashed while it is written."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.bin"
        self._file: IO[bytes] = _create(self._path)
        self._type, self._digest, self.bytes = COLUMNS[name], hashlib.sha256(), 0

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, values: Any) -> None:
        values = np.ascontiguousarray(values, dtype=self._type)
        self._file.write(values)
        self._digest.update(values)
        self.bytes += values.nbytes

    def finish(self) -> str:
        """Flush to disk (a store that has its name is complete) and return the hash."""
        self._file.flush()
        fsync_open(self._file.fileno(), self._path)
        return self._digest.hexdigest()


def _create(file: Path) -> IO[bytes]:
    return open(file, "wb")


@dataclass(slots=True)
class _Ends:
    """Tokens and completions of the parts joined so far."""

    tokens: int = 0
    completions: int = 0


def join_parts(work: WorkDir, parts: int, spec: StoreSpec, manifest: dict[str, Any]) -> None:
    """Join ``parts`` part files into the store's columns; ``manifest`` is completed and written."""
    work.store.mkdir()
    sources = [Counts() for _ in spec.sources]
    ends = _Ends()
    with ExitStack() as stack:
        names = COLUMNS_OF_KIND[manifest["kind"]]
        columns = {name: stack.enter_context(_Column(work.store, name)) for name in names}
        columns["offsets"].add([0])
        if "completion_offsets" in columns:
            columns["completion_offsets"].add([0])
        for index in range(parts):
            part = read_part(part_file(work.parts, index))
            if part is None:
                raise OSError(f"{part_file(work.parts, index)} was corrupted while it was needed")
            header, values = part
            source = header["block"][0]
            sources[source].add(counts_of(header))
            _append(columns, values, source, ends)
            work.touch()
        hashes = {name: column.finish() for name, column in columns.items()}
    total = Counts()
    for counts in sources:
        total.add(counts)
    assert ends.tokens == total.tokens
    manifest |= {
        **_totals(total),
        "largest_token": total.largest_token,
        "examples": total.examples,
        "warnings": list(total.warnings.values()),
        "dropped_lengths": {
            str(n): total.dropped_lengths[str(n)] for n in sorted(map(int, total.dropped_lengths))
        },
        "sources": [
            {"path": path, **_totals(counts)} for path, counts in zip(spec.sources, sources, strict=True)
        ],
        "bytes": {name: column.bytes for name, column in columns.items()},
        "sha256": hashes,
    }
    with open(work.store / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2, ensure_ascii=True)
        file.flush()
        fsync_open(file.fileno(), work.store)


def _totals(counts: Counts) -> dict[str, int]:
    return {name: getattr(counts, name) for name in ("samples", "tokens", "scored_tokens", *LEFT_OUT)}


def _append(columns: dict[str, _Column], part: dict[str, np.ndarray], source: int, ends: _Ends) -> None:
    computed = {
        "offsets": ends.tokens + np.cumsum(part["lengths"]),
        "sources": np.full(len(part["lengths"]), source),
        "completion_offsets": ends.completions + np.cumsum(part["completion_counts"]),
    }
    for name, column in columns.items():
        column.add(computed[name] if name in computed else part[name])
    ends.tokens += int(part["lengths"].sum())
    ends.completions += int(part["completion_counts"].sum())
