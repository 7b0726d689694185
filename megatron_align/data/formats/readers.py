"""Readers of data files: the raw records of JSON Lines, JSON arrays (plain or gzip) and Parquet, as a stream.

Memory is bound by the longest record (JSON) or by a row group's pages (Parquet), not by the size of a file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_align.errors import InputError

_READ_SIZE = 1 << 18  # characters of a JSON array, bytes of a Parquet column read at a time
_ROWS = 64  # Parquet rows decoded at a time
_SPACE = " \t\r\n"
# The end of a record follows from its syntax alone: where that is broken, the next record cannot be found.
_UNREADABLE = (
    "; later records of a JSON array cannot be found then (JSON Lines: on_bad_record: skip continues)"
)

Raw = tuple[
    str, dict[str, Any] | InputError
]  # where the record is (file:line), and the record or what is wrong with it


def read_objects(path: str) -> Iterator[Raw]:
    """Yield every record of the file, well-formed or not.

    Raises:
        InputError: if the rest of the file is unreadable; names the file.
    """
    read = _read_rows if path.endswith(".parquet") else _read_array if _is_array(path) else _read_lines
    try:
        for where, raw in read(path):
            if not isinstance(raw, (dict, InputError)):
                raw = InputError(f"{where}: a record must be a JSON object, got {type(raw).__name__}")
            yield where, raw
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text, got {error.reason}") from error
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: could not be read: {' '.join(str(error).split())}") from error


def _open(path: str) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _is_array(path: str) -> bool:
    """Return whether a ``.json`` file holds a JSON array, not JSON Lines (both are common): by its first character."""
    if ".jsonl" in Path(path).suffixes:
        return False
    try:
        with _open(path) as file:
            while block := file.read(64):
                if first := block.removeprefix(codecs.BOM_UTF8).lstrip():
                    return first.startswith(b"[")
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: could not be read: {' '.join(str(error).split())}") from error
    return False


def _read_lines(path: str) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.isspace():
                yield f"{path}:{number}", _decode(line, f"{path}:{number}")


def _decode(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InputError(
            f"{where}: must be UTF-8 text, got {error.reason} at byte {error.start} of the line"
        )
    except json.JSONDecodeError as error:
        return InputError(f"{where}: must be a line of JSON, got {error.msg} at column {error.colno}")
    except ValueError as error:  # an integer of thousands of digits
        return InputError(f"{where}: must be a line of JSON, got {error}")
    except RecursionError:
        return InputError(f"{where}: must be a line of JSON, got one nested too deeply")


def _read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet file, a few at a time. An absent field of a message or tool is a null there."""
    import pyarrow as pa  # imported here: it takes longer than reading a small JSON file
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, buffer_size=_READ_SIZE) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", {key: _without_nulls(value) for key, value in row.items()}
    except pa.ArrowException as error:
        raise InputError(f"{path}: could not be read: {' '.join(str(error).split())}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _read_array(path: str) -> Iterator[tuple[str, Any]]:
    """Decode one record after the other."""
    with _open(path) as file:
        text = _Window(io.TextIOWrapper(file, encoding="utf-8-sig"), path)
        text.skip_space()
        text.position += 1  # the opening bracket
        number = 0
        mark = "]" if text.skip_space() == "]" else ","
        while mark == ",":
            number += 1
            yield f"{path}: record {number}", text.record(number)
            mark = text.skip_space()
            if mark == ",":
                text.position += 1
                text.skip_space()
            elif mark != "]":
                got = mark or "the end of the file"
                raise InputError(
                    f"{path}: record {number}: must be followed by ',' or ']', got {got!r}{_UNREADABLE}"
                )
        text.position += 1  # the closing bracket
        if text.skip_space():
            raise InputError(f"{path}: must end after its JSON array, got more text after record {number}")


class _Window:
    """A moving window of a text file: what was read is dropped, a longer record widens it."""

    def __init__(self, file: IO[str], path: str) -> None:
        self._file, self._path = file, path
        self._text = ""
        self._characters = self._lines = 0  # dropped so far
        self._decoder = json.JSONDecoder()
        self.position = 0

    def skip_space(self) -> str:
        """Move to the next character that is not white space and return it; ``""`` at the end of the file."""
        while True:
            while self.position < len(self._text) and self._text[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self._text) or not self._widen():
                return self._text[self.position : self.position + 1]

    def record(self, number: int) -> Any:
        """Decode the value at the position and move past it."""
        while True:
            try:
                value, self.position = self._decoder.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                if self._widen():  # perhaps the window cut it
                    continue
                raise InputError(
                    f"{self._path}:{self._lines + error.lineno}: record {number} must be JSON, "
                    f"got {error.msg} at character {self._characters + error.pos}{_UNREADABLE}"
                ) from error
            except (ValueError, RecursionError) as error:
                reason = "one nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise InputError(
                    f"{self._path}: record {number} must be JSON, got {reason}{_UNREADABLE}"
                ) from error
            return value

    def _widen(self) -> bool:
        more = self._file.read(max(_READ_SIZE, len(self._text) - self.position))
        if more:
            self._characters += self.position
            self._lines += self._text.count("\n", 0, self.position)
            self._text, self.position = self._text[self.position :] + more, 0
        return bool(more)
