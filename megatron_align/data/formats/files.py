"""Files to records: JSON Lines and JSON arrays (plain or gzip) and Parquet, in the shapes people already have.

Every record knows its place, ``file:line`` (``file: record N`` in a JSON array, ``file: row N`` in Parquet), for
messages to people. A file has one shape, recognised from its first record; files of one list may differ in shape.
Memory is bound by the longest record (JSON) or by a row group's pages (Parquet), not by the size of a file.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from megatron_align.data.formats.recognise import MixedShapes, Shape, named, recognise
from megatron_align.errors import InputError
from megatron_align.records import Record

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_CHUNK = 1 << 18  # characters of a JSON array, bytes of a Parquet column read at a time
_ROWS = 64  # Parquet rows decoded at a time
_SPACE = " \t\r\n"
# A record's end is only known from its syntax: to look for the next one would be to guess.
_UNREADABLE = (
    "; what follows in a JSON array cannot be told apart (in JSON Lines, on_bad_record: skip goes on)"
)

Raw = tuple[str, dict[str, Any] | InputError]  # a record and its place, or what is wrong with it


def expand(path: str) -> list[str]:
    """Return the files of one source: a file, a folder's data files, or what a glob pattern matches.

    Folders are searched recursively for files that end in one of ``SUFFIXES``; hidden files and folders are left
    out. The files are sorted by name, so the order is the same on every machine.

    Raises:
        InputError: if there is no such file, or none in the folder, or none that matches.
    """
    place = Path(path)
    if place.is_dir():
        found = _in_folder(place)
        if not found:
            raise InputError(
                f"{path}: must hold a data file ({', '.join(SUFFIXES)}), found none in the folder"
            )
        return found
    if place.exists() or not glob.has_magic(path):
        return [_data_file(path)]
    matches = [Path(match) for match in glob.glob(path, recursive=True)]
    found = {file for match in matches if match.is_dir() for file in _in_folder(match)}
    found |= {str(match) for match in matches if match.is_file() and match.name.endswith(SUFFIXES)}
    if not found:
        others = f"{len(matches)} others" if matches else "nothing"
        raise InputError(f"{path}: must match a data file ({', '.join(SUFFIXES)}), found {others}")
    return sorted(found)


def read_records(paths: str | list[str]) -> Iterator[Record]:
    """Yield every record of the sources, in order.

    Args:
        paths: a source or a list of them (see :func:`expand`).

    Raises:
        InputError: for anything that is missing or malformed, naming file, line and field.
    """
    sources = [paths] if isinstance(paths, str) else list(paths)
    if not sources:
        raise InputError("data needs at least one file, got an empty list")
    return chain.from_iterable(read_file(file)[1] for source in sources for file in expand(source))


def read_file(
    path: str, shape: str | None = None, on_bad: Callable[[InputError], None] | None = None
) -> tuple[Shape, Iterator[Record]]:
    """Return the shape of one file and its records.

    Args:
        path: a data file.
        shape: name of the shape, or of a kind (``pair``, ``ranked``, ``unpaired``, ``chat``); None: any, as the
            first well-formed record tells.
        on_bad: is told of every malformed record, which is then left out; None: it is raised.

    Raises:
        InputError: for anything that is missing or malformed, naming file, line and field. A file that cannot
            be read, mixes shapes or holds no well-formed record is an error with ``on_bad`` too.
    """
    among = named(shape)
    rows = _read_objects(_data_file(path))
    bad = 0
    for where, raw in rows:
        try:
            found = recognise(_sound(raw), where, among)
        except MixedShapes:
            raise
        except InputError as error:
            if on_bad is None:
                raise
            bad += 1
            on_bad(error)
        else:
            return found, _records(found, among, chain([(where, raw)], rows), on_bad)
    raise InputError(
        f"{path}: must hold at least one well-formed record, got {bad} malformed ones"
        if bad
        else f"{path}: must hold at least one record, got an empty file"
    )


def _records(
    shape: Shape,
    among: tuple[Shape, ...] | None,
    rows: Iterator[Raw],
    on_bad: Callable[[InputError], None] | None,
) -> Iterator[Record]:
    for where, raw in rows:
        try:
            record = shape.read(_sound(raw), where, among)
        except MixedShapes:
            raise
        except InputError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield record


def _sound(raw: dict[str, Any] | InputError) -> dict[str, Any]:
    if isinstance(raw, InputError):
        raise raw
    return raw


def _in_folder(folder: Path) -> list[str]:
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.name.endswith(SUFFIXES))
    shown = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    return [str(folder / name) for name in shown if (folder / name).is_file()]


def _data_file(path: str) -> str:
    if not Path(path).is_file():
        raise InputError(
            f"{path}: must be a data file, found {'a folder' if Path(path).is_dir() else 'nothing'}"
        )
    if not path.endswith(SUFFIXES):
        raise InputError(f"{path}: must end in one of {', '.join(SUFFIXES)}")
    return path


def _read_objects(path: str) -> Iterator[Raw]:
    """Yield every record of the file; what makes the rest unreadable is raised."""
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


def _open(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _is_array(path: str) -> bool:
    """Tell a JSON array from JSON Lines in a ``.json`` file (both are common) by its first character."""
    if ".jsonl" in Path(path).suffixes:
        return False
    try:
        with _open(path) as file:
            while chunk := file.read(64):
                if first := chunk.removeprefix(codecs.BOM_UTF8).lstrip():
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
        return InputError(f"{where}: must be a line of JSON, got one nested too deep")


def _read_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a Parquet file, a few at a time. An absent field of a message or tool is a null there."""
    import pyarrow as pa  # imported here: it takes longer than reading a small JSON file
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, buffer_size=_CHUNK) as file:
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
    """A stretch of a text file that moves on: what was read is let go, a longer record widens it."""

    def __init__(self, file: IO[str], path: str) -> None:
        self._file, self._path = file, path
        self._text = ""
        self._characters = self._lines = 0  # let go so far
        self._decoder = json.JSONDecoder()
        self.position = 0

    def skip_space(self) -> str:
        """Move to the next character that is no white space and return it; ``""`` at the end of the file."""
        while True:
            while self.position < len(self._text) and self._text[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self._text) or not self._widen():
                return self._text[self.position : self.position + 1]

    def record(self, number: int) -> Any:
        """Decode the value at the position and move behind it."""
        while True:
            try:
                value, self.position = self._decoder.raw_decode(self._text, self.position)
            except json.JSONDecodeError as error:
                if self._widen():  # perhaps it was only cut
                    continue
                raise InputError(
                    f"{self._path}:{self._lines + error.lineno}: record {number} must be JSON, "
                    f"got {error.msg} at character {self._characters + error.pos}{_UNREADABLE}"
                ) from error
            except (ValueError, RecursionError) as error:
                reason = "one nested too deep" if isinstance(error, RecursionError) else str(error)
                raise InputError(
                    f"{self._path}: record {number} must be JSON, got {reason}{_UNREADABLE}"
                ) from error
            return value

    def _widen(self) -> bool:
        more = self._file.read(max(_CHUNK, len(self._text) - self.position))
        if more:
            self._characters += self.position
            self._lines += self._text.count("\n", 0, self.position)
            self._text, self.position = self._text[self.position :] + more, 0
        return bool(more)
