"""Read JSON data files as a stream: JSON Lines, an array, an array within an object, or objects one after the other.

Memory is bound by the longest record. A ``.jsonl`` file has a record a line; what a ``.json`` file holds is seen from
its start: ``[`` is an array; an object with a list of records, such as ``{"data": [...]}``, wraps one; an object that
does not end with its line is pretty-printed; everything else is JSON Lines.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_align.data.formats.json_text import JsonDecoder
from megatron_align.data.formats.open_file import open_file
from megatron_align.errors import InputError, shown

_READ_SIZE = 1 << 18  # characters read at a time
_SPACE = " \t\r\n"
# Names of the list of records within an object, as tools and APIs write it.
_WRAPPERS = ("data", "train", "records", "rows", "examples", "samples", "instances", "items", "dataset")
# Fields that only a record has: an object with one of them is no wrapper.
_OF_RECORDS = (
    "messages",
    "conversations",
    "prompt",
    "instruction",
    "completion",
    "chosen",
    "rejected",
    "output",
)


def json_reader(path: str) -> Callable[[str], Iterator[tuple[str, Any]]]:
    """Return the reader of a JSON file, by its name and how it starts."""
    if ".jsonl" in Path(path).suffixes:
        return read_lines
    first = _first_character(path)
    if first != "{":
        return read_array if first == "[" else read_lines
    if _wrapper_of(path) is not None:
        return read_wrapped
    return read_sequence if _first_line_is_cut(path) else read_lines


def read_lines(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the record, or the InputError, of every line that is not blank."""
    decoder = JsonDecoder()
    with open_file(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise InputError(f"{path}: must be UTF-8 text, got UTF-16; save the file as UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)  # of the file, or of one that was appended to it
            if line and not line.isspace():
                yield f"{path}:{number}", _decode(decoder, line, f"{path}:{number}")


def read_array(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a JSON array."""
    with _window(path, "a JSON array") as text:
        text.skip_space()
        yield from _elements(text)
        if text.skip_space():
            raise InputError(
                f"{path}: must end after its JSON array, got more text after record {text.records}"
            )


def read_wrapped(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the elements of the list of records within an object; its other fields are left alone."""
    wrapper = _wrapper_of(path)
    with _window(path, "a JSON array") as text:
        found = False
        for name, first in _members(text):
            if name == wrapper and not found:
                found = True
                yield from _elements(text)
            elif name in _OF_RECORDS or (first == "[" and name in _WRAPPERS):
                raise InputError(
                    f"{path}: must hold one list of records, got '{wrapper}' and '{name}'; "
                    "write the records as JSON Lines"
                )
            else:
                text.value(f"field '{name}'")
        if text.skip_space():
            raise InputError(
                f"{path}: must end after its JSON object, got more text after record {text.records}"
            )


def read_sequence(path: str) -> Iterator[tuple[str, Any]]:
    """Yield objects that follow each other, with any white space in and between them."""
    with _window(path, "pretty-printed JSON") as text:
        while text.skip_space():
            yield text.next_record()


def _decode(decoder: JsonDecoder, line: bytes, where: str) -> Any:
    try:
        value = decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return InputError(
            f"{where}: must be UTF-8 text, got {error.reason} at byte {error.start} of the line"
        )
    except json.JSONDecodeError as error:
        return InputError(
            f"{where}: must be a line of JSON, got {error.msg} at column {error.colno}{_hint(line)}"
        )
    except ValueError as error:  # an integer of thousands of digits
        return InputError(f"{where}: must be a line of JSON, got {error}")
    except RecursionError:
        return InputError(f"{where}: must be a line of JSON, got one nested too deeply")
    return _without_repeated_keys(value, decoder, where)


def _hint(line: bytes) -> str:
    if line.strip() in (b"{", b"["):
        return "; a file whose records take several lines must end in .json"
    return "; lines must end with a line feed, found carriage returns only" if b"\r" in line.strip() else ""


def _without_repeated_keys(value: Any, decoder: JsonDecoder, where: str) -> Any:
    if (key := decoder.repeated_key()) is None:
        return value
    return InputError(f"{where}: an object must not repeat a key, got {shown(key)} twice")


# What a .json file holds.
def _first_character(path: str) -> str:
    with open_file(path) as file:
        while block := file.read(64):
            if first := block.removeprefix(codecs.BOM_UTF8).lstrip():
                return first[:1].decode("latin-1")
    return ""


def _first_line_is_cut(path: str) -> bool:
    """Return whether the first line is the start of an object that goes on."""
    with open_file(path) as file:
        line = next((line for line in file if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
    try:
        text = line.decode("utf-8-sig").rstrip()
        JsonDecoder().decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


def _wrapper_of(path: str) -> str | None:
    """Return the field of the file's first object that is a list of records; None: the object is a record itself."""
    with _window(path, "a JSON object") as text:
        try:
            for name, first in _members(text):
                if name in _OF_RECORDS:
                    return None
                if name in _WRAPPERS and first == "[":  # its records are not read here: there may be many
                    text.position += 1
                    return name if text.skip_space() == "{" else None
                if _starts_with_record(text.value(f"field '{name}'")):
                    return name
        except InputError:  # not JSON: what is wrong is named when the file is read
            pass
        return None


def _starts_with_record(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(field in first for field in _OF_RECORDS)


def _members(text: _Window) -> Iterator[tuple[str, str]]:
    """Yield the name of each field of an object and the first character of its value, which the caller reads."""
    text.skip_space()
    text.position += 1  # the opening brace
    if text.skip_space() == "}":
        text.position += 1
        return
    while True:
        name = text.value("the name of a field")
        if not isinstance(name, str) or text.skip_space() != ":":
            raise InputError(f"{text.path}: must be a JSON object, got a field without name and ':'")
        text.position += 1
        yield name, text.skip_space()
        mark = text.skip_space()
        text.position += 1
        if mark == "}":
            return
        if mark != ",":
            got = mark or "the end of the file"
            raise InputError(f"{text.path}: field '{name}' must be followed by ',' or '}}', got {got!r}")
        text.skip_space()


def _elements(text: _Window) -> Iterator[tuple[str, Any]]:
    """Yield the elements of the array at the position, and move past it."""
    text.position += 1  # the opening bracket
    mark = "]" if text.skip_space() == "]" else ","
    while mark == ",":
        yield text.next_record()
        mark = text.skip_space()
        if mark == ",":
            text.position += 1
            text.skip_space()
        elif mark != "]":
            got = mark or "the end of the file"
            raise InputError(
                f"{text.path}: record {text.records}: must be followed by ',' or ']', got {got!r}{text.unreadable}"
            )
    text.position += 1  # the closing bracket


def _window(path: str, what: str) -> _Window:
    return _Window(io.TextIOWrapper(open_file(path), encoding="utf-8-sig"), path, what)


class _Window:
    """A moving window of a text file: what was read is dropped, a longer record widens it."""

    def __init__(self, file: IO[str], path: str, what: str) -> None:
        self._file, self.path = file, path
        self._text = ""
        self._characters = self._lines = 0  # dropped so far
        self._decoder = JsonDecoder()
        self.position = 0
        self.records = 0
        # The end of a record follows from its syntax alone: where that is broken, the next record cannot be found.
        self.unreadable = (
            f"; later records of {what} cannot be found then (JSON Lines: on_bad_record: skip continues)"
        )

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def skip_space(self) -> str:
        """Move to the next character that is not white space and return it; ``""`` at the end of the file."""
        while True:
            while self.position < len(self._text) and self._text[self.position] in _SPACE:
                self.position += 1
            if self.position < len(self._text) or not self._widen():
                return self._text[self.position : self.position + 1]

    def next_record(self) -> tuple[str, Any]:
        """Decode the record at the position and move past it; return its place and it, or its InputError."""
        self.records += 1
        value = self.value(f"record {self.records}")
        where = f"{self.path}: record {self.records}"
        return where, _without_repeated_keys(value, self._decoder, where)

    def value(self, name: str) -> Any:
        """Decode the value at the position, called ``name`` in messages, and move past it."""
        while True:
            try:
                value, end = self._decoder.decode_at(self._text, self.position)
                if end == len(self._text) and self._widen():  # a number may go on
                    continue
                self.position = end
            except json.JSONDecodeError as error:
                if self._widen():  # perhaps the window cut it
                    continue
                raise InputError(
                    f"{self.path}:{self._lines + error.lineno}: {name} must be JSON, "
                    f"got {error.msg} at character {self._characters + error.pos}{self.unreadable}"
                ) from error
            except (ValueError, RecursionError) as error:
                reason = "one nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise InputError(
                    f"{self.path}: {name} must be JSON, got {reason}{self.unreadable}"
                ) from error
            return value

    def _widen(self) -> bool:
        more = self._file.read(max(_READ_SIZE, len(self._text) - self.position))
        if more:
            self._characters += self.position
            self._lines += self._text.count("\n", 0, self.position)
            self._text, self.position = self._text[self.position :] + more, 0
        return bool(more)
