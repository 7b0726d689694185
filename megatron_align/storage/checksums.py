"""SHA-256 checksums of a folder's files, in ``SHA256SUMS``, which ``sha256sum --check`` reads too.

The first line of the list is its own checksum, so that a corrupt list is not mistaken for corrupt files.
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
from typing import IO, Any, cast

import torch

from megatron_align.storage.atomic_write import advise_page_cache
from megatron_align.storage.direct_io import DirectFile
from megatron_align.storage.fsync import fsync

CHECKSUMS = "SHA256SUMS"
_THREADS = 2  # files hashed concurrently
_BLOCK_BYTES = 4 << 20
_HEADER = re.compile(r"# sha256 of the lines below: ([0-9a-f]{64})")
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


class CorruptChecksums(ValueError):
    """The list of checksums is missing or corrupt; the message is one line."""


class HashingFile(io.RawIOBase):
    """Write a new file from start to end, around the page cache, and hash it on the way."""

    _is_open = False  # close() is also called on a file that could not be opened

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._file = DirectFile(path)
        self._is_open = True
        self._hash, self._size = hashlib.sha256(), 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _BLOCK_BYTES):  # one block is written while the next is hashed
            block = view[start : start + _BLOCK_BYTES]
            self._hash.update(block)
            try:
                self._file.write(self._size, block)
            except OSError as error:
                self._error = error
                raise
            self._size += len(block)
        return len(view)

    def save(self, content: Any) -> None:
        """Append ``content`` with ``torch.save``.

        Raises:
            OSError: the disk's own error, where torch would raise a RuntimeError about its writer.
        """
        try:
            torch.save(content, cast(IO[bytes], self))
        except RuntimeError as error:
            raise self._error or error from error

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._size

    def writable(self) -> bool:
        return True

    def finish(self) -> str:
        """Force the file onto the disk, close it and return its checksum."""
        self._file.finish()
        super().close()
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file; without :meth:`finish`, buffered data are lost."""
        if self._is_open:
            self._file.close()
        super().close()


@contextmanager
def without_zip_checksums() -> Iterator[None]:
    """Let torch.save omit CRC32 checksums in a with-block: its files are hashed here, and torch.load checks none.

    Other threads must run in the block's context (:class:`BackgroundWorker` does that).
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_checksums(folder: Path, checksums: Mapping[str, str]) -> None:
    """Write the list of checksums, given by the files' paths in the folder, and force it onto the disk."""
    lines = "".join(f"{checksum}  {name}\n" for name, checksum in sorted(checksums.items()))
    header = f"# sha256 of the lines below: {hashlib.sha256(lines.encode()).hexdigest()}\n"
    (folder / CHECKSUMS).write_text(header + lines, encoding="utf-8")
    fsync(folder / CHECKSUMS)


def read_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums by the files' paths in the folder.

    Raises:
        CorruptChecksums: the list is missing, or its own checksum does not match.
    """
    path = folder / CHECKSUMS
    try:
        header, _, lines = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CorruptChecksums(f"{path} cannot be read: {error.strerror}") from error
    match = _HEADER.fullmatch(header.decode(errors="replace"))
    if match is None or match[1] != hashlib.sha256(lines).hexdigest():
        raise CorruptChecksums(f"{path}: SHA-256 mismatch of the list itself")
    checksums = {}
    for line in filter(None, lines.decode().split("\n")):
        if (entry := _LINE.fullmatch(line)) is None:
            raise CorruptChecksums(f"{path} is not a list of checksums")
        checksums[entry[2]] = entry[1]
    return checksums


def hash_file(path: Path) -> str:
    """Return the SHA-256 checksum of a file."""
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[memoryview]:
    """Yield a file's bytes block by block, reading one block ahead."""
    halves = [memoryview(bytearray(_BLOCK_BYTES)) for _ in range(2)]
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(file.readinto, halves[0])
        while count := pending.result():
            halves.reverse()
            pending = pool.submit(file.readinto, halves[0])
            yield halves[1][:count]


class HashWhileReading:
    """Hash a file whose content somebody else reads, so that it is read from the disk only once.

    Every byte is hashed once, from start to end, in whatever order blocks are added; gaps are read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hash, self._size = hashlib.sha256(), 0

    def add(self, start: int, data: memoryview) -> None:
        """Hash what the file holds from offset ``start`` on, and drop it from the page cache."""
        if start < self._size:
            return  # already hashed, as a gap before a later block
        self._read(start - self._size)
        self._hash.update(data)
        self._size += len(data)
        advise_page_cache(self.path, start, len(data), os.POSIX_FADV_DONTNEED)

    def finish(self) -> str:
        """Read the rest and return the checksum of the entire file."""
        self._read(max(0, self.path.stat().st_size - self._size))
        return self._hash.hexdigest()

    def _read(self, count: int) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._size)
            while count and (block := file.read(min(count, _BLOCK_BYTES))):
                self._hash.update(block)
                self._size, count = self._size + len(block), count - len(block)


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the checksums of files, by their paths in the folder."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: hash_file(folder / name), names), strict=True))


@contextmanager
def verifying_checksums(
    folder: Path,
    names: Iterable[str],
    checksums: Mapping[str, str],
    hashed_by_block: Mapping[Path, HashWhileReading] | None = None,
) -> Iterator[Callable[[], list[str]]]:
    """Hash files on threads during a with-block.

    The block gets a function that waits for the threads and returns one line for each file that is missing or does
    not match its checksum. Files in ``hashed_by_block`` are hashed by the block itself as it reads them.
    """
    pool, hashed_by_block = ThreadPoolExecutor(_THREADS), hashed_by_block or {}
    paths = {folder / name: checksums[name] for name in names}
    pending = [pool.submit(_mismatch, path, paths[path]) for path in paths if path not in hashed_by_block]

    def wait() -> list[str]:
        own = [_mismatch(path, paths[path], file.finish) for path, file in hashed_by_block.items()]
        return [line for line in (*(future.result() for future in pending), *own) if line]

    try:
        yield wait
    finally:
        pool.shutdown(cancel_futures=True)


def find_mismatches(folder: Path, names: Iterable[str], checksums: Mapping[str, str]) -> list[str]:
    """Return one line for each of the files that is missing or does not match its checksum."""
    with verifying_checksums(folder, names, checksums) as wait:
        return wait()


def _mismatch(path: Path, expected: str, hashed: Callable[[], str] | None = None) -> str | None:
    try:
        actual = hashed() if hashed else hash_file(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if actual == expected:
        return None
    return f"{path}: SHA-256 mismatch: {actual[:16]}..., expected {expected[:16]}..."
