"""Open a data file, compressed or not, and the type of what its readers yield."""

from __future__ import annotations

import gzip
import io
from typing import Any

from megatron_align.errors import InputError

# Where a record is (file:line), and the record or what is wrong with it.
Raw = tuple[str, dict[str, Any] | InputError]


def open_file(path: str) -> gzip.GzipFile | io.BufferedReader:
    """Open a file for reading bytes; one whose name ends in ``.gz`` is decompressed."""
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")
