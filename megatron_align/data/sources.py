"""Files to records: JSON Lines (plain or gzip) and JSON arrays, in the shapes people already have.

Every record knows its place, ``file:line`` (``file: record N`` in a JSON array), for messages to people.
A file has one shape, recognised from its first record; files of one list may differ in shape.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from megatron_align.data.shapes import Shape, recognise
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


def read_conversations(paths: str | list[str]) -> Iterator[Conversation | Completion]:
    """Yield every record of the files, in file order.

    Args:
        paths: a file or a list of files (see ``SUFFIXES``).

    Raises:
        InputError: for anything that is missing or malformed, naming file, line and field.
    """
    files = [paths] if isinstance(paths, str) else list(paths)
    if not files:
        raise InputError("data needs at least one file, got an empty list")
    return chain.from_iterable(read_file(path)[1] for path in files)


def read_file(path: str) -> tuple[Shape, Iterator[Conversation | Completion]]:
    """Return the shape of one file and its records. Raises as :func:`read_conversations`."""
    records = _read_objects(path)
    first = next(records, None)
    if first is None:
        raise InputError(f"{path}: must hold at least one record, got an empty file")
    shape = recognise(first[1], first[0])
    return shape, (shape.read(record, where) for where, record in chain([first], records))


def _read_objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(where, object)`` for every record of the file."""
    if not Path(path).is_file():
        raise InputError(
            f"{path}: must be a data file, found {'a folder' if Path(path).is_dir() else 'nothing'}"
        )
    if not path.endswith(SUFFIXES):
        raise InputError(f"{path}: must end in one of {', '.join(SUFFIXES)}")
    try:
        with _open(path) as file:
            for where, record in _read_array(file, path) if _is_array(path) else _read_lines(file, path):
                if not isinstance(record, dict):
                    raise InputError(f"{where}: a record must be a JSON object, got {type(record).__name__}")
                yield where, record
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text, got {error.reason} at byte {error.start}") from error
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: could not be read: {' '.join(str(error).split())}") from error


def _open(path: str) -> IO[str]:
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _is_array(path: str) -> bool:
    """Tell a JSON array from JSON Lines in a ``.json`` file (both are common) by its first character."""
    if ".jsonl" in Path(path).suffixes:
        return False
    with _open(path) as file:
        while (character := file.read(1)).isspace():
            pass
    return character == "["


def _read_lines(file: IO[str], path: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f"{path}:{number}", _decode(line, f"{path}:{number}")


def _decode(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: must be a line of JSON, got {error.msg} at column {error.colno}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: must be a line of JSON, got one nested too deep") from error


def _read_array(file: IO[str], path: str) -> Iterator[tuple[str, Any]]:
    """Decode one record after the other: the text is held whole, the records are not."""
    text, decoder = file.read(), json.JSONDecoder()
    position, number = _skip_space(text, text.index("[") + 1), 0
    while text[position : position + 1] != "]":
        number += 1
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}:{error.lineno}: record {number} must be JSON, "
                f"got {error.msg} at column {error.colno}"
            ) from error
        except RecursionError as error:
            raise InputError(f"{path}: record {number} must be JSON, got one nested too deep") from error
        yield f"{path}: record {number}", record
        position = _after_record(text, position, f"{path}: record {number}")
    if text[position + 1 :].strip():
        raise InputError(f"{path}: must end after its JSON array, got more text after record {number}")


def _after_record(text: str, position: int, where: str) -> int:
    """Return the start of the next record, or the closing bracket."""
    position = _skip_space(text, position)
    mark = text[position : position + 1]
    if mark == ",":
        return _skip_space(text, position + 1)
    if mark != "]":
        raise InputError(f"{where}: must be followed by ',' or ']', got {mark or 'the end of the file'!r}")
    return position


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
