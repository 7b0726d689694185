"""A file of lines that is complete or absent, and that a killed process continues where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_align import faults
from megatron_align.errors import InputError, shown
from megatron_align.storage.atomic_write import require_writable
from megatron_align.storage.folder_lock import FolderLock
from megatron_align.storage.fsync import fsync, fsync_open


class ResumableLines:
    """Append lines to a hidden file next to ``path`` inside a with-block; :meth:`finish` gives it its name.

    ``.NAME.partial`` holds the lines, ``.NAME.partial.key`` what determines them, ``.NAME.lock`` names the process that
    writes them. An incomplete last line is removed.

    Args:
        path: to be written; must not exist.
        key: JSON object of what determines the content: the lines of another key are not continued.

    Attributes:
        done: lines that an earlier process has written.

    Raises:
        InputError: ``path`` exists, another process is writing it, or the unfinished lines have another key.
    """

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self._key = path, json.loads(json.dumps(key))
        self._require_new()
        require_writable(path)
        self._partial = path.with_name(f".{path.name}.partial")
        self._key_file = path.with_name(f".{path.name}.partial.key")
        self._lines: IO[bytes] | None = None
        self._lock = FolderLock(
            path.with_name(f".{path.name}.lock"),
            f"another process is writing {path}",
            "wait until it ends, or name another output",
        )
        self.done = 0

    def __enter__(self) -> ResumableLines:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            self._require_new()  # another process may have finished it
            self._take_over()
            self._lines = open(self._partial, "ab")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lines is not None:
            self._lines.close()
        self._lock.release()

    def append(self, lines: Sequence[str]) -> None:
        """Write lines, without their ends, and force them onto the disk.

        Raises:
            InputError: another process took the lock while this one was paused, and writes the same file.
        """
        assert self._lines is not None, "within the with-block"
        self._lock.require_held()
        faults.at("row.write")
        self._lines.write("".join(f"{line}\n" for line in lines).encode())
        self._lines.flush()
        fsync_open(self._lines.fileno(), self._partial)

    def finish(self) -> None:
        """Give the file its name.

        Raises:
            InputError: another process took the lock while this one was paused, and writes the same file.
        """
        assert self._lines is not None, "within the with-block"
        self._lock.require_held()
        self._partial.rename(self.path)
        self._key_file.unlink(missing_ok=True)
        fsync(self.path.parent)

    def _require_new(self) -> None:
        if self.path.exists():
            raise InputError(
                f"the output must be a new file, found one: delete it, or name another: {self.path}"
            )

    def _take_over(self) -> None:
        """Count the complete lines of an earlier process with the same key; cut an incomplete one."""
        text = self._key_file.read_text(encoding="utf-8") if self._key_file.exists() else ""
        lines = self._partial.read_bytes() if self._partial.exists() else b""
        if lines and (found := _differences(self._key, text)):
            raise InputError(
                f"an unfinished output was written with other options ({found}): run that command again, or delete "
                f"{self._partial}"
            )
        complete = lines[: lines.rfind(b"\n") + 1]
        if len(complete) < len(lines):
            os.truncate(self._partial, len(complete))
        self.done = complete.count(b"\n")
        if not lines:
            self._key_file.write_text(json.dumps(self._key), encoding="utf-8")
            fsync(self._key_file)


def read_rows(file: Path) -> list[Any]:
    """Return the JSON values of a complete file of lines. Only a line feed ends a line: texts hold other separators."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def stored_key(path: Path) -> dict[str, Any]:
    """Return the key of the unfinished lines of a file; empty: there are none, or it is unreadable."""
    try:
        key = json.loads(path.with_name(f".{path.name}.partial.key").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return key if isinstance(key, dict) else {}


def describe_differences(key: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """Return the names and values in which a stored key differs, ``seed 1 instead of 2``; empty: it is the same."""
    found = []
    for name in sorted(key.keys() | stored.keys()):
        ours, theirs = key.get(name), stored.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            inner = describe_differences(ours, theirs)
            found += [inner] if inner else []
        elif ours != theirs:
            found.append(f"{name} {shown(theirs)} instead of {shown(ours)}")
    return ", ".join(found)


def _differences(key: dict[str, Any], text: str) -> str:
    """Return how a stored key differs; empty: it is the same."""
    try:
        stored = json.loads(text)
    except ValueError:
        stored = None
    return describe_differences(key, stored) if isinstance(stored, dict) else "its key is unreadable"
