"""Inject faults for the tests of crash recovery; without the environment variable nothing happens.

``MEGATRON_ALIGN_FAULT=KIND@POINT[:STEP[:RANK]]`` injects a fault on one rank (default 0) when it reaches the point in
that step (default: any step). Kinds: ``kill`` (SIGKILL to itself), ``term`` (SIGTERM), ``full`` (ENOSPC, a full disk).

| point              | where                                                                 |
|--------------------|-----------------------------------------------------------------------|
| rollouts.synced    | the engine has the weights, nothing is generated yet                  |
| rollouts.generated | completions exist, nothing is scored yet                              |
| rollouts.scored    | rewards exist, log-probs and advantages do not                        |
| rollouts.write     | rollouts are about to be written                                      |
| rollouts.written   | rollouts have their final name, nothing is trained on them yet        |
| step.trained       | weights are updated, the step's row is not yet written                |
| step.logged        | the row is written, the checkpoint is not yet begun                   |
| row.write          | rows are about to be added to metrics.jsonl                           |
| save.begun         | the hidden folder exists and is empty                                 |
| save.copying       | a thread is about to copy while training continues (not for ``full``) |
| save.file          | a file is half written                                                |
| save.written       | this rank's files are on the disk, the checkpoint is not yet complete |
| save.named         | everything is on the disk, the hidden folder is about to be renamed   |
| save.done          | the checkpoint has its final name, older ones are not yet removed     |
| prune.hidden       | an old checkpoint is renamed to a hidden name, but not yet deleted    |
| resume.aside       | a corrupt checkpoint was moved aside                                  |
"""

from __future__ import annotations

import errno
import os
import signal

VARIABLE = "MEGATRON_ALIGN_FAULT"
POINTS = (
    "rollouts.synced",
    "rollouts.generated",
    "rollouts.scored",
    "rollouts.write",
    "rollouts.written",
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
    """Mark a point of the program, where the environment variable may inject a fault.

    Args:
        point: one of ``POINTS``.
        step: the checkpoint's or training step's number, if there is one.

    Raises:
        OSError: the disk is full, if that fault was requested.
    """
    if requested := os.environ.get(VARIABLE):
        _inject(requested, point, step)


def _inject(requested: str, point: str, step: int | None) -> None:
    kind, _, where = requested.partition("@")
    name, *numbers = where.split(":")
    if kind not in ("kill", "term", "full") or name not in POINTS or len(numbers) > 2:
        raise ValueError(f"{VARIABLE} must be KIND@POINT[:STEP[:RANK]], got {requested!r}")
    at_step = numbers[0] if numbers else ""
    rank = numbers[1] if len(numbers) == 2 else "0"
    if name != point or rank != os.environ.get("RANK", "0") or at_step not in ("", str(step)):
        return
    if kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
