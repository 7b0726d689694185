"""What the files of a checkpoint hash to: ``SHA256SUMS``, which ``sha256sum -c`` reads as well.

The file's own first line hashes the rest, so that a damaged list is not taken for damaged files.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_align.storage.atomic_write import advise, sync
from megatron_align.storage.direct_io import DirectFile

NAME = "SHA256SUMS"
_THREADS = 2  # files read at once
_BLOCK = 4 << 20
_HEAD = re.compile(r"# sha256 of the lines below: ([0-9a-f]{64})")
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


class Damaged(ValueError):
    """A list of hashes that cannot be used; one line says why."""


class HashingFile(io.RawIOBase):
    """A new file that is written once from start to end, hashed on the way."""

    _file: DirectFile | None = None

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        path.unlink(missing_ok=True)
        self._file = DirectFile(path)
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write all of ``data``. What goes wrong is kept in ``error`` too: torch forgets it."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK):  # the disk writes one block while the next is hashed
            block = view[start : start + _BLOCK]
            self._hash.update(block)
            try:
                self._file.write(self._size, block)
            except OSError as error:
                self.error = error
                raise
            self._size += len(block)
        return len(view)

    def tell(self) -> int:
        """Return how many bytes are written."""
        return self._size

    def writable(self) -> bool:
        """Say yes."""
        return True

    def finish(self) -> str:
        """Force the file onto the disk, close it and return its hash."""
        self._file.finish()
        super().close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file; unless it is finished, some of it is lost."""
        if self._file:
            self._file.close()
        super().close()


@contextmanager
def without_checksums_of_zip() -> Iterator[None]:
    """Let torch.save leave them out in a with-block: its zips are hashed here anyhow, and torch.load reads none.

    Another thread has to be given the block's context.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the list, on the disk when this returns; ``sums`` are by the files' paths in the folder."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    head = f"# sha256 of the lines below: {hashlib.sha256(lines.encode()).hexdigest()}\n"
    (folder / NAME).write_text(head + lines, encoding="utf-8")
    sync(folder / NAME)


def read_sums(folder: Path) -> dict[str, str]:
    """Return the hashes by the files' paths.

    Raises:
        Damaged: there is no list, or it is not what was written.
    """
    path = folder / NAME
    try:
        head, _, lines = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    found = _HEAD.fullmatch(head.decode(errors="replace"))
    if found is None or found[1] != hashlib.sha256(lines).hexdigest():
        raise Damaged(f"{path} is not what was written")
    entries = [_LINE.fullmatch(line) for line in lines.decode().splitlines()]
    if not all(entries):
        raise Damaged(f"{path} is no list of hashes")
    return {entry[2]: entry[1] for entry in entries}


def hash_file(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[memoryview]:
    """Yield a file's bytes; meanwhile the next are read."""
    halves = [memoryview(bytearray(_BLOCK)) for _ in range(2)]
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(file.readinto, halves[0])
        while count := ahead.result():
            halves.reverse()
            ahead = pool.submit(file.readinto, halves[0])
            yield halves[1][:count]


class PassingFile:
    """Hashes a file that is being read for other reasons too: what was just read need not be read again.

    Every byte is hashed once, from start to end, in whatever order stretches come by: what one leaves out is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash, self._size = hashlib.sha256(), 0

    def add(self, start: int, data: memoryview) -> None:
        """Take what the file holds from ``start`` on; the page cache need not keep it any longer."""
        if start < self._size:
            return  # hashed on the way to one that lay behind it
        self._read(start - self._size)
        self._hash.update(data)
        self._size += len(data)
        advise(self.path, start, len(data), os.POSIX_FADV_DONTNEED)

    def finish(self) -> str:
        """Read what is left and return the hash of all."""
        self._read(max(0, self.path.stat().st_size - self._size))
        return self._hash.hexdigest()

    def _read(self, count: int) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._size)
            while count and (block := file.read(min(count, _BLOCK))):
                self._hash.update(block)
                self._size, count = self._size + len(block), count - len(block)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the hashes of files below a folder."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name), names), strict=True))


@contextmanager
def checking(
    folder: Path,
    names: Iterable[str],
    sums: Mapping[str, str],
    passing: Mapping[Path, PassingFile] | None = None,
) -> Iterator[Callable[[], list[str]]]:
    """Let threads read and hash files while a with-block does something else.

    The block gets a function that waits for them and returns one line about each file that is missing or not what
    was written. Those in ``passing`` are hashed by the block itself, as far as it reads them.
    """
    pool, passing = ThreadPoolExecutor(_THREADS), passing or {}
    paths = {folder / name: sums[name] for name in names}
    found = [pool.submit(_fault, path, paths[path]) for path in paths if path not in passing]
    try:
        yield lambda: [
            *(line for future in found if (line := future.result())),
            *(line for path, file in passing.items() if (line := _fault(path, paths[path], file.finish))),
        ]
    finally:
        pool.shutdown(cancel_futures=True)


def damage(folder: Path, names: Iterable[str], sums: Mapping[str, str]) -> list[str]:
    """Return one line about each of these files that is missing or not what was written."""
    with checking(folder, names, sums) as found:
        return found()


def _fault(path: Path, wanted: str, hashed: Callable[[], str] | None = None) -> str | None:
    try:
        found = hashed() if hashed else hash_file(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return (
        None if found == wanted else f"{path} is not what was written: sha256 {found[:16]}, not {wanted[:16]}"
    )
