"""The holder of a lock file, and whether it is still alive.

On one machine the process table answers. On another one the holder is alive if its file changes, and dead if that has
not happened for STALE_SECONDS, measured by the clock of the observer: clocks of other machines are never read.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
_SILENT_SECONDS = 3 * BEAT_SECONDS  # after which a waiting process says what it waits for


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The content of a lock file.

    Args:
        host: name of the machine, for people.
        pid: of the process.
        since: when the lock was taken, for people.
        machine: identity of the running system and its process namespace.
        process_start: of the process, in the system's own unit: another process may get the same number later.
        group: of the processes that work together, such as the ranks of one launch.
        path: of the file: a copy of a folder holds a copy of its lock.
        stopping: the holder will stop and is saving.
        token: unique to this lock.
        beat: heartbeats so far.
    """

    host: str
    pid: int
    since: str
    machine: str
    process_start: str
    group: str
    token: str
    path: str
    stopping: bool = False
    beat: int = 0

    @classmethod
    def this_process(cls, path: Path, group: str) -> Holder:
        """Return this process as the holder of a new lock file."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            machine=_machine(),
            process_start=_start_of(os.getpid()) or "",
            group=group,
            token=uuid.uuid4().hex,
            path=str(path.resolve()),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def to_text(self) -> str:
        """Return the file's content. Heartbeats do not change its length, so a full disk need not refuse them."""
        fields = {**asdict(self), "stopping": "yes" if self.stopping else "no ", "beat": f"{self.beat:012d}"}
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Holder | None:
        """Return the holder; None: the file is just being written, or is no lock."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "beat": int(fields["beat"]), "stopping": fields["stopping"] == "yes"})
        except (ValueError, LookupError, TypeError):
            return None


class State(Enum):
    """A lock as another process sees it."""

    FREE = "no file"
    DEAD = "its holder has ended"
    ALIVE = "its holder runs"
    STOPPING = "its holder runs, and is saving before it stops"
    SILENT = "its holder has shown no sign of life yet"


class HolderWatch:
    """Judges a lock file by its content over time; ``text`` and ``holder`` are those of the last look."""

    def __init__(self, path: Path):
        self._path = path
        self.text: str | None = None
        self.holder: Holder | None = None
        self._changed_at = time.monotonic()

    def look(self) -> State:
        """Read the file and return the lock's state."""
        before, holder_before = self.text, self.holder
        self.text = read_text(self._path)
        self.holder = None if self.text is None else Holder.from_text(self.text)
        if self.text != before:
            self._changed_at = time.monotonic()
        if self.text is None:
            return State.FREE
        alive: bool | None = None
        if self.holder is not None and self.holder.machine == _machine():
            alive = _runs(self.holder) and not _is_copy(self._path, self.holder)
        elif self.holder is not None and holder_before is not None and self.text != before:
            alive = True if self.holder.token == holder_before.token else None  # a heartbeat
        elif self.silent_seconds > STALE_SECONDS:
            alive = False
        if alive is None:
            return State.SILENT
        if not alive:
            return State.DEAD
        return State.STOPPING if self.holder is not None and self.holder.stopping else State.ALIVE

    @property
    def silent_seconds(self) -> float:
        """Time since the file was last seen to change."""
        return time.monotonic() - self._changed_at

    def waiting_line(self, state: State) -> str | None:
        """Return what a process that waits for the lock may print; None: it has not waited for long."""
        if state is State.STOPPING:
            return f"waiting for {self.holder}, which is saving before it stops"
        if state is State.SILENT and self.silent_seconds > _SILENT_SECONDS:
            return (
                f"waiting: no heartbeat of {self.holder or 'its holder'} in {self._path} for "
                f"{self.silent_seconds:.0f} s; the lock is taken over after {STALE_SECONDS:g} s"
            )
        return None


def read_text(path: Path) -> str | None:
    """Return a lock file's content; None: there is no file. Opening it makes NFS ask the server."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Return what identifies the process table that this process is in: the boot and the process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """Return when a process of this machine started, in the system's own unit; "": unknown; None: it has ended."""
    try:
        # The name, in parentheses, may hold anything; the state is the first field after it, the start the 20th.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:  # it has ended, or is another user's on a system that hides those, or this is not Linux
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _runs(holder: Holder) -> bool:
    start = _start_of(holder.pid)
    return start is not None and (start == holder.process_start or "" in (start, holder.process_start))


def _is_copy(path: Path, holder: Holder) -> bool:
    """Return whether the holder's own lock is another file: ``path`` was copied together with its folder."""
    original = read_text(Path(holder.path))
    try:
        if original is None or os.path.samefile(holder.path, path):
            return False
    except FileNotFoundError:  # the holder has just released it
        return False
    holder_there = Holder.from_text(original)
    return holder_there is not None and holder_there.token == holder.token
