"""The record of a rehearsal by phase of the run: host waits, memory, bytes and operations, collectives, faults."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
OURS = {f"{PACKAGE}/": "", f"{(PACKAGE / 'kernels').resolve()}/": "kernels/"}  # kernels/ is a link
HERE = f"{Path(__file__).resolve().parent}/"


class Wait(NamedTuple):
    """A point at which the host waits for the GPU."""

    kind: str
    place: str


@dataclass(slots=True)
class Work:
    """Operations of one kind: launches, the bytes they read and write, and their operations if matrix products."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0


@dataclass(slots=True)
class Ledger:
    """The record of one rehearsed rank.

    Attributes:
        phase: what the rank is doing.
        waits: number of waits by phase.
        faults: what would fail or be wrong on a GPU, one line each.
        launches: of Triton kernels, by name.
        collectives: by phase, by name.
        work: by phase, by name of the operation.
        live: bytes held now.
    """

    phase: str = "start"
    waits: dict[str, Counter[Wait]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    collectives: dict[str, Counter[str]] = field(default_factory=dict)
    work: dict[str, dict[str, Work]] = field(default_factory=dict)
    live: int = 0
    _blocks: dict[int, tuple[int, str]] = field(default_factory=dict)
    _log: list[tuple[str, int, str]] = field(default_factory=list)  # phase, bytes more or less, place

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Enter a phase inside a with-block."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def wait(self, kind: str) -> None:
        """Record that the host waits here."""
        self.waits.setdefault(self.phase, Counter())[Wait(kind, place())] += 1

    def fault(self, what: str) -> None:
        """Record what would fail on a GPU here."""
        self.faults[f"{what} at {place()}"] += 1

    def collective(self, name: str) -> None:
        """Record a collective."""
        self.collectives.setdefault(self.phase, Counter())[name] += 1

    def operation(self, name: str, read_and_written: int, flops: int) -> None:
        """Record a launch."""
        own = self.work.setdefault(self.phase, {}).setdefault(name, Work())
        own.launches += 1
        own.bytes += read_and_written
        own.flops += flops

    def holds(self, key: int) -> bool:
        """Return whether a block is recorded."""
        return key in self._blocks

    def hold(self, key: int, size: int) -> None:
        """Record that a block exists, or has another size now."""
        before, where = self._blocks.get(key, (0, ""))
        if size == before and where:
            return
        where = where or place()
        self._blocks[key] = (size, where)
        self._change(size - before, where)

    def free(self, key: int) -> None:
        """Record that a block was freed."""
        size, where = self._blocks.pop(key, (0, ""))
        self._change(-size, where)

    def _change(self, size: int, where: str) -> None:
        self.live += size
        self._log.append((self.phase, size, where))

    def peaks(self) -> dict[str, int]:
        """Return the largest number of bytes held in each phase."""
        live, peaks = 0, dict.fromkeys((phase for phase, _, _ in self._log), 0)
        for phase, size, _ in self._log:
            live += size
            peaks[phase] = max(peaks[phase], live)
        return peaks

    def holders(self) -> Counter[str]:
        """Return the bytes at the peak by the place that allocated them."""
        live = peak = at = 0
        for i, (_, size, _) in enumerate(self._log):
            live += size
            if live > peak:
                peak, at = live, i
        held: Counter[str] = Counter()
        for _, size, where in self._log[: at + 1]:
            held[where] += size
        return +held


def place() -> str:
    """Return the innermost two lines of our code on the stack, or of megatron-core's where there is none of ours."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < 2:
        file = frame.f_code.co_filename
        if not file.startswith(HERE):
            name = next((new + file[len(old) :] for old, new in OURS.items() if file.startswith(old)), None)
            if name is None and "/megatron/core/" in file and not found:
                name = f"megatron-core's {file.rpartition('/megatron/core/')[2]}"
            if name is not None:
                found.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "the rehearsal"
