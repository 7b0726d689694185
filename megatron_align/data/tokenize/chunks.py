"""Records to finished parts: the files are cut into chunks of records, each tokenised into one part file.

A part is written beside its place and then given its name, and carries a hash: it is whole or it is not read.
Chunks are the same whatever the number of processes, so a later run takes up the parts that it finds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_align.data.formats.files import read_file
from megatron_align.data.store import COLUMNS
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.chat_template import Template, load_tokenizer
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Preference, Record, Sample

CHUNK_RECORDS = 1024
CHUNK_CHARACTERS = 2_000_000  # bounds memory where records are long
EXAMPLES = 20  # told of what was left out
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
    """What became of the records; ``examples`` are the first few of each kind, as lines for people."""

    samples: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    dropped: int = 0
    truncated: int = 0
    skipped: int = 0
    largest_token: int = 0
    examples: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in LEFT_OUT})

    def note(self, what: str, line: str) -> None:
        """Count one record that was dropped, truncated or skipped."""
        setattr(self, what, getattr(self, what) + 1)
        if len(self.examples[what]) < EXAMPLES:
            self.examples[what].append(line)

    def add(self, other: Counts) -> None:
        """Add the counts of what follows."""
        for name in ("samples", "tokens", "scored_tokens", *LEFT_OUT):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_token = max(self.largest_token, other.largest_token)
        for name, lines in self.examples.items():
            lines += other.examples[name][: EXAMPLES - len(lines)]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Records of one file, tokenised together. ``bad``: malformed ones that were skipped among them."""

    index: int
    source: int
    records: list[Record]
    bad: list[str]

    def key(self) -> list[Any]:
        """Return what tells this chunk from another of the same number."""
        first = self.records[0].where if self.records else ""
        return [self.source, len(self.records), first, len(self.bad)]


def read_shapes(spec: StoreSpec) -> tuple[str, list[str]]:
    """Return the kind of the records of all files, and the names of their shapes.

    Raises:
        InputError: if two files differ in kind, or ``too_long: truncate`` is asked for preferences.
    """
    kinds: dict[str, str] = {}
    shapes: list[str] = []
    for file in (file for files in spec.files() for file in files):
        shape, _ = read_file(file, spec.shape, _ignore if spec.on_bad_record == "skip" else None)
        kinds.setdefault(shape.kind, file)
        if shape.name not in shapes:
            shapes.append(shape.name)
        if len(kinds) > 1:
            (one, first), (other, second) = kinds.items()
            raise InputError(
                f"{second}: must hold {one} data like {first}, got {other} data (shape '{shape.name}'): "
                "one run trains on one kind"
            )
        if shape.kind != "chat" and spec.too_long == "truncate":
            raise InputError(
                f"{file}: data.too_long: truncate is for chat data, got {shape.kind} data: a comparison of cut "
                "completions would be another one; set it to drop, or raise data.sequence_length"
            )
    return next(iter(kinds)), shapes


def _ignore(_: InputError) -> None:
    """Malformed records are counted when the file is read for good."""


def read_chunks(spec: StoreSpec, failed: list[InputError]) -> Iterator[Chunk]:
    """Yield the records of all files in order, in chunks.

    An InputError of reading ends the chunks and is put into ``failed``, as what came before it may have an
    error of its own, which is then the first.
    """
    index = 0
    for source, files in enumerate(spec.files()):
        for file in files:
            bad: list[str] = []
            records: list[Record] = []
            characters = 0
            note = (lambda error, bad=bad: bad.append(str(error))) if spec.on_bad_record == "skip" else None
            try:
                for record in read_file(file, spec.shape, note)[1]:
                    records.append(record)
                    characters += _characters(record)
                    if len(records) >= CHUNK_RECORDS or characters >= CHUNK_CHARACTERS:
                        yield Chunk(index, source, records, bad[:])
                        index, records, characters = index + 1, [], 0
                        bad.clear()
            except InputError as error:
                failed.append(error)
            if records or bad:
                yield Chunk(index, source, records, bad[:])
                index += 1
            if failed:
                return


def _characters(record: Record) -> int:
    if isinstance(record, Conversation):
        return sum(len(message.content) for message in record.messages)
    if isinstance(record, Completion):
        return len(record.prompt) + len(record.completion)
    texts = (record.prompt, *record.completions)
    return sum(len(t) if isinstance(t, str) else sum(len(m.content) for m in t) for t in texts)


class Tokeniser:
    """Writes the parts of a store into ``folder``."""

    def __init__(self, spec: StoreSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self._template = Template(load_tokenizer(spec.tokenizer), spec.template())

    def write(self, chunk: Chunk) -> Counts:
        """Tokenise a chunk into its part.

        Raises:
            InputError: for a bad record (``on_bad_record: error``) or one that is too long (``too_long: error``).
        """
        counts = Counts()
        for line in chunk.bad:
            counts.note("skipped", line)
        samples = [s for s in (self._sample(record, counts) for record in chunk.records) if s is not None]
        columns = _columns(samples)
        counts.samples, counts.tokens = len(samples), len(columns["tokens"])
        counts.scored_tokens = int(columns["scored"].sum())
        counts.largest_token = int(columns["tokens"].max(initial=0))
        _write_part(part_file(self.folder, chunk.index), chunk, counts, columns)
        return counts

    def _sample(self, record: Record, counts: Counts) -> Sample | None:
        try:
            sample = self._template.sample(record)
        except InputError as error:
            if self.spec.on_bad_record == "error":
                raise
            counts.note("skipped", str(error))
            return None
        return _fit(sample, record, self.spec, counts)


def _fit(sample: Sample, record: Record, spec: StoreSpec, counts: Counts) -> Sample | None:
    """Apply ``too_long``; None: the sample is left out."""
    length, limit = len(sample.tokens_L), spec.sequence_length
    if length <= limit:
        return sample
    line = f"{record.where}: {length} tokens"
    if spec.too_long == "error":
        raise InputError(
            f"{record.where}: a sample must fit in data.sequence_length = {limit} tokens, got {length}; "
            "raise it, or set data.too_long to drop or truncate"
        )
    if spec.too_long == "truncate" and not isinstance(record, Preference) and sample.scored_L[:limit].any():
        counts.note("truncated", line)
        return replace(sample, tokens_L=sample.tokens_L[:limit], scored_L=sample.scored_L[:limit])
    counts.note("dropped", line)
    return None


def _columns(samples: list[Sample]) -> dict[str, np.ndarray]:
    """Lay samples out as the columns of a part; those that their kind does not have are dropped later."""
    completions = [s.completion_lengths or (len(s.tokens_L) - s.prompt_length,) for s in samples]
    scores = [s.scores or (math.nan,) * len(c) for s, c in zip(samples, completions, strict=True)]
    labels = [-1 if s.label is None else int(s.label) for s in samples]
    columns = {
        "tokens": _joined([s.tokens_L for s in samples]),
        "scored": _joined([s.scored_L for s in samples]),
        "lengths": [len(s.tokens_L) for s in samples],
        "scored_counts": [int(s.scored_L.sum()) for s in samples],
        "weights": [s.weight for s in samples],
        "prompt_lengths": [s.prompt_length for s in samples],
        "completion_counts": [len(lengths) for lengths in completions],
        "completion_lengths": _joined(completions),
        "completion_scored": _joined([s.completion_scored() for s in samples]),
        "scores": _joined(scores),
        "margins": [s.margin for s in samples],
        "labels": labels,
    }
    return {name: np.ascontiguousarray(columns[name], dtype=part_type(name)) for name in PART_COLUMNS}


def _joined(arrays: list[Any]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.empty(0)


def part_type(name: str) -> np.dtype:
    """Return the type of a part's column: lengths and counts become the store's offsets."""
    return COLUMNS.get(name, np.dtype("<i8"))


def part_file(folder: Path, index: int) -> Path:
    """Return where the part of this number lies."""
    return folder / f"{index:08d}.part"


def _write_part(file: Path, chunk: Chunk, counts: Counts, columns: dict[str, np.ndarray]) -> None:
    digest = hashlib.sha256()
    for name in PART_COLUMNS:
        digest.update(columns[name])
    header = {
        "chunk": chunk.key(),
        "sha256": digest.hexdigest(),
        "sizes": {name: len(columns[name]) for name in PART_COLUMNS},
        "counts": {name: getattr(counts, name) for name in Counts.__slots__},
    }
    half = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(half, "wb") as out:
            out.write(json.dumps(header).encode() + b"\n")
            for name in PART_COLUMNS:
                out.write(columns[name])
        os.replace(half, file)
    except OSError:
        with suppress(OSError):
            half.unlink()
        raise


def read_part(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Return a part's header and columns; None: there is none, or it is not whole."""
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
    """Return the counts that a part's header tells."""
    return Counts(**header["counts"])
