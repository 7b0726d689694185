"""Record which files of a partial folder are complete, so that a restart after a kill need not write them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from megatron_align.storage.atomic_write import CommitFailed, partial_folder
from megatron_align.storage.folder_lock import FolderLock
from megatron_align.storage.fsync import fsync, fsync_open

JOURNAL = "journal.jsonl"
_VERSION = 2  # of the entries; a partial folder of another version is discarded


class Journal:
    """List the complete files of the partial folder in which ``folder`` is being written.

    The first line is the key: what determines the folder's content. A partial folder with another key is emptied,
    and any partial folder if ``key`` is None. An incomplete last line is ignored. With a key the folder is locked, by a
    file next to it, until :meth:`abandon`, the end of the with-block or of the process.

    Args:
        folder: to be written.
        key: JSON object; None: nothing is taken over from a killed process, and nothing is kept for a restart.

    Raises:
        InputError: another process is writing the same folder.
    """

    def __init__(self, folder: Path, key: dict[str, Any] | None):
        self.partial, self.key = partial_folder(folder), key
        self.path = self.partial / JOURNAL
        self.done: dict[str, Any] = {}  # notes by complete file
        self._file: IO[str] | None = None
        self._lock = FolderLock(
            folder.with_name(f".{folder.name}.lock"),
            f"another process is already writing {folder}",
            "wait until it ends, or choose another output",
        )
        if key is None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        self.partial.mkdir(exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        header = {"version": _VERSION, **key}
        entries = _read(self.path)
        if entries and entries[0] == json.loads(json.dumps(header)):
            self.done = {entry["file"]: entry["notes"] for entry in entries[1:]}
            _drop_incomplete_line(self.path, self._file)
            return
        self._clear(self._file)
        _append(self._file, header)

    def add(self, file: Path, notes: Any = None) -> None:
        """Record a file of the partial folder as complete once it is on the disk; ``notes`` (JSON) go to ``done``."""
        if self._file is None:
            return
        fsync(file)
        self.done[name := str(file.relative_to(self.partial))] = notes
        _append(self._file, {"file": name, "notes": notes})

    def close(self) -> None:
        """Delete the list: the folder is complete and may get its name.

        Raises:
            InputError: another process took the lock while this one was paused, and writes the same folder.
        """
        self._lock.require_held()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon(kind)

    def abandon(self, kind: type[BaseException] | None) -> None:
        """Give the lock back; clean up after an exception of type ``kind`` (None: the folder has its name).

        An interrupt keeps what a restart can use, and a folder that could not get its name keeps its content.
        """
        keeps = self.key is not None and kind is not None and issubclass(kind, KeyboardInterrupt)
        if not keeps and not (kind is not None and issubclass(kind, CommitFailed)) and not self._lock.lost:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
        self._lock.release()

    def _clear(self, file: IO[str]) -> None:
        """Delete everything but the list, and empty it."""
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self.path:
                path.unlink()
        file.truncate(0)


def fingerprint(folder: str | Path) -> list[list[Any]]:
    """Return names, sizes and modification times of a folder's files: they change whenever a file does.

    Hidden files are no part of it: an unfinished output may be next to its input.
    """
    root = Path(folder).resolve()
    shown = (
        path for path in root.rglob("*") if not any(p.startswith(".") for p in path.relative_to(root).parts)
    )
    files = sorted(path for path in shown if path.is_file())
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _drop_incomplete_line(path: Path, file: IO[str]) -> None:
    complete = path.read_bytes().rpartition(b"\n")[0]
    file.truncate(len(complete) + 1)


def _append(file: IO[str], entry: Any) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()
    fsync_open(file.fileno(), Path(file.name))


def _read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
