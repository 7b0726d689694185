"""Record what a program forces onto the disk and renames, and list what a power failure could lose.

A file system may write a rename before the content of what is renamed, and loses a rename whose folder was not
forced. So a rename is safe if every file and folder below its source was forced after its last change, and the
destination's folder is forced afterwards. A kill test cannot see this: the page cache survives a kill.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

# Renamed files that may be lost or empty: who reads them checks their content and does without.
REBUILT = (".lock", ".heartbeat", ".part")


class Durability:
    """Use it as a context manager; renames to hidden names (deletion, replacement) are not judged."""

    def __init__(self) -> None:
        self.renamed: list[str] = []
        self._unsafe: list[str] = []
        self._forced: dict[tuple[int, int], tuple[int, int]] = {}
        self._waiting: dict[tuple[int, int], str] = {}

    def __enter__(self) -> Durability:
        self._patches = [
            mock.patch.object(os, name, self._forcing(getattr(os, name))) for name in ("fsync", "fdatasync")
        ]
        self._patches += [
            mock.patch.object(os, name, self._renaming(getattr(os, name))) for name in ("rename", "replace")
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in reversed(self._patches):
            patch.stop()

    def unsafe(self) -> list[str]:
        """Return what a power failure could lose or leave incomplete, one line each."""
        never = [f"{path}: its folder is not forced after the rename" for path in self._waiting.values()]
        return [*self._unsafe, *never]

    def _forcing(self, force: Callable[[int], None]) -> Callable[[int], None]:
        def forced(handle: int) -> None:
            force(handle)
            found = os.fstat(handle)
            key = (found.st_dev, found.st_ino)
            self._forced[key] = (found.st_size, found.st_mtime_ns)
            self._waiting.pop(key, None)

        return forced

    def _renaming(self, rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            path = Path(target)
            judged = not path.name.startswith(".") and not any(part in path.name for part in REBUILT)
            if judged:
                self._judge(Path(source), path)
            rename(source, target, **options)
            if judged:
                parent = path.parent.stat()
                self._waiting[parent.st_dev, parent.st_ino] = str(path)
                self.renamed.append(path.name)

        return renamed

    def _judge(self, source: Path, target: Path) -> None:
        for path in (source, *source.rglob("*")):
            if path.is_symlink():
                continue
            found = path.stat()
            if self._forced.get((found.st_dev, found.st_ino)) != (found.st_size, found.st_mtime_ns):
                self._unsafe.append(f"{target}: {path} is not forced after its last change")
