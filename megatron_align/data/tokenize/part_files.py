"""Part files: the tokenised samples of one block of records, as columns with a checksum.

A part is written under a temporary name and renamed when it is complete; one that fails its checksum is not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_align.data.store import COLUMNS
from megatron_align.records import Sample

EXAMPLES = 20  # records that are named for each reason to leave one out
PART_COLUMNS = (
    "tokens",
    "scored",
    "lengths",
    "scored_counts",
    "weights",
    "prompt_lengths",
    "completion_counts",
    "completion_lengths",
    "completion_scored",
    "scores",
    "margins",
    "labels",
)
LEFT_OUT = ("dropped", "truncated", "skipped")


@dataclass(slots=True)
class Counts:
    """Numbers of samples and tokens, and of records left out; ``examples``: a line for the first few of each."""

    samples: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    dropped: int = 0
    truncated: int = 0
    skipped: int = 0
    largest_token: int = 0
    examples: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in LEFT_OUT})
    warnings: dict[str, str] = field(default_factory=dict)  # kind -> line, the first of each kind
    dropped_lengths: dict[str, int] = field(default_factory=dict)  # tokens, rounded up -> samples

    def note(self, reason: str, line: str) -> None:
        """Count a record that was dropped, truncated or skipped."""
        setattr(self, reason, getattr(self, reason) + 1)
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(line)

    def note_dropped_length(self, tokens: int) -> None:
        """Count the length of a dropped sample, rounded up to three digits."""
        unit = 10 ** max(len(str(tokens)) - 3, 0)
        length = str(-(-tokens // unit) * unit)
        self.dropped_lengths[length] = self.dropped_lengths.get(length, 0) + 1

    def add(self, other: Counts) -> None:
        """Add the counts of the next records."""
        for name in ("samples", "tokens", "scored_tokens", *LEFT_OUT):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_token = max(self.largest_token, other.largest_token)
        for name, lines in self.examples.items():
            lines += other.examples[name][: EXAMPLES - len(lines)]
        self.warnings = {**other.warnings, **self.warnings}
        for length, samples in other.dropped_lengths.items():
            self.dropped_lengths[length] = self.dropped_lengths.get(length, 0) + samples


def part_type(name: str) -> np.dtype:
    """Return the dtype of a part's column: lengths and counts become the store's offsets."""
    return COLUMNS.get(name, np.dtype("<i8"))


def part_file(folder: Path, index: int) -> Path:
    """Return the path of the part with this index."""
    return folder / f"{index:08d}.part"


def part_columns(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Return samples as the columns of a part; columns that their kind does not have are dropped later."""
    completions = [s.completion_lengths or (len(s.tokens_L) - s.prompt_length,) for s in samples]
    scores = [s.scores or (math.nan,) * len(c) for s, c in zip(samples, completions, strict=True)]
    labels = [-1 if s.label is None else int(s.label) for s in samples]
    columns = {
        "tokens": _concatenated([s.tokens_L for s in samples]),
        "scored": _concatenated([s.scored_L for s in samples]),
        "lengths": [len(s.tokens_L) for s in samples],
        "scored_counts": [int(s.scored_L.sum()) for s in samples],
        "weights": [s.weight for s in samples],
        "prompt_lengths": [s.prompt_length for s in samples],
        "completion_counts": [len(lengths) for lengths in completions],
        "completion_lengths": _concatenated(completions),
        "completion_scored": _concatenated([s.completion_scored() for s in samples]),
        "scores": _concatenated(scores),
        "margins": [s.margin for s in samples],
        "labels": labels,
    }
    return {name: np.ascontiguousarray(columns[name], dtype=part_type(name)) for name in PART_COLUMNS}


def _concatenated(arrays: list[Any]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0)


def write_part(file: Path, key: list[Any], counts: Counts, columns: dict[str, np.ndarray]) -> None:
    """Write a part.

    Args:
        file: its path.
        key: of its block, see :meth:`.record_blocks.RecordBlock.key`.
        counts: of its block.
        columns: as :func:`part_columns`.
    """
    digest = hashlib.sha256()
    for name in PART_COLUMNS:
        digest.update(columns[name])
    header = {
        "block": key,
        "sha256": digest.hexdigest(),
        "sizes": {name: len(columns[name]) for name in PART_COLUMNS},
        "counts": {name: getattr(counts, name) for name in Counts.__slots__},
    }
    unfinished = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(unfinished, "wb") as out:
            out.write(json.dumps(header).encode() + b"\n")
            for name in PART_COLUMNS:
                out.write(columns[name])
        os.replace(unfinished, file)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise


def read_part(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Return a part's header and columns; None: it is absent or corrupt."""
    try:
        with open(file, "rb") as opened:
            header = json.loads(opened.readline())
            columns = {
                name: np.fromfile(opened, dtype=part_type(name), count=header["sizes"][name])
                for name in PART_COLUMNS
            }
    except (OSError, ValueError, LookupError, TypeError):
        return None
    digest = hashlib.sha256()
    for values in columns.values():
        digest.update(values)
    return (header, columns) if digest.hexdigest() == header.get("sha256") else None


def counts_of(header: dict[str, Any]) -> Counts:
    """Return the counts in a part's header."""
    return Counts(**header["counts"])
