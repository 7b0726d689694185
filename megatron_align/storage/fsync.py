"""Force files and folders onto the disk, also where a file system supports it only in part.

CIFS and some file systems in user space refuse fsync of a folder, a few refuse it of files. The data then reach the
disk when the system writes them by itself. Only a power failure can lose them: a reason to warn, and no error.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from megatron_align.errors import warn_once

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_UNSUPPORTED_FOR_FOLDERS = (*_UNSUPPORTED, errno.EBADF)


def fsync(path: Path) -> None:
    """Force a file or a folder's entries onto the disk; warn once where the file system does not support it.

    Raises:
        OSError: the disk refuses the data.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if not path.is_dir():
            raise
        _warn("folders that are not readable", path)
        return
    try:
        fsync_open(handle, path)
    finally:
        os.close(handle)


def fsync_open(handle: int, path: Path, *, times: bool = True) -> None:
    """Force an open file or folder onto the disk, as :func:`fsync` does; without ``times`` only its data and size."""
    try:
        if times:
            os.fsync(handle)
        else:
            os.fdatasync(handle)
    except OSError as error:
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        if error.errno not in (_UNSUPPORTED_FOR_FOLDERS if is_folder else _UNSUPPORTED):
            raise
        _warn("folders" if is_folder else "files", path)


def _warn(kind: str, path: Path) -> None:
    where = path if path.is_dir() else path.parent
    warn_once(
        f"the file system cannot force {kind} onto the disk (fsync), first seen at {where}: what was written last "
        "could be lost in a power failure; nothing else changes",
        key=f"fsync {kind}",
    )
