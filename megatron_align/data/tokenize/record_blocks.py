"""Read the records of a data set in blocks: the unit of work of one tokenising process.

The blocks are the same whatever the number of processes, so an interrupted preparation can reuse finished ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron_align.data.formats.columns import FieldUse, require_columns
from megatron_align.data.formats.files import read_file
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.errors import InputError, nearest, shown
from megatron_align.records import Completion, Conversation, Record

BLOCK_RECORDS = 1024
PEEKED_RECORDS = 100  # of each file, to find the columns that data.columns names
BLOCK_CHARACTERS = 2_000_000  # bounds memory where records are long


@dataclass(frozen=True, slots=True)
class RecordBlock:
    """Consecutive records of one file. ``skipped``: an error line for each malformed one that was skipped."""

    index: int
    source: int
    records: list[Record]
    skipped: list[str]

    def key(self) -> list[Any]:
        """Return what distinguishes this block from another of the same index."""
        first = self.records[0].where if self.records else ""
        return [self.source, len(self.records), first, len(self.skipped)]


def read_shapes(spec: StoreSpec) -> tuple[str, list[str]]:
    """Return the kind of the records of all files, and the names of their shapes.

    Raises:
        InputError: if two files differ in kind, ``too_long: truncate`` is set for preferences, or no record has a
            column that ``columns`` names.
    """
    require_columns(spec.columns)
    kinds: dict[str, str] = {}
    shapes: list[str] = []
    fields = FieldUse()
    for file in (file for files in spec.files() for file in files):
        on_bad = _ignore if spec.on_bad_record == "skip" else None
        shape, records = read_file(file, spec.shape, on_bad, columns=spec.columns, fields=fields)
        kinds.setdefault(shape.kind, file)
        if shape.name not in shapes:
            shapes.append(shape.name)
        if len(kinds) > 1:
            (one, first), (other, second) = kinds.items()
            raise InputError(
                f"{second}: must hold {one} data like {first}, got {other} data (shape '{shape.name}'): "
                "one run trains on one kind"
            )
        if shape.kind != "chat" and spec.train_turns == "last":
            raise InputError(
                f"{file}: data.train_turns: last is for conversations, got {shape.kind} data, whose completions are "
                "trained; set it to all"
            )
        if shape.kind != "chat" and spec.too_long == "truncate":
            raise InputError(
                f"{file}: data.too_long: truncate is for chat data, got {shape.kind} data: a comparison of cut "
                "completions would be another one; set it to drop, or raise data.sequence_length"
            )
        if fields.missing(spec.columns):
            deque(islice(records, PEEKED_RECORDS), maxlen=0)
    if missing := fields.missing(spec.columns):
        names = [*fields.used, *fields.left]
        raise InputError(
            f"{', '.join(spec.sources)}: a record must have the column '{missing[0]}' of data.columns, got "
            f"{shown(names)} in the first {PEEKED_RECORDS} of each file{nearest(missing[0], names)}"
        )
    return next(iter(kinds)), shapes


def _ignore(_: InputError) -> None:
    """Drop a malformed record here: they are counted when the entire file is read."""


def read_blocks(spec: StoreSpec, failed: list[InputError], fields: FieldUse) -> Iterator[RecordBlock]:
    """Yield the records of all files in order, in blocks, and note their ``fields``.

    An InputError while reading ends the blocks and is put into ``failed`` instead of being raised: a record read
    before it may turn out bad when it is tokenised, and that error is then the first.
    """
    index = 0
    for source, files in enumerate(spec.files()):
        for file in files:
            skipped: list[str] = []
            records: list[Record] = []
            characters = 0
            skip = spec.on_bad_record == "skip"
            on_bad = (lambda error, skipped=skipped: skipped.append(str(error))) if skip else None
            try:
                for record in read_file(file, spec.shape, on_bad, columns=spec.columns, fields=fields)[1]:
                    records.append(record)
                    characters += _characters(record)
                    if len(records) >= BLOCK_RECORDS or characters >= BLOCK_CHARACTERS:
                        yield RecordBlock(index, source, records, skipped[:])
                        index, records, characters = index + 1, [], 0
                        skipped.clear()
            except InputError as error:
                failed.append(error)
            if records or skipped:
                yield RecordBlock(index, source, records, skipped[:])
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
