"""Read the raw records of a data file as a stream: JSON, CSV or Parquet, by the file's name.

One rule for nulls in every format: a null field of an object within a record is an absent one. Arrow gives all objects
of a column the same fields, absent ones as nulls, and writes them into Parquet and JSON Lines alike. A null that is
meant is kept where an object is given as JSON text (a tool call's ``arguments``), as that is decoded later.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron_align.data.formats.json_files import json_reader
from megatron_align.data.formats.open_file import Raw
from megatron_align.data.formats.tables import read_csv, read_parquet
from megatron_align.errors import InputError


def read_objects(path: str) -> Iterator[Raw]:
    """Yield every record of the file, well-formed or not.

    Raises:
        InputError: if the rest of the file is unreadable; names the file.
    """
    try:
        for where, raw in _reader(path)(path):
            if isinstance(raw, dict):
                drop_nulls(raw)
            elif not isinstance(raw, InputError):
                raw = InputError(f"{where}: a record must be a JSON object, got {type(raw).__name__}")
            yield where, raw
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text, got {error.reason}") from error
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: could not be read: {' '.join(str(error).split())}") from error


def is_csv(path: str) -> bool:
    """Return whether the file is a table of text cells."""
    return path.removesuffix(".gz").endswith((".csv", ".tsv"))


def drop_nulls(record: dict[str, Any]) -> None:
    """Delete null fields of the objects within a record, in place; its own fields keep their nulls."""
    open_values = [value for value in record.values() if isinstance(value, (dict, list))]
    while open_values:  # no recursion: fields that nobody reads may be nested deeply
        value = open_values.pop()
        if isinstance(value, dict):
            for key in [key for key, item in value.items() if item is None]:
                del value[key]
        inner = value.values() if isinstance(value, dict) else value
        open_values.extend(item for item in inner if isinstance(item, (dict, list)))


def _reader(path: str) -> Callable[[str], Iterator[tuple[str, Any]]]:
    if path.endswith(".parquet"):
        return read_parquet
    return read_csv if is_csv(path) else json_reader(path)
