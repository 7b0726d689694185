"""Local rank 0 of a node prepares the store; the other local ranks wait for it."""

from __future__ import annotations

import hashlib
import logging
import socket
import time
from contextlib import nullcontext
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
        spec: of the store; with a date where the chat template reads the clock, as the ranks read it at other times.
        local_rank: of this process on its node.
        waited_for: other local ranks may wait: local rank 0 writes a heartbeat file, which stays if it fails.

    Raises:
        InputError: as :func:`.prepare.prepare`; on the others, if local rank 0 failed, or sent no heartbeat for
            ``heartbeat.TIMEOUT_SECONDS``.
    """
    assert spec.template_date or not (waited_for and spec.clock()), "ranks read the clock at different times"
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


def _request_name(spec: StoreSpec) -> str:
    """Return a name of the requested store that needs no file to be read."""
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


def _log_skipped(manifest: dict[str, Any]) -> None:
    lines = manifest["examples"]["skipped"]
    for line in lines:
        _log.warning("skipped: %s", line)
    if manifest["skipped"] > len(lines):
        _log.warning("skipped: %d more records", manifest["skipped"] - len(lines))
