"""Replies of models, kept in a file by what was requested: a killed or repeated run requests none twice."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any


def content_key(*parts: Any) -> str:
    """Return the hash of JSON values that determine a reply."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class KeptReplies:
    """A file of lines ``{"key", "reply"}``, appended to by any thread as replies come.

    Args:
        file: to which new replies are appended; its folder exists. None: they are kept in memory only.
        others: files of earlier runs or other ranks, which are read too.
    """

    def __init__(self, file: Path | None, others: Iterable[Path] = ()) -> None:
        self._file, self._lock = file, threading.Lock()
        self._output: IO[bytes] | None = None
        self._earlier: dict[str, list[Any]] = {}  # read from files
        self._added: dict[str, list[Any]] = {}
        for read in dict.fromkeys([*sorted(others), file]):
            if read is not None and read.exists():
                self._read(read)

    @property
    def is_stored(self) -> bool:
        """Whether the replies are in a file."""
        return self._file is not None

    def of(self, key: str) -> list[Any]:
        """Return the replies with a key, in the order in which they came."""
        with self._lock:
            return [*self._earlier.get(key, ()), *self._added.get(key, ())]

    def earlier(self, key: str) -> list[Any]:
        """Return the replies with a key that the files held at the start."""
        return self._earlier.get(key, [])

    def add(self, key: str, reply: Any) -> None:
        """Keep a reply: it is in the file when this returns, so that a kill of the process does not lose it."""
        line = (json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n").encode(
            "utf-8", "surrogatepass"
        )
        with self._lock:
            if self._output is None and self._file is not None:
                self._output = _open(self._file)
                _end_line(self._output)
            if self._output is not None:
                self._output.write(line)
                self._output.flush()
            self._added.setdefault(key, []).append(reply)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._output is not None:
                self._output.close()
                self._output = None

    def _read(self, file: Path) -> None:
        for line in file.read_bytes().split(b"\n")[:-1]:
            try:
                entry = json.loads(line.decode("utf-8", "surrogatepass"))
                self._earlier.setdefault(entry["key"], []).append(entry["reply"])
            except (ValueError, KeyError, TypeError):
                continue  # cut by a kill


def _open(file: Path) -> IO[bytes]:
    return open(file, "ab+")


def _end_line(file: IO[bytes]) -> None:
    """End a line that a kill has cut: the next one would be lost with it."""
    if file.seek(0, 2):
        file.seek(-1, 2)
        if file.read(1) != b"\n":
            file.write(b"\n")
