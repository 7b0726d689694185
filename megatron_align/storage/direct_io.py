"""A file written around the page cache, behind its writer.

What is written once and not read soon would push out of memory what is, and the kernel's copy costs more than the disk:
of 4.3 GB through the page cache, 5 s of a core on a virtual machine; around it, 0.3 s.
"""

from __future__ import annotations

import errno
import mmap
import os
from functools import partial
from pathlib import Path

from megatron_align.storage.background_worker import BackgroundWorker

BUFFER_BYTES = 16 << 20  # twice per file: one is filled while the other goes to the disk
ALIGNMENT = 4096  # of memory and places in the file; no disk in use wants a larger one


class DirectFile:
    """A file that takes bytes at any place, fastest where each stretch follows the last. What it held before stays.

    A file system that cannot write around the page cache (some in memory or in user space) writes through it.
    """

    def __init__(self, path: Path) -> None:
        self._plain = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._direct = _open_direct(path)
        self._buffers = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(2)]
        self._origin = 0  # the place of the buffer's first byte, a multiple of ALIGNMENT
        self._start = self._stop = 0  # what of the buffer is filled
        self._behind = BackgroundWorker()

    def write(self, place: int, data: memoryview) -> None:
        """Take bytes; ``data`` may change when this returns.

        Raises:
            OSError: they, or earlier ones, cannot be written.
        """
        if place != self._origin + self._stop:
            self._send()
            self._start = self._stop = place % ALIGNMENT
            self._origin = place - self._start
        while data:
            count = min(len(data), BUFFER_BYTES - self._stop)
            self._buffers[0][self._stop : self._stop + count] = data[:count]
            self._stop += count
            data = data[count:]
            if self._stop == BUFFER_BYTES:
                self._send()
                self._origin += BUFFER_BYTES
                self._start = self._stop = 0

    def finish(self) -> None:
        """Close the file, all of it on the disk.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self._send()
            self._behind.wait()
            os.fsync(self._plain)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; what has not reached the disk is lost."""
        self._behind.stop()
        for handle in (self._plain, self._direct):
            if handle is not None:
                os.close(handle)
        self._plain = self._direct = None

    def _send(self) -> None:
        """Have the filled part of the buffer written, and take the other buffer."""
        if self._start < self._stop:
            self._behind.run(partial(self._put, self._buffers[0], self._origin, self._start, self._stop))
            self._buffers.reverse()

    def _put(self, buffer: mmap.mmap, origin: int, start: int, stop: int) -> None:
        """Write whole blocks around the page cache, and what is left at both ends through it."""
        first = min(-(-start // ALIGNMENT) * ALIGNMENT, stop)
        last = max(first, stop // ALIGNMENT * ALIGNMENT)
        view = memoryview(buffer)
        self._write_through(view[start:first], origin + start)
        self._write_around(view[first:last], origin + first)
        self._write_through(view[last:stop], origin + last)

    def _write_around(self, view: memoryview, place: int) -> None:
        while view and self._direct is not None:
            try:
                count = os.pwrite(self._direct, view, place)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                count = 0  # larger blocks are wanted, or a limit lies within one: the next call says which
            view, place = view[count:], place + count
            if count == 0 or count % ALIGNMENT:
                os.close(self._direct)
                self._direct = None
        if view:
            self._write_through(view, place)
            os.fdatasync(self._plain)  # else the disk idles until the kernel has gathered gigabytes

    def _write_through(self, view: memoryview, place: int) -> None:
        while view:
            count = os.pwrite(self._plain, view, place)
            view, place = view[count:], place + count


def _open_direct(path: Path) -> int | None:
    """Return a handle that writes around the page cache; None: the file system has no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
