"""The token store: a memory-mapped folder of tokenised samples, complete or absent (``tokenize.prepare`` writes it).

One file per column, all little-endian, described by ``manifest.json``:

| column               | type       | holds                                                      | kinds           |
|----------------------|------------|------------------------------------------------------------|-----------------|
| tokens               | int32[T]   | samples one after the other, a prompt stored once          | all             |
| scored               | uint8[T]   | 1 where the token is a target                              | all             |
| offsets              | int64[S+1] | where each sample starts                                   | all             |
| scored_counts        | int64[S]   | targets of each sample                                     | all             |
| sources              | int32[S]   | which source of the mixture it came from                   | all             |
| weights              | float64[S] | of the sample in the loss                                  | all             |
| prompt_lengths       | int64[S]   | tokens of the prompt                                       | all but chat    |
| completion_offsets   | int64[S+1] | where each sample's completions start in the next two      | all but chat    |
| completion_lengths   | int64[C]   | tokens of each completion                                  | all but chat    |
| completion_scored    | int64[C]   | targets of each completion                                 | all but chat    |
| scores               | float64[C] | of each completion, NaN where none was given               | all but chat    |
| margins              | float64[S] | by how much the chosen one is better, NaN where not given  | pair            |
| labels               | int8[S]    | 1 desirable, 0 not, -1 not given                           | unpaired        |

Shapes: S samples, T tokens and C completions of the store, L tokens of one sample.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_align.errors import InputError, one_line
from megatron_align.records import Sample

VERSION = 4
MANIFEST = "manifest.json"
COLUMNS: dict[str, np.dtype] = {
    "tokens": np.dtype("<i4"),
    "scored": np.dtype("u1"),
    "offsets": np.dtype("<i8"),
    "scored_counts": np.dtype("<i8"),
    "sources": np.dtype("<i4"),
    "weights": np.dtype("<f8"),
    "prompt_lengths": np.dtype("<i8"),
    "completion_offsets": np.dtype("<i8"),
    "completion_lengths": np.dtype("<i8"),
    "completion_scored": np.dtype("<i8"),
    "scores": np.dtype("<f8"),
    "margins": np.dtype("<f8"),
    "labels": np.dtype("i1"),
}
_OF_ALL = ("tokens", "scored", "offsets", "scored_counts", "sources", "weights")
_OF_PREFERENCES = (
    "prompt_lengths",
    "completion_offsets",
    "completion_lengths",
    "completion_scored",
    "scores",
)
COLUMNS_OF_KIND = {
    "chat": _OF_ALL,
    "pair": (*_OF_ALL, *_OF_PREFERENCES, "margins"),
    "ranked": (*_OF_ALL, *_OF_PREFERENCES),
    "triple": (*_OF_ALL, *_OF_PREFERENCES),
    "unpaired": (*_OF_ALL, *_OF_PREFERENCES, "labels"),
}
_REMEDY = "delete the folder, it will be written again"


class TokenStore:
    """A :class:`.sample_table.SampleTable` on disk: opening it reads the index only.

    Args:
        path: folder of the store, as ``prepare`` returns it.
        verify: also read every column and compare its hash with the manifest's.

    Attributes:
        manifest: its inputs and counts.
        kind: chat, triple, pair, ranked or unpaired.
        lengths: int64[S], stored tokens of each sample, a shared prompt counted once.
        duplicated_lengths: int64[S], tokens where every completion repeats the prompt.
        scored_counts: int64[S], targets of each sample.
        sources: int32[S], which source of the mixture it came from.
        weights: float64[S], of the sample in the loss.
        prompt_lengths: int64[S], 0 for chat.
        completion_counts: int64[S], 1 for chat.
        completion_offsets: int64[S+1], where each sample's completions start among all of the store.
        completion_scored: int64[C], targets of each completion.
        completion_lengths: int64[C], tokens of each completion; of a chat sample all of its tokens.
        scores: float64[C], NaN where none was given; not for chat.
        margins: float64[S], NaN where none was given; for pairs only.

    Raises:
        InputError: if a file is missing or does not have the size (``verify``: the hash) that is in the
            manifest.
    """

    def __init__(self, path: str | Path, *, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)
        self.kind: str = self.manifest["kind"]
        columns = {name: self._open(name) for name in COLUMNS_OF_KIND[self.kind]}
        if verify:
            self.verify()
        self._tokens, self._scored = columns["tokens"], columns["scored"]
        self._offsets = np.array(columns["offsets"], dtype=np.int64)
        self.lengths = np.diff(self._offsets)
        self.scored_counts = np.array(columns["scored_counts"], dtype=np.int64)
        self.sources = np.array(columns["sources"], dtype=np.int32)
        self.weights = np.array(columns["weights"], dtype=np.float64)
        if self.kind == "chat":
            self.prompt_lengths = np.zeros(len(self.lengths), dtype=np.int64)
            self.completion_offsets = np.arange(len(self.lengths) + 1)
            self.completion_scored = self.scored_counts
            self.completion_lengths = self.lengths
        else:
            self.prompt_lengths = np.array(columns["prompt_lengths"], dtype=np.int64)
            self.completion_offsets = np.array(columns["completion_offsets"], dtype=np.int64)
            self.completion_scored = np.array(columns["completion_scored"], dtype=np.int64)
            self.completion_lengths = np.array(columns["completion_lengths"], dtype=np.int64)
        self.completion_counts = np.diff(self.completion_offsets)
        self.duplicated_lengths = self.lengths + (self.completion_counts - 1) * self.prompt_lengths
        self.completion_columns: dict[str, np.ndarray] = {}
        self.row_columns: dict[str, np.ndarray] = {}
        self._scores, self._margins = columns.get("scores"), columns.get("margins")
        self._labels = columns.get("labels")

    @property
    def scores(self) -> np.ndarray:
        assert self._scores is not None, "chat data have no scores"
        return self._scores

    @property
    def margins(self) -> np.ndarray:
        assert self._margins is not None, "only pairs have margins"
        return self._margins

    def with_completion_columns(self, columns: Mapping[str, np.ndarray]) -> TokenStore:
        """Return this store with further values of each completion, by name, [C]; they are not written to it."""
        other = copy.copy(self)
        other.completion_columns = {**self.completion_columns, **columns}
        return other

    def with_row_columns(self, columns: Mapping[str, np.ndarray]) -> TokenStore:
        """Return this store with further values of each target, by name, [N] or [N, K]; they are not written to it."""
        other = copy.copy(self)
        other.row_columns = {**self.row_columns, **columns}
        return other

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, i: int) -> Sample:
        """Return sample ``i`` (copied out of the map)."""
        if not 0 <= i < len(self):
            raise IndexError(f"the store has samples 0..{len(self) - 1}, got {i}")
        part = slice(self._offsets[i], self._offsets[i + 1])
        tokens_L, scored_L = np.array(self._tokens[part]), np.array(self._scored[part], dtype=bool)
        weight = float(self.weights[i])
        if self.kind == "chat":
            return Sample(tokens_L, scored_L, weight=weight)
        scores = tuple(self.scores[self._completions(i)].tolist())
        label = -1 if self._labels is None else int(self._labels[i])
        return Sample(
            tokens_L,
            scored_L,
            prompt_length=int(self.prompt_lengths[i]),
            completion_lengths=tuple(self.completion_lengths[self._completions(i)].tolist()),
            scores=() if all(map(math.isnan, scores)) else scores,
            margin=math.nan if self._margins is None else float(self._margins[i]),
            label=None if label < 0 else bool(label),
            weight=weight,
        )

    def last_tokens(self) -> list[int]:
        """Return the distinct tokens that completions end with."""
        before_C = (
            np.cumsum(self.completion_lengths) - self.completion_lengths
        )  # tokens of all completions before it
        starts_C = np.repeat(self._offsets[:-1] + self.prompt_lengths, self.completion_counts)
        within_C = before_C - np.repeat(before_C[self.completion_offsets[:-1]], self.completion_counts)
        return np.unique(self._tokens[starts_C + within_C + self.completion_lengths - 1]).tolist()

    def verify(self) -> None:
        """Read every column and compare its hash with the manifest's.

        Raises:
            InputError: if one differs; names the file.
        """
        for name in COLUMNS_OF_KIND[self.kind]:
            file, expected = self.path / f"{name}.bin", self.manifest["sha256"][name]
            actual = sha256(file)
            if actual != expected:
                raise InputError(f"{file}: must have sha256 {expected}, got {actual}: {_REMEDY}")

    def _completions(self, i: int) -> slice:
        return slice(self.completion_offsets[i], self.completion_offsets[i + 1])

    def _open(self, name: str) -> np.ndarray:
        file, expected = self.path / f"{name}.bin", self.manifest["bytes"][name]
        size = file.stat().st_size if file.is_file() else 0
        if size != expected:
            raise InputError(f"{file}: must have {expected} bytes, got {size}: {_REMEDY}")
        return np.memmap(file, dtype=COLUMNS[name], mode="r")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a store, or raise InputError if this version cannot read it."""
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{path}: must be a folder of tokenised data with a {MANIFEST}, found none")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: must be JSON, got {one_line(error)}: {_REMEDY}") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise InputError(f"{file}: must have version {VERSION}, got {version}: {_REMEDY}")
    return manifest


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, read in blocks."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
