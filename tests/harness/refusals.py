"""What a mount point, an immutable file or a full disk refuses, without the rights to make one.

The same system calls fail with the same error numbers. Tests use the real thing too, where they may.
"""

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from megatron_align.storage import mounts


def _refusal(number, path):
    return OSError(number, os.strerror(number), str(path))


@contextmanager
def mounted(folders, listed_in):
    """Inside the with-block ``folders`` are mount points: the kernel lists them, and refuses to rename or remove them.

    Args:
        folders: existing ones; the list may grow.
        listed_in: file to be written, in the form of ``/proc/self/mountinfo``.
    """
    rename, rmdir = Path.rename, Path.rmdir

    class Listed:
        """The list, which is written when it is read."""

        def read_text(self, **options):
            escaped = (re.sub(r"[\s\\]", lambda m: f"\\{ord(m[0]):03o}", str(f.resolve())) for f in folders)
            lines = [f"36 35 0:31 / {path} rw,relatime - tmpfs tmpfs rw,size=64k\n" for path in escaped]
            listed_in.write_text("".join(lines), encoding="utf-8")
            return listed_in.read_text(**options)

        def read_bytes(self):
            return self.read_text(encoding="utf-8").encode()

    def is_mount(path):
        return any(os.path.samefile(path, folder) for folder in folders if os.path.exists(path))

    def renamed(self, target):
        if is_mount(self) or is_mount(target):
            raise _refusal(errno.EBUSY, self)
        return rename(self, target)

    def removed(self):
        if is_mount(self):
            raise _refusal(errno.EBUSY, self)
        return rmdir(self)

    with (
        mock.patch.object(mounts, "_MOUNTS", Listed()),
        mock.patch.object(Path, "rename", renamed),
        mock.patch.object(Path, "rmdir", removed),
    ):
        yield


@contextmanager
def immutable(path):
    """Inside the with-block a file cannot be deleted or renamed; of a folder, neither it nor what it holds."""
    inode, rename, unlink = path.stat().st_ino, Path.rename, os.unlink

    def renamed(self, target):
        if inode in (self.stat().st_ino, self.parent.stat().st_ino):
            raise _refusal(errno.EPERM, self)
        return rename(self, target)

    def deleted(name, *, dir_fd=None):
        parent = os.fstat(dir_fd) if dir_fd is not None else os.stat(os.path.dirname(name) or ".")
        if inode in (parent.st_ino, os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_ino):
            raise _refusal(errno.EPERM, name)
        unlink(name, dir_fd=dir_fd)

    with mock.patch.object(Path, "rename", renamed), mock.patch.object(os, "unlink", deleted):
        yield


class FullFile:
    """An unbuffered file on a disk that takes ``size()`` bytes: the last write is cut short, the next one refused."""

    def __init__(self, file, size):
        self._file, self._size = file, size

    def write(self, data):
        if not (room := max(0, self._size() - self._file.tell())):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data[:room])

    def __getattr__(self, name):
        return getattr(self._file, name)
