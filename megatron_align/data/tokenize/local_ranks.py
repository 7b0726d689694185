"""Local rank 0 of a node prepares the store; the other local ranks wait for it."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_align.data.store import read_manifest
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.heartbeat import HeartbeatMonitor, heartbeat
from megatron_align.data.tokenize.prepare import prepare
from megatron_align.errors import InputError

POLL_SECONDS = 0.2
_log = logging.getLogger(__name__)


def prepare_or_wait(spec: StoreSpec, local_rank: int, *, waited_for: bool = True) -> Path:
    """Prepare on local rank 0; the others wait for its store, however long it takes.

    Local rank 0 also logs the records that were skipped.

    Args:
        spec: of the store.
        local_rank: of this process on its node.
        waited_for: other local ranks may wait: local rank 0 writes a heartbeat file, which stays if it fails.

    Raises:
        InputError: as :func:`.prepare.prepare`; several ranks would read several times of day from the clock; on the
            others, if local rank 0 failed, or sent no heartbeat for ``heartbeat.TIMEOUT_SECONDS``.
    """
    if waited_for and not spec.template_date:  # an evaluation: training fixes the date for the entire run
        _require_day(spec)
    file = Path(spec.cache) / f".{_request_name(spec)}.{socket.gethostname()}.alive"
    if local_rank == 0:
        with heartbeat(file) if waited_for else nullcontext():
            path = prepare(spec)
        _log_skipped(read_manifest(path))
        return path
    monitor = HeartbeatMonitor(file)
    path = spec.path(spec.inputs())
    while not path.exists():
        failure = monitor.failure()
        if failure:
            raise InputError(
                f"local rank {local_rank} needs the data that local rank 0 prepares in {spec.cache}; {failure}"
            )
        time.sleep(POLL_SECONDS)
    return path


def _require_day(spec: StoreSpec) -> None:
    """Refuse a template that reads the time of day: every rank would look for another store."""
    morning, evening = (
        replace(spec, template_date=f"2024-07-26T{time}").clock() for time in ("01:02:03", "22:33:44")
    )
    if morning != evening:
        raise InputError(
            f"the chat template reads the time of day ({', '.join(morning)}), which differs between ranks: evaluate "
            "with one rank, or give the task a chat_template that does not read it"
        )


def _request_name(spec: StoreSpec) -> str:
    """Return a name of the requested store that needs no file to be read."""
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


def _log_skipped(manifest: dict[str, Any]) -> None:
    lines = manifest["examples"]["skipped"]
    for line in lines:
        _log.warning("skipped: %s", line)
    if manifest["skipped"] > len(lines):
        _log.warning("skipped: %d more records", manifest["skipped"] - len(lines))
