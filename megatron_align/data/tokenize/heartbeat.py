"""How long work of one process of a node is followed by the others: a file that changes while it goes on.

Nothing here looks at clocks of other machines or of file systems: what counts is whether the file changes.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEAT_SECONDS = 5.0
SILENT_SECONDS = 300.0  # some stalls of a shared disk are minutes long


@contextmanager
def beating(file: Path) -> Iterator[None]:
    """Change ``file`` every few seconds while the body runs. Gone afterwards; if the body fails, it tells why.

    A file that cannot be written is let be: the body, which writes beside it, tells of that.
    """
    done = threading.Event()

    def beat() -> None:
        while True:
            _write(file, None)
            if done.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        done.set()
        thread.join()
        _write(file, " ".join(str(error).split()) or type(error).__name__)
        raise
    done.set()
    thread.join()
    file.unlink(missing_ok=True)


class Follower:
    """Tells whether the process that changes ``file`` still works; counts from when it is made."""

    def __init__(self, file: Path) -> None:
        self._file, self._seen, self._since = file, _read(file), time.monotonic()

    def failure(self) -> str | None:
        """Return why that process is not waited for any longer; None: it works, or may yet begin."""
        told = _read(self._file)
        if told != self._seen:  # what stood there at first may be of an earlier run
            self._seen, self._since = told, time.monotonic()
            if told and told["failed"]:
                return f"it failed: {told['failed']}"
        if time.monotonic() - self._since > SILENT_SECONDS:
            return f"it has given no sign for {SILENT_SECONDS:g} seconds"
        return None


def _write(file: Path, failed: str | None) -> None:
    half = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half.write_text(json.dumps({"beat": uuid.uuid4().hex, "failed": failed}), encoding="utf-8")
        os.replace(half, file)
    except OSError:
        with suppress(OSError):
            half.unlink()


def _read(file: Path) -> dict[str, str | None] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet
        return None
