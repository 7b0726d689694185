"""The version of the reading rules that decide a file's records, for the keys of token stores.

Only what a file holds matters: rules about tool calls change nothing for data without them, whose stores stay valid.
"""

from __future__ import annotations

from megatron_align.data.formats.open_file import open_file

# Version 2: arguments as JSON text are decoded and nulls dropped in every format; ``loss`` of a turn is read; ShareGPT
# turns may call tools and reason. In JSON these are names in quotes, which are escaped within JSON text.
_NAMES = ("tools", "tool_calls", "arguments", "loss", "reasoning", "reasoning_content", "thinking")
_BLOCK = 1 << 20


def rules_version(path: str) -> int:
    """Return the version of the newest rule that can change how this file's records are read.

    Raises:
        OSError: if the file cannot be read; EOFError or zlib.error if it is not the gzip file that its name says.
    """
    if path.endswith(".parquet"):
        return 2 if _schema_names(path) & set(_NAMES) else 1
    marks = [f'"{name}{end}'.encode() for name in _NAMES for end in ('"', '\\"')]
    kept = max(map(len, marks)) - 1
    with open_file(path) as file:
        before = b""
        while block := file.read(_BLOCK):
            text = before + block
            if any(mark in text for mark in marks):
                return 2
            before = text[-kept:]
    return 1


def _schema_names(path: str) -> set[str]:
    """Return the names of all columns and nested fields of a Parquet file; none if it is no Parquet file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        columns = parquet.ParquetFile(path).schema
    except pa.ArrowException:  # named when the file is read
        return set()
    return {part for i in range(len(columns)) for part in columns.column(i).path.split(".")}
