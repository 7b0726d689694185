"""The version of the reading rules that decide a file's records, for the keys of token stores.

Only what a file holds matters: rules about tool calls change nothing for data without them, whose stores stay valid.
The version covers records that both versions read, and read differently. It does not cover records that only one of
them refuses: such a record stopped the run, or is skipped in a store that ``on_bad_record: skip`` made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from megatron_align.data.formats.open_file import open_file

# Version 2: arguments as JSON text are decoded, and nulls in them and in tools dropped in every format; ``loss`` of a
# turn is read. In JSON these are names in quotes, which are escaped within JSON text.
_NAMES = ("tools", "tool_calls", "arguments", "loss", "reasoning", "reasoning_content", "thinking")
# Also version 2: turns of ShareGPT's form, which have ``from``, give the template their calls, reasoning and names.
_SHAREGPT, _SHAREGPT_NAMES = "from", ("name", "tool_call_id")
_BLOCK = 1 << 20


def rules_version(path: str) -> int:
    """Return the version of the newest rule that can change how this file's records are read.

    Raises:
        OSError: if the file cannot be read; EOFError or zlib.error if it is not the gzip file that its name says.
    """
    if path.endswith(".parquet"):
        return _version_of(_schema_names(path))
    names = (*_NAMES, _SHAREGPT, *_SHAREGPT_NAMES)
    marks = {name: [f'"{name}{end}'.encode() for end in ('"', '\\"')] for name in names}
    found: set[str] = set()
    for text in _overlapping_blocks(path, max(map(len, names)) + len('""\\')):
        found |= {name for name in names if name not in found and any(mark in text for mark in marks[name])}
        if _version_of(found) > 1:
            break
    return _version_of(found)


def may_hold(path: str, text: str) -> bool:
    """Return whether strings of a file may hold a text, as it is or escaped; any Parquet file may, as it is compressed.

    Raises:
        OSError, EOFError, zlib.error: as :func:`rules_version`.
    """
    if path.endswith(".parquet"):
        return True
    escaped = json.dumps(text)[1:-1]
    for_web = escaped.translate({ord(c): f"\\u{ord(c):04x}" for c in "<>&"})  # as some encoders write them
    forms = {
        form.encode().lower() for form in (text, json.dumps(text, ensure_ascii=False)[1:-1], escaped, for_web)
    }
    blocks = _overlapping_blocks(path, max(map(len, forms)))
    return any(form in block.lower() for block in blocks for form in forms)


def _version_of(names: set[str]) -> int:
    """Return the newest version that matters to data with these names among others."""
    is_sharegpt = _SHAREGPT in names and not names.isdisjoint(_SHAREGPT_NAMES)
    return 2 if is_sharegpt or not names.isdisjoint(_NAMES) else 1


def _overlapping_blocks(path: str, overlap: int) -> Iterator[bytes]:
    """Yield the bytes of a file in blocks that begin with the end of the block before."""
    with open_file(path) as file:
        before = b""
        while block := file.read(_BLOCK):
            text = before + block
            yield text
            before = text[-overlap:]


def _schema_names(path: str) -> set[str]:
    """Return the names of all columns and nested fields of a Parquet file; none if it is no Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        columns = parquet.ParquetFile(path).schema
    except pa.ArrowException:  # named when the file is read
        return set()
    return {part for i in range(len(columns)) for part in columns.column(i).path.split(".")}
