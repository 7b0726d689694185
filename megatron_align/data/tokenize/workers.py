"""Tokenise blocks of records into part files, in this process or in a pool of others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.part_files import Counts, part_columns, part_file, write_part
from megatron_align.data.tokenize.record_blocks import RecordBlock
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError
from megatron_align.records import Preference, Record, Sample

SMALL_BYTES = 16_000_000  # one process has tokenised this before others have started
MAX_PROCESSES = 16  # more than one reading process can keep busy


class BlockTokenizer:
    """Tokenises blocks into part files in ``folder``."""

    def __init__(self, spec: StoreSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self._warnings: dict[str, str] = {}  # of the block being tokenised
        self._tokenizer = RecordTokenizer(
            load_tokenizer(spec.tokenizer), spec.template(), spec.turn_options(), self._warnings.__setitem__
        )

    def write(self, block: RecordBlock) -> Counts:
        """Tokenise a block into its part.

        Raises:
            InputError: for a bad record (``on_bad_record: error``) or one that is too long (``too_long: error``).
        """
        counts = Counts()
        for line in block.skipped:
            counts.note("skipped", line)
        samples = [s for s in (self._sample(record, counts) for record in block.records) if s is not None]
        columns = part_columns(samples)
        counts.warnings = dict(self._warnings)
        self._warnings.clear()
        counts.samples, counts.tokens = len(samples), len(columns["tokens"])
        counts.scored_tokens = int(columns["scored"].sum())
        counts.largest_token = int(columns["tokens"].max(initial=0))
        write_part(part_file(self.folder, block.index), block.key(), counts, columns)
        return counts

    def _sample(self, record: Record, counts: Counts) -> Sample | None:
        try:
            sample = self._tokenizer.sample(record)
        except InputError as error:
            if self.spec.on_bad_record == "error":
                raise
            counts.note("skipped", str(error))
            return None
        return _fit(sample, record, self.spec, counts)


def _fit(sample: Sample, record: Record, spec: StoreSpec, counts: Counts) -> Sample | None:
    """Apply ``too_long``; None: the sample is left out."""
    length, limit = len(sample.tokens_L), spec.sequence_length
    if length <= limit:
        return sample
    line = f"{record.where}: {length} tokens"
    if spec.too_long == "error":
        raise InputError(
            f"{record.where}: a sample must fit in data.sequence_length = {limit} tokens, got {length}; "
            "raise it, or set data.too_long to drop or truncate"
        )
    if spec.too_long == "truncate" and not isinstance(record, Preference) and sample.scored_L[:limit].any():
        counts.note("truncated", line)
        return replace(sample, tokens_L=sample.tokens_L[:limit], scored_L=sample.scored_L[:limit])
    counts.note("dropped", line)
    counts.note_dropped_length(length)
    return None


def processes_of(spec: StoreSpec) -> int:
    """Return the number of tokenising processes: as configured, or one per core, or 1 for little data."""
    if spec.processes is not None:
        return spec.processes
    size = sum(os.path.getsize(file) for files in spec.files() for file in files)
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES) if size > SMALL_BYTES else 1


@contextmanager
def tokenising(
    spec: StoreSpec, folder: Path, processes: int
) -> Iterator[Callable[[RecordBlock], Future[Counts]]]:
    """Yield a function that tokenises a block: in this process, or in a pool of ``processes``."""
    # Built in this process too: a bad tokenizer is reported once, and at once.
    tokenizer = BlockTokenizer(spec, folder)
    if processes == 1:
        yield lambda block: completed(tokenizer.write(block))
        return
    # A fork server imports everything once and has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, f"{__package__}.unblock_interrupts"])
    # Ctrl-C is this process's to handle: the server inherits a mask, as it would print tracebacks while it imports.
    resource_tracker.ensure_running()  # the server starts it too, and would then lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pool = ProcessPoolExecutor(processes, context, _start_worker, (spec, folder))
    interrupted = False
    try:
        yield lambda block: pool.submit(_work, block)
    except KeyboardInterrupt:
        interrupted = True  # the workers end with this process
        raise
    except BrokenProcessPool as error:
        raise InputError(
            f"{', '.join(spec.sources)}: a tokenising process was killed, perhaps out of memory: "
            "use fewer processes"
        ) from error
    finally:
        pool.shutdown(wait=not interrupted, cancel_futures=True)


def completed(counts: Counts) -> Future[Counts]:
    """Return a future that is done."""
    future: Future[Counts] = Future()
    future.set_result(counts)
    return future


_worker: BlockTokenizer | None = None


def _start_worker(spec: StoreSpec, folder: Path) -> None:
    """Initialise a worker process: one core, ends when its parent does."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    threading.Thread(target=_exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    _worker = BlockTokenizer(spec, folder)


def _exit_with(parent: Any) -> None:
    wait([parent.sentinel])
    os._exit(1)


def _work(block: RecordBlock) -> Counts:
    assert _worker is not None
    return _worker.write(block)
