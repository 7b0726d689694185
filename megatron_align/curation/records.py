"""Records of data files of any shape, as a stream, and the texts of which they are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

from megatron_align.curation.raw_prompts import prompt_text
from megatron_align.data.formats.files import expand, read_fields
from megatron_align.errors import InputError

TextOf = Literal["prompt", "record"]
_Item = TypeVar("_Item")


@dataclass(slots=True)
class BadRecords:
    """Malformed records, and those without the text by which they are judged: an error, or left out and counted.

    Args:
        skip: leave them out.
    """

    skip: bool = False
    count: int = 0

    def meet(self, error: InputError) -> None:
        """Count a bad record, or raise its error."""
        if not self.skip:
            raise error
        self.count += 1


@dataclass(frozen=True, slots=True)
class JudgedRecord:
    """A record: its place, its fields, and the text by which it is judged (empty: it is not judged by a text)."""

    where: str
    raw: dict[str, Any]
    text: str = ""


def read_records(path: str, bad: BadRecords, of: TextOf | None = None) -> Iterator[JudgedRecord]:
    """Yield every record of a file, folder or glob pattern.

    Args:
        path: of the data.
        bad: what happens to malformed records.
        of: text by which a record is judged; None: none is read.

    Raises:
        InputError: a record is bad, naming file and line, or there is no good one.
    """
    count = 0
    for file in expand(path):
        for where, raw in read_fields(file):
            try:
                if isinstance(raw, InputError):
                    raise raw
                record = JudgedRecord(where, raw, text_of(raw, where, of) if of else "")
            except InputError as error:
                bad.meet(error)
                continue
            count += 1
            yield record
    if not count:
        found = f"{bad.count} bad ones" if bad.count else "none"
        raise InputError(f"{path}: must hold at least one record, got {found}")


def text_of(raw: dict[str, Any], where: str, of: TextOf) -> str:
    """Return the text by which a record is judged: its prompt, or all texts in it, one after the other.

    Raises:
        InputError: it has no prompt, or no text.
    """
    if of == "prompt":
        return prompt_text(raw, where)
    texts = list(_texts(raw))
    if not texts:
        raise InputError(f"{where}: a record must hold a text, got none")
    return "\n".join(texts)


def chunks(items: Iterator[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Yield the items in lists of this size; the last one may be shorter."""
    while chunk := list(islice(items, size)):
        yield chunk


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
