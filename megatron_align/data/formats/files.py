"""Find data files and read their records: raw ones from :mod:`.readers`, converted by the shape that fits them.

Every record carries where it is from, ``file:line`` (``file: record N`` in a JSON array, ``file: row N`` in Parquet),
for messages. A file has one shape, recognised from its first record; files of one list may differ in shape.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_align.data.formats import hub_data
from megatron_align.data.formats.columns import Columns, FieldUse, renamed
from megatron_align.data.formats.open_file import Raw
from megatron_align.data.formats.readers import drop_nulls, is_csv, read_objects
from megatron_align.data.formats.recognise import MixedShapes, Shape, recognise, shapes_named
from megatron_align.data.formats.tables import cells_as_values
from megatron_align.errors import InputError
from megatron_align.records import Record

SUFFIXES = (
    ".jsonl",
    ".jsonl.gz",
    ".json",
    ".json.gz",
    ".parquet",
    ".csv",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
)


def expand(path: str) -> list[str]:
    """Return the files of one source: a file, a folder's data files, what a glob pattern matches, or a hub data set's.

    Folders are searched recursively for files that end in one of ``SUFFIXES``; hidden files and folders are left
    out. The files are sorted by name, so the order is the same on every machine.

    Raises:
        InputError: if there is no such file, or none in the folder, or none that matches.
    """
    if path.startswith(hub_data.PREFIX):
        path = hub_data.local_path(path, SUFFIXES)
    folder = Path(path)
    if folder.is_dir():
        files = _in_folder(folder)
        if not files:
            raise InputError(
                f"{path}: must hold a data file ({', '.join(SUFFIXES)}), found none in the folder"
            )
        return files
    if folder.exists() or not glob.has_magic(path):
        return [_data_file(path)]
    matches = [Path(match) for match in glob.glob(path, recursive=True)]
    matched = {file for match in matches if match.is_dir() for file in _in_folder(match)}
    matched |= {str(match) for match in matches if match.is_file() and match.name.endswith(SUFFIXES)}
    if not matched:
        others = f"{len(matches)} others" if matches else "nothing"
        raise InputError(f"{path}: must match a data file ({', '.join(SUFFIXES)}), found {others}")
    return sorted(matched)


def read_file(
    path: str,
    shape: str | None = None,
    on_bad: Callable[[InputError], None] | None = None,
    *,
    columns: Columns | None = None,
    fields: FieldUse | None = None,
) -> tuple[Shape, Iterator[Record]]:
    """Return the shape of one file and its records.

    Args:
        path: a data file.
        shape: name of the shape, or of a kind (``pair``, ``ranked``, ``unpaired``, ``chat``); None: any, taken
            from the first well-formed record.
        on_bad: called with the error of every malformed record, which is then left out; None: it is raised.
        columns: the column of each field that has another name in the file; None: the column is left alone.
        fields: notes which fields of the records are used.

    Raises:
        InputError: for anything that is missing or malformed, naming file, line and field. A file that cannot
            be read, mixes shapes or holds no well-formed record is an error with ``on_bad`` too.
    """
    among = shapes_named(shape)
    columns = columns or {}
    rows = read_fields(path, columns, fields)
    bad = 0
    for where, raw in rows:
        try:
            recognised = recognise(_require_well_formed(raw), where, among)
        except MixedShapes:
            raise
        except InputError as error:
            if on_bad is None:
                raise
            bad += 1
            on_bad(error)
        else:
            records = _records(recognised, among, chain([(where, raw)], rows), on_bad)
            return recognised, _noted(records, recognised, columns, fields)
    raise InputError(
        f"{path}: must hold at least one well-formed record, got {bad} malformed ones"
        if bad
        else f"{path}: must hold at least one record, got an empty file"
    )


def read_fields(path: str, columns: Columns | None = None, fields: FieldUse | None = None) -> Iterator[Raw]:
    """Return the raw records of one file, well-formed or not: the fields by our names, CSV's cells as values, no nulls.

    Raises:
        InputError: if there is no such file, or the rest of it is unreadable; names the file.
    """
    return _fields_of(_data_file(path), columns or {}, fields)


def _fields_of(path: str, columns: Columns, fields: FieldUse | None) -> Iterator[Raw]:
    for where, raw in read_objects(path):
        if isinstance(raw, dict):
            if fields is not None:
                fields.columns |= {theirs for theirs in columns.values() if theirs in raw}
            raw = renamed(raw, columns)
            if drop_nulls(raw) and fields is not None and not path.endswith(".parquet"):
                fields.null_arguments = fields.null_arguments or where
            if is_csv(path):
                try:
                    raw = cells_as_values(raw, where)
                except InputError as error:
                    raw = error
        yield where, raw


def _noted(
    records: Iterator[tuple[Record, dict[str, Any]]],
    shape: Shape,
    columns: Columns,
    fields: FieldUse | None,
) -> Iterator[Record]:
    for record, raw in records:
        if fields is not None:
            fields.note(shape, raw, columns)
        yield record


def _records(
    shape: Shape,
    among: tuple[Shape, ...] | None,
    rows: Iterator[Raw],
    on_bad: Callable[[InputError], None] | None,
) -> Iterator[tuple[Record, dict[str, Any]]]:
    for where, raw in rows:
        try:
            fields = _require_well_formed(raw)
            record = shape.read(fields, where, among)
        except MixedShapes:
            raise
        except InputError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield record, fields


def _require_well_formed(raw: dict[str, Any] | InputError) -> dict[str, Any]:
    if isinstance(raw, InputError):
        raise raw
    return raw


def _in_folder(folder: Path) -> list[str]:
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.name.endswith(SUFFIXES))
    shown = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    return [str(folder / name) for name in shown if (folder / name).is_file()]


def _hub_hint(path: str) -> str:
    is_name = path.count("/") == 1 and not path.startswith(("/", ".", "~")) and not path.endswith(SUFFIXES)
    return f"; a data set of the Hugging Face hub is hf://{path}" if is_name else ""


def _data_file(path: str) -> str:
    if not Path(path).is_file():
        raise InputError(
            f"{path}: must be a data file, found {'a folder' if Path(path).is_dir() else f'nothing{_hub_hint(path)}'}"
        )
    if not path.endswith(SUFFIXES):
        raise InputError(f"{path}: must end in one of {', '.join(SUFFIXES)}")
    return path
