"""Remove near duplicates from data, record by record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_align.curation.duplicates import open_duplicates
from megatron_align.curation.raw_prompts import RawPrompt
from megatron_align.curation.records import BadRecords, TextOf, chunks, read_records
from megatron_align.data.formats.files import expand
from megatron_align.data.store import sha256
from megatron_align.storage.resumable_lines import ResumableLines

CHUNK = 256  # records between two writes


@dataclass(frozen=True, slots=True)
class DedupCounts:
    """Records that were read, those that were kept, and bad ones."""

    records: int
    kept: int
    bad: int = 0


def dedup(
    data: str,
    out: str,
    threshold: float,
    of: TextOf = "prompt",
    *,
    embeddings: str | None = None,
    skip_bad: bool = False,
) -> DedupCounts:
    """Write the records that are no near duplicate of an earlier one, as they are, in their order.

    Args:
        data: file, folder or glob pattern.
        out: JSONL file to write.
        threshold: similarity from which a record is a duplicate.
        of: which text of a record is compared.
        embeddings: as of :func:`.open_duplicates`.
        skip_bad: leave malformed records out and count them.

    Raises:
        InputError: bad data, options or output.
    """
    near = open_duplicates(embeddings, threshold)
    key = {
        "data": [sha256(file) for file in expand(data)],
        "duplicates": threshold,
        "of": of,
        "skip_bad": skip_bad,
        "embeddings": embeddings,
    }
    records = kept = 0
    bad = BadRecords(skip_bad)
    with ResumableLines(Path(out), key) as output:
        for chunk in chunks(read_records(data, bad, of), CHUNK):
            lines = []
            prompts = [RawPrompt(text=r.text, raw=r.raw, where=r.where) for r in chunk]
            for record, other in zip(chunk, near.of(prompts), strict=True):
                records += 1
                if other is None:
                    kept += 1
                    if kept > output.done:  # the others were written before a kill
                        lines.append(json.dumps(record.raw, ensure_ascii=False))
            output.append(lines)
        output.finish()
    return DedupCounts(records, kept, bad.count)
