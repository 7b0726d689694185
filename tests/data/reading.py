"""Read the records of files as a preparation does, without tokenising them."""

from collections.abc import Iterator
from itertools import chain

from megatron_align.data.formats.files import expand, read_file
from megatron_align.records import Record


def read_records(paths: str | list[str]) -> Iterator[Record]:
    """Return every record of the sources (files, folders, glob patterns), in order."""
    sources = [paths] if isinstance(paths, str) else paths
    return chain.from_iterable(read_file(file)[1] for source in sources for file in expand(source))
