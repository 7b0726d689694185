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
from megatron_align.errors import InputError, one_line


def read_objects(path: str) -> Iterator[Raw]:
    """Yield every record of the file, well-formed or not.

    Raises:
        InputError: if the rest of the file is unreadable; names the file.
    """
    try:
        for where, raw in _reader(path)(path):
            if not isinstance(raw, (dict, InputError)):
                raw = InputError(f"{where}: a record must be a JSON object, got {type(raw).__name__}")
            yield where, raw
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text, got {error.reason}") from error
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: could not be read: {one_line(error)}") from error


def is_csv(path: str) -> bool:
    """Return whether the file is a table of text cells."""
    return path.removesuffix(".gz").endswith((".csv", ".tsv"))


def drop_nulls(record: dict[str, Any]) -> bool:
    """Delete null fields of the objects within a record, in place; its own fields keep their nulls.

    Returns:
        whether one of them was in the arguments of a tool call, where it may have been meant.
    """
    in_arguments = False
    inner = [(value, name == "arguments") for name, value in record.items()]
    while inner:  # no recursion: fields that nobody reads may be nested deeply
        value, within = inner.pop()
        if isinstance(value, dict):
            nulls = [key for key, item in value.items() if item is None]
            in_arguments |= bool(nulls) and within
            for key in nulls:
                del value[key]
            inner.extend(
                (item, within or key == "arguments")
                for key, item in value.items()
                if isinstance(item, (dict, list))
            )
        elif isinstance(value, list):
            inner.extend((item, within) for item in value if isinstance(item, (dict, list)))
    return in_arguments


def _reader(path: str) -> Callable[[str], Iterator[tuple[str, Any]]]:
    if path.endswith(".parquet"):
        return read_parquet
    return read_csv if is_csv(path) else json_reader(path)
