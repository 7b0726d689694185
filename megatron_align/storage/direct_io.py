"""Write a file around the page cache (O_DIRECT), on a background thread.

Data that are written once and not read soon would evict useful pages, and the kernel's copy costs more than the disk:
4.3 GB through the page cache took 5 s of a core on a virtual machine; around it, 0.3 s.
"""

from __future__ import annotations

import errno
import mmap
import os
from functools import partial
from pathlib import Path

from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.fsync import fsync_open

BUFFER_BYTES = 16 << 20  # two per file: one is filled while the other is written
ALIGNMENT = 4096  # of memory and file offsets; no disk in use needs a larger one


class DirectFile:
    """Write bytes at any offset of a file, fastest where each write continues the last; other content is kept.

    File systems without O_DIRECT (some in memory or in user space) are written through the page cache.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._plain = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._direct = _open_direct(path)
        self._buffers = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(2)]
        self._origin = 0  # file offset of the buffer's first byte, a multiple of ALIGNMENT
        self._start = self._stop = 0  # the filled part of the buffer
        self._worker = BackgroundWorker()
        self._is_closed = False

    def write(self, offset: int, data: memoryview) -> None:
        """Write ``data`` at a file offset; its memory may be reused when this returns.

        Raises:
            OSError: this or an earlier write failed.
        """
        if offset != self._origin + self._stop:
            self._flush()
            self._start = self._stop = offset % ALIGNMENT
            self._origin = offset - self._start
        while data:
            count = min(len(data), BUFFER_BYTES - self._stop)
            self._buffers[0][self._stop : self._stop + count] = data[:count]
            self._stop += count
            data = data[count:]
            if self._stop == BUFFER_BYTES:
                self._flush()
                self._origin += BUFFER_BYTES
                self._start = self._stop = 0

    def finish(self) -> None:
        """Force the file onto the disk and close it.

        Raises:
            OSError: a write failed.
        """
        try:
            self._flush()
            self._worker.wait()
            fsync_open(self._plain, self._path)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; without :meth:`finish`, buffered data are lost."""
        if self._is_closed:
            return
        self._is_closed = True
        self._worker.stop()
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    def _flush(self) -> None:
        """Start writing the filled part of the buffer, and switch to the other buffer."""
        if self._start < self._stop:
            self._worker.run(
                partial(self._write_buffer, self._buffers[0], self._origin, self._start, self._stop)
            )
            self._buffers.reverse()

    def _write_buffer(self, buffer: mmap.mmap, origin: int, start: int, stop: int) -> None:
        """Write complete blocks around the page cache, and the unaligned ends through it."""
        first = min(-(-start // ALIGNMENT) * ALIGNMENT, stop)
        last = max(first, stop // ALIGNMENT * ALIGNMENT)
        view = memoryview(buffer)
        self._write_plain(view[start:first], origin + start)
        self._write_direct(view[first:last], origin + first)
        self._write_plain(view[last:stop], origin + last)

    def _write_direct(self, view: memoryview, offset: int) -> None:
        while view and self._direct is not None:
            try:
                count = os.pwrite(self._direct, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                count = 0  # larger blocks are required, or a size limit lies within one: the next write says which
            view, offset = view[count:], offset + count
            if count == 0 or count % ALIGNMENT:
                os.close(self._direct)
                self._direct = None
        if view:
            self._write_plain(view, offset)
            fsync_open(
                self._plain, self._path, times=False
            )  # else the disk idles, the kernel gathers gigabytes

    def _write_plain(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._plain, view, offset)
            view, offset = view[count:], offset + count


def _open_direct(path: Path) -> int | None:
    """Return a handle opened with O_DIRECT; None: the file system does not support it."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
