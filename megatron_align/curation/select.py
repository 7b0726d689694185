"""Select data by difficulty and diversity: bounds of a column, then the best of each cluster."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_align.curation.clusters import LayeredClusters
from megatron_align.curation.embeddings import open_embeddings
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.curation.records import BadRecords, JudgedRecord, TextOf, chunks, read_records
from megatron_align.data.formats.fields import number
from megatron_align.data.formats.files import expand
from megatron_align.data.store import sha256
from megatron_align.errors import require
from megatron_align.evaluation.progress import progress
from megatron_align.storage.resumable_lines import ResumableLines

CHUNK = 256  # records that are embedded together, and between two writes
CLUSTER = "cluster"  # column of the selected records
ClusterPath = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectOptions:
    """Data, bounds and clusters.

    Args:
        data: file, folder or glob pattern
        out: JSONL file to write
        difficulty: field with a number; None: any difficulty
        easiest: records below are dropped; None: none are
        hardest: records above are dropped; None: none are
        embeddings: column:NAME, FILE.py:FUNCTION or a Hugging Face folder; None: no clusters
        layers: cosine thresholds of the layers of clusters, increasing
        per_cluster: records that are kept of each cluster of the last layer
        best: field with a number: the highest of a cluster are kept; None: the first
        of: which text of a record is embedded
        skip_bad: leave malformed records out and count them
        max_tokens: of a text that a model embeds
    """

    data: str
    out: str
    difficulty: str | None = None
    easiest: float | None = None
    hardest: float | None = None
    embeddings: str | None = None
    layers: tuple[float, ...] = (0.6, 0.75, 0.9)
    per_cluster: int = 1
    best: str | None = None
    of: TextOf = "prompt"
    skip_bad: bool = False
    max_tokens: int = 512

    def __post_init__(self) -> None:
        bounds = self.easiest is not None or self.hardest is not None
        given = f"got {self.difficulty}, {self.easiest} and {self.hardest}"
        line = f"difficulty and a bound, easiest or hardest, are given together, {given}"
        require((self.difficulty is not None) == bounds, line)
        line = "select needs bounds of difficulty or embeddings, got neither"
        require(bounds or self.embeddings is not None, line)
        line = f"best ranks the records of clusters, which embeddings make, got {self.best} without"
        require(self.best is None or self.embeddings is not None, line)
        require(self.per_cluster >= 1, f"per_cluster must be at least 1, got {self.per_cluster}")
        require(self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}")


@dataclass(slots=True)
class SelectCounts:
    """Records, what each step dropped, and clusters by layer."""

    records: int = 0
    bad: int = 0
    too_easy: int = 0
    too_hard: int = 0
    redundant: int = 0
    selected: int = 0
    clusters: list[int] = field(default_factory=list)


def select(options: SelectOptions) -> SelectCounts:
    """Write the selected records, in their order; with embeddings each has the field ``cluster``, as ``3.0.1``.

    The data are read twice: memory holds the leaders of clusters and the numbers of the selected records.

    Raises:
        InputError: bad data, options or output.
    """
    counts = SelectCounts()
    key = {"data": [sha256(file) for file in expand(options.data)], "options": _identity(options)}
    with ResumableLines(Path(options.out), key) as output:
        chosen = None if options.embeddings is None else _of_clusters(options, counts)
        written = 0
        first = SelectCounts() if chosen is not None else counts  # counted in the first pass
        for chunk in chunks(_within(options, first), CHUNK):
            lines = []
            for index, record in chunk:
                if chosen is not None and index not in chosen:
                    continue
                written += 1
                if written > output.done:  # the others were written before a kill
                    more = {} if chosen is None else {CLUSTER: ".".join(map(str, chosen[index]))}
                    lines.append(json.dumps({**record.raw, **more}, ensure_ascii=False))
            output.append(lines)
        counts.selected = written
        output.finish()
    return counts


def _within(options: SelectOptions, counts: SelectCounts) -> Iterator[tuple[int, JudgedRecord]]:
    """Yield the records within the bounds of difficulty, each with its number among all good records."""
    bad = BadRecords(options.skip_bad)
    of = None if options.embeddings is None else options.of
    for index, record in enumerate(read_records(options.data, bad, of)):
        counts.records, counts.bad = counts.records + 1, bad.count
        where, raw = record.where, record.raw
        if options.difficulty is not None:
            value = number(raw.get(options.difficulty), where, options.difficulty)
            if options.easiest is not None and value < options.easiest:
                counts.too_easy += 1
                continue
            if options.hardest is not None and value > options.hardest:
                counts.too_hard += 1
                continue
        yield index, record


def _of_clusters(options: SelectOptions, counts: SelectCounts) -> dict[int, ClusterPath]:
    """Return the clusters of the selected records, by the number of the record."""
    assert options.embeddings is not None, "checked by the caller"
    embed = open_embeddings(options.embeddings, options.max_tokens)
    clusters = LayeredClusters(options.layers)
    best: dict[ClusterPath, list[tuple[float, int]]] = {}
    seen = 0
    with progress("clustering", 0) as advance:
        for chunk in chunks(_within(options, counts), CHUNK):
            prompts = [RawPrompt(text=r.text, raw=r.raw, where=r.where) for _, r in chunk]
            for (index, record), vector_D in zip(chunk, embed(prompts), strict=True):
                rank = 0.0
                if options.best is not None:
                    rank = number(record.raw.get(options.best), record.where, options.best)
                kept = best.setdefault(clusters.add(vector_D), [])
                heapq.heappush(kept, (rank, -index))
                if len(kept) > options.per_cluster:
                    heapq.heappop(kept)
            seen += len(chunk)
            advance(len(chunk), 0)
    chosen = {-index: path for path, kept in best.items() for _, index in kept}
    counts.clusters, counts.redundant = clusters.counts, seen - len(chosen)
    return chosen


def _identity(options: SelectOptions) -> dict[str, Any]:
    names = [name for name in SelectOptions.__slots__ if name not in ("data", "out")]
    return {name: getattr(options, name) for name in names}
