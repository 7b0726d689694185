"""What of a folder that is being written is complete, so that a restart after a kill need not write it again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from megatron_align.errors import InputError
from megatron_align.storage.atomic_write import partial_folder, sync

NAME = "journal.jsonl"


class Journal:
    """The list of complete files in ``partial``, where a folder is written before it is whole.

    The first line is the key: what decides the folder's content. What a partial folder of another key, or with
    ``key`` None any partial folder, holds is removed. A half-written last line counts as none. The file is locked
    until :meth:`close` or :meth:`leave`, or the end of the process, however it comes.

    Args:
        folder: that will appear.
        key: JSON object; None: nothing is taken over, and nothing kept for a restart.

    Raises:
        InputError: another process writes the same folder.
    """

    def __init__(self, folder: Path, key: dict[str, Any] | None):
        self.partial, self.key = partial_folder(folder), key
        self.path = self.partial / NAME
        self.done: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if key is None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            return
        self.partial.mkdir(parents=True, exist_ok=True)
        self._file = self._locked(folder)
        entries = _read(self.path)
        if entries and entries[0] == json.loads(json.dumps(key)):
            self.done = {entry["file"]: entry["facts"] for entry in entries[1:]}
            self._drop_half_a_line()
            return
        self._clear()
        self._append(key)

    def add(self, file: Path, facts: Any = None) -> None:
        """Note a complete file below the folder, once it is on the disk; ``facts`` are found in ``done``."""
        if self.key is None:
            return
        sync(file)
        self.done[name := str(file.relative_to(self.partial))] = facts
        self._append({"file": name, "facts": facts})

    def close(self) -> None:
        """Remove the list: the folder is whole."""
        self.path.unlink(missing_ok=True)
        self._unlock()

    def leave(self, kind: type[BaseException] | None) -> None:
        """Clear up after a with-block that ``kind`` ended: an interrupt keeps what a restart can use."""
        if self.key is None or kind is not KeyboardInterrupt:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._unlock()

    def _locked(self, folder: Path) -> IO[str]:
        file = self.path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise InputError(f"one process at a time can write {folder}, another one does") from error
        return file

    def _unlock(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _clear(self) -> None:
        """Remove all but the list, which stays locked, and empty it."""
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self.path:
                path.unlink()
        self._file.truncate(0)

    def _drop_half_a_line(self) -> None:
        whole = self.path.read_bytes().rpartition(b"\n")[0]
        self._file.truncate(len(whole) + 1)

    def _append(self, entry: Any) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def fingerprint(folder: str | Path) -> list[list[Any]]:
    """Return what tells whether a folder's files were changed: their names, sizes and times."""
    files = sorted(path for path in Path(folder).resolve().rglob("*") if path.is_file())
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _read(path: Path) -> list[Any]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
