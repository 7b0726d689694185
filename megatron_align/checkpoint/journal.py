"""What of a folder that is being written is complete, so that a restart after a kill need not write it again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_align.checkpoint.files import partial_folder, sync

NAME = "journal.jsonl"


class Journal:
    """The list of complete files in ``partial``, where a folder is written before it is whole.

    The first line is the key: what decides the folder's content. A partial folder of another key, or with
    ``key`` None any partial folder, is removed. A half-written last line counts as none.

    Args:
        folder: that will appear.
        key: JSON object; None: nothing is taken over, and nothing kept for a restart.
    """

    def __init__(self, folder: Path, key: dict[str, Any] | None):
        self.partial, self.key = partial_folder(folder), key
        self.path = self.partial / NAME
        self.done: dict[str, Any] = {}
        entries = _read(self.path) if key is not None else []
        if entries and entries[0] == json.loads(json.dumps(key)):
            self.done = {entry["file"]: entry["facts"] for entry in entries[1:]}
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        if key is not None:
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

    def leave(self, kind: type[BaseException] | None) -> None:
        """Clear up after a with-block that ``kind`` ended: an interrupt keeps what a restart can use."""
        if self.key is None or kind is not KeyboardInterrupt:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _append(self, entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def fingerprint(folder: str | Path) -> list[list[Any]]:
    """Return what tells whether a folder's files were changed: their names, sizes and times."""
    files = sorted(path for path in Path(folder).resolve().rglob("*") if path.is_file())
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
