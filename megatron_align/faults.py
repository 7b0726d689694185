"""Faults on purpose, for the tests of what survives them; nothing happens unless one is asked for.

``MEGATRON_ALIGN_FAULT=KIND@POINT[:STEP[:RANK]]`` strikes one rank (by default 0) when it comes to the point in that
step (by default in any). Kinds: ``kill`` (SIGKILL, to itself), ``term`` (SIGTERM), ``full`` (what a full disk answers).

| point          | where                                                                              |
|----------------|------------------------------------------------------------------------------------|
| step.trained   | weights are updated, the step's row is not written                                 |
| step.logged    | the row is written, nothing is saved                                               |
| row.write      | rows are about to be added to metrics.jsonl                                        |
| save.begun     | the hidden folder exists, with nothing in it                                       |
| save.copying   | a thread is about to copy; in the background training goes on (not for ``full``)   |
| save.file      | a file is half written                                                             |
| save.written   | this rank's files are on the disk, the checkpoint has no name                      |
| save.named     | all is on the disk, the hidden folder is about to be renamed                       |
| save.done      | the checkpoint has its name, nothing is cleared up                                 |
| prune.hidden   | an old checkpoint is renamed, but not deleted                                      |
| resume.aside   | a damaged checkpoint was moved aside                                               |
"""

from __future__ import annotations

import errno
import os
import signal

VARIABLE = "MEGATRON_ALIGN_FAULT"
POINTS = (
    "step.trained",
    "step.logged",
    "row.write",
    "save.begun",
    "save.copying",
    "save.file",
    "save.written",
    "save.named",
    "save.done",
    "prune.hidden",
    "resume.aside",
)


def at(point: str, step: int | None = None) -> None:
    """Come to a point of the program; ``step`` is the checkpoint's or the training step's, where there is one.

    Raises:
        OSError: the disk is full, if that is asked for.
    """
    if asked := os.environ.get(VARIABLE):
        _strike(asked, point, step)


def _strike(asked: str, point: str, step: int | None) -> None:
    kind, _, place = asked.partition("@")
    name, *numbers = place.split(":")
    if kind not in ("kill", "term", "full") or name not in POINTS or len(numbers) > 2:
        raise ValueError(f"{VARIABLE} must be KIND@POINT[:STEP[:RANK]], got {asked!r}")
    wanted = numbers[0] if numbers else ""
    rank = numbers[1] if len(numbers) == 2 else "0"
    if name != point or rank != os.environ.get("RANK", "0") or wanted not in ("", str(step)):
        return
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
