"""Records of data files of any shape, as a stream, and the texts of which they are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

from megatron_align.curation.raw_prompts import prompt_text
from megatron_align.data.formats.files import expand, read_fields
from megatron_align.errors import InputError

TextOf = Literal["prompt", "record"]
_Item = TypeVar("_Item")
Placed = tuple[str, dict[str, Any]]  # file:line, fields


def read_records(path: str) -> Iterator[Placed]:
    """Yield the place and the fields of every record of a file, folder or glob pattern.

    Raises:
        InputError: a record is malformed, or there is none; names file and line.
    """
    count = 0
    for file in expand(path):
        for where, raw in read_fields(file):
            if isinstance(raw, InputError):
                raise raw
            count += 1
            yield where, raw
    if not count:
        raise InputError(f"{path}: must hold at least one record, got none")


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
