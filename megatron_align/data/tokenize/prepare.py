"""Tokenise once, into a store that is complete or absent, keyed by all that decides its content.

One process reads and checks the records, others tokenise them, chunk by chunk, into part files; the parts are
then joined in order. So the store's bytes do not depend on the number of processes, memory does not grow with
the data, and a preparation that was killed is continued from its parts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_align.data.store import COLUMNS, COLUMNS_OF_KIND, MANIFEST, read_manifest
from megatron_align.data.tokenize.cache_key import StoreSpec, file_states, remember_hashes
from megatron_align.data.tokenize.chunks import (
    LEFT_OUT,
    Chunk,
    Counts,
    Tokeniser,
    counts_of,
    part_file,
    read_chunks,
    read_part,
    read_shapes,
)
from megatron_align.data.tokenize.heartbeat import Follower, beating
from megatron_align.data.tokenize.work_dir import Work
from megatron_align.errors import InputError

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
LITTLE_BYTES = 16_000_000  # one process has tokenised this before others have started
MOST_PROCESSES = 16  # what one reading process can keep busy


def prepare(spec: StoreSpec) -> Path:
    """Return the store of ``spec``, tokenising the data if there is none yet.

    Raises:
        InputError: for bad data or a bad tokenizer, a sample that is too long (``too_long`` error), no sample
            left, or a cache that cannot be written; names the place.
    """
    states = file_states(spec)
    inputs = spec.inputs()
    path = spec.path(inputs)
    if not path.exists():
        try:
            _make(spec, inputs, states, path)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"{spec.cache}: tokenised data could not be written: {reason}") from error
    remember_hashes(spec, inputs, states)
    return path


def prepare_or_wait(spec: StoreSpec, local_rank: int, *, waited_for: bool = True) -> Path:
    """Prepare on local rank 0; the others wait for its store, however long it takes.

    Local rank 0 also tells of the records that were skipped.

    Args:
        spec: of the store.
        local_rank: of this process on its node.
        waited_for: other local ranks may wait: they are given signs, the last of which stays if this fails.

    Raises:
        InputError: as :func:`prepare`; on the others, if local rank 0 failed, or gave no sign for
            ``heartbeat.SILENT_SECONDS``.
    """
    sign = Path(spec.cache) / f".{_asked(spec)}.{socket.gethostname()}.alive"
    if local_rank == 0:
        with beating(sign) if waited_for else nullcontext():
            path = prepare(spec)
        _tell_skipped(read_manifest(path))
        return path
    leader = Follower(sign)
    path = spec.path(spec.inputs())
    while not path.exists():
        failure = leader.failure()
        if failure:
            raise InputError(
                f"local rank {local_rank} needs the data that local rank 0 prepares in {spec.cache}; {failure}"
            )
        time.sleep(POLL_SECONDS)
    return path


def _asked(spec: StoreSpec) -> str:
    """Return a name for what is asked, known before any file is read."""
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]


def _tell_skipped(manifest: dict[str, Any]) -> None:
    lines = manifest["examples"]["skipped"]
    for line in lines:
        _log.warning("skipped: %s", line)
    if manifest["skipped"] > len(lines):
        _log.warning("skipped: %d more records", manifest["skipped"] - len(lines))


def _make(spec: StoreSpec, inputs: dict[str, Any], states: dict[str, str], path: Path) -> None:
    kind, shapes = read_shapes(spec)
    work = Work(path)
    try:
        total, parts = _tokenise(spec, work)
        if file_states(spec) != states:
            raise InputError(
                f"{', '.join(spec.sources)}: must stay as they are while being tokenised, got changed files"
            )
        _require_samples(total, spec)
        _join(work, parts, spec, {**inputs, "kind": kind, "shapes": shapes})
        _publish(work.store, path)
    except (InputError, OSError):
        work.remove()
        raise
    except BaseException:  # interrupted: the next run continues here
        work.leave()
        raise
    work.remove()


def _publish(unfinished: Path, path: Path) -> None:
    """Give the finished store its name; another machine may have been faster, with the same content."""
    try:
        unfinished.rename(path)
    except OSError:
        if not (path / MANIFEST).is_file():
            raise


def _require_samples(total: Counts, spec: StoreSpec) -> None:
    if total.samples:
        return
    reasons = [
        f"all {total.dropped} were dropped as too long" if total.dropped else "",
        f"{total.skipped} were skipped, the first as {total.examples['skipped'][0]}" if total.skipped else "",
    ]
    raise InputError(
        f"{', '.join(spec.sources)}: must leave a sample within data.sequence_length = "
        f"{spec.sequence_length} tokens, got none: {'; '.join(filter(None, reasons))}"
    )


# Tokenising: chunks in, parts out.
def _tokenise(spec: StoreSpec, work: Work) -> tuple[Counts, int]:
    """Write every part that is not there yet; return the counts, and the number of parts.

    An error is the first one in the order of the records.
    """
    failed: list[InputError] = []
    total, parts = Counts(), 0
    processes = _processes(spec)
    with _workers(spec, work.parts, processes) as submit, _progress() as say:
        pending: deque[Future[Counts]] = deque()

        def finish(at_most: int) -> None:
            while len(pending) > at_most:
                total.add(pending.popleft().result())
                say(total)

        for chunk in read_chunks(spec, failed):
            pending.append(_found(work, chunk) or submit(chunk))
            parts = chunk.index + 1
            finish(2 * processes)
        finish(0)
    if failed:
        raise failed[0]
    return total, parts


def _found(work: Work, chunk: Chunk) -> Future[Counts] | None:
    part = read_part(part_file(work.parts, chunk.index))
    if part is None or part[0]["chunk"] != chunk.key():
        return None
    done: Future[Counts] = Future()
    done.set_result(counts_of(part[0]))
    return done


def _processes(spec: StoreSpec) -> int:
    if spec.processes is not None:
        return spec.processes
    size = sum(os.path.getsize(file) for files in spec.files() for file in files)
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if size > LITTLE_BYTES else 1


@contextmanager
def _workers(spec: StoreSpec, folder: Path, processes: int) -> Iterator[Callable[[Chunk], Future[Counts]]]:
    """Yield what tokenises a chunk: here, or in other processes."""
    tokeniser = Tokeniser(spec, folder)  # here too, so that a bad tokenizer is told of once, and at once
    if processes == 1:
        yield lambda chunk: _done(tokeniser.write(chunk))
        return
    context = multiprocessing.get_context("forkserver")  # imports once, then forks, and has no threads
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(processes, context, _start_worker, (spec, folder))
    try:
        yield lambda chunk: pool.submit(_work, chunk)
    except BrokenProcessPool as error:
        raise InputError(
            f"{', '.join(spec.sources)}: a process that tokenised was killed, perhaps for want of memory: "
            "use fewer processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _done(counts: Counts) -> Future[Counts]:
    future: Future[Counts] = Future()
    future.set_result(counts)
    return future


_worker: Tokeniser | None = None


def _start_worker(spec: StoreSpec, folder: Path) -> None:
    """Make this process a worker: one core, gone when its parent is."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    _worker = Tokeniser(spec, folder)


def _end_with(parent: Any) -> None:
    wait([parent.sentinel])
    os._exit(1)


def _work(chunk: Chunk) -> Counts:
    assert _worker is not None
    return _worker.write(chunk)


@contextmanager
def _progress() -> Iterator[Callable[[Counts], None]]:
    """Yield what shows the counts so far, on a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("Tokenising {task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task, started = progress.add_task("", total=None, text=""), time.monotonic()

        def say(total: Counts) -> None:
            rate = total.tokens / max(time.monotonic() - started, 1e-3)
            progress.update(
                task, text=f"{total.samples:,} samples, {total.tokens:,} tokens, {rate:,.0f} tokens/s"
            )

        yield say


# Joining: parts in, columns and manifest out.
class _Column:
    """One file of the store, hashed while it is written."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file: IO[bytes] = _create(folder / f"{name}.bin")
        self._type, self._digest, self.bytes = COLUMNS[name], hashlib.sha256(), 0

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, values: Any) -> None:
        values = np.ascontiguousarray(values, dtype=self._type)
        self._file.write(values)
        self._digest.update(values)
        self.bytes += values.nbytes

    def finish(self) -> str:
        """Write everything down to the disk, as a store that has its name is whole; return the hash."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest()


def _create(file: Path) -> IO[bytes]:
    return open(file, "wb")


@dataclass(slots=True)
class _Ends:
    """Where the parts so far end."""

    tokens: int = 0
    completions: int = 0


def _join(work: Work, parts: int, spec: StoreSpec, manifest: dict[str, Any]) -> None:
    """Join the parts into the store's columns, and write its manifest."""
    work.store.mkdir()
    sources = [Counts() for _ in spec.sources]
    ends = _Ends()
    with ExitStack() as stack:
        names = COLUMNS_OF_KIND[manifest["kind"]]
        columns = {name: stack.enter_context(_Column(work.store, name)) for name in names}
        columns["offsets"].add([0])
        if "completion_offsets" in columns:
            columns["completion_offsets"].add([0])
        for index in range(parts):
            part = read_part(part_file(work.parts, index))
            if part is None:
                raise OSError(f"{part_file(work.parts, index)} was harmed while it was needed")
            header, values = part
            source = header["chunk"][0]
            sources[source].add(counts_of(header))
            _append(columns, values, source, ends)
            work.still_alive()
        hashes = {name: column.finish() for name, column in columns.items()}
    total = Counts()
    for counts in sources:
        total.add(counts)
    assert ends.tokens == total.tokens
    manifest |= {
        **_told(total),
        "largest_token": total.largest_token,
        "examples": total.examples,
        "sources": [
            {"path": path, **_told(counts)} for path, counts in zip(spec.sources, sources, strict=True)
        ],
        "bytes": {name: column.bytes for name, column in columns.items()},
        "sha256": hashes,
    }
    with open(work.store / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2, ensure_ascii=True)
        file.flush()
        os.fsync(file.fileno())


def _told(counts: Counts) -> dict[str, int]:
    return {name: getattr(counts, name) for name in ("samples", "tokens", "scored_tokens", *LEFT_OUT)}


def _append(columns: dict[str, _Column], part: dict[str, np.ndarray], source: int, ends: _Ends) -> None:
    made = {
        "offsets": ends.tokens + np.cumsum(part["lengths"]),
        "sources": np.full(len(part["lengths"]), source),
        "completion_offsets": ends.completions + np.cumsum(part["completion_counts"]),
    }
    for name, column in columns.items():
        column.add(made[name] if name in made else part[name])
    ends.tokens += int(part["lengths"].sum())
    ends.completions += int(part["completion_counts"].sum())
