"""Tokenise once, into a store that is complete or absent, keyed by everything that decides its content.

A JSONL record goes one way: ``formats.files`` reads it, :mod:`.record_blocks` puts it into a block, a process of
:mod:`.workers` tokenises the block with :mod:`.record_tokenizer` into a part file (:mod:`.part_files`), and
:mod:`.store_writer` joins the parts in order. So the store's bytes do not depend on the number of processes, memory
does not grow with the data, and a preparation that was killed is resumed from its parts.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_align.data.formats.columns import FieldUse
from megatron_align.data.store import MANIFEST, read_manifest
from megatron_align.data.tokenize.cache_key import StoreSpec, file_states, remember_hashes
from megatron_align.data.tokenize.part_files import Counts, counts_of, part_file, read_part
from megatron_align.data.tokenize.record_blocks import RecordBlock, read_blocks, read_shapes
from megatron_align.data.tokenize.store_writer import join_parts
from megatron_align.data.tokenize.work_dir import WorkDir
from megatron_align.data.tokenize.workers import completed, processes_of, tokenising
from megatron_align.errors import InputError
from megatron_align.storage.fsync import fsync

_log = logging.getLogger(__name__)


def prepare(spec: StoreSpec) -> Path:
    """Return the store of ``spec``, tokenising the data if there is none yet.

    Raises:
        InputError: for bad data or a bad tokenizer, a sample that is too long (``too_long`` error), no sample
            left, or a cache that cannot be written; names the file and line.
    """
    spec = spec.pinned()
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
    for line in read_manifest(path).get("warnings", ()):
        _log.warning("%s (logged once; other samples may be affected too)", line)
    return path


def _make(spec: StoreSpec, inputs: dict[str, Any], states: dict[str, str], path: Path) -> None:
    kind, shapes = read_shapes(spec)
    work = WorkDir(path)
    try:
        fields = FieldUse()
        total, parts = _tokenise(spec, work, fields)
        if file_states(spec) != states:
            raise InputError(
                f"{', '.join(spec.sources)}: must stay as they are while being tokenised, got changed files"
            )
        _require_samples(total, spec)
        described = {"kind": kind, "shapes": shapes, "fields": fields.in_manifest()}
        join_parts(work, parts, spec, {**inputs, **described})
        _publish(work.store, path)
    except (InputError, OSError):
        work.remove()
        raise
    except BaseException:  # interrupted: the next run resumes from this folder
        work.leave()
        raise
    work.remove()


def _publish(unfinished: Path, path: Path) -> None:
    """Rename the finished store to its final name; another machine may have been faster, with the same content."""
    fsync(unfinished)  # its files are already
    try:
        unfinished.rename(path)
    except OSError:
        if not (path / MANIFEST).is_file():
            raise
    fsync(path.parent)


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


def _tokenise(spec: StoreSpec, work: WorkDir, fields: FieldUse) -> tuple[Counts, int]:
    """Write every missing part, and note the records' fields; return the counts, and the number of parts.

    An error that is raised is the first in the order of the records.
    """
    failed: list[InputError] = []
    total, parts = Counts(), 0
    processes = processes_of(spec)
    with tokenising(spec, work.parts, processes) as submit, _progress() as show:
        pending: deque[Future[Counts]] = deque()

        def finish(at_most: int) -> None:
            while len(pending) > at_most:
                total.add(pending.popleft().result())
                show(total)

        for block in read_blocks(spec, failed, fields):
            pending.append(_reuse(work, block) or submit(block))
            parts = block.index + 1
            finish(2 * processes)
        finish(0)
    if failed:
        raise failed[0]
    if fields.null_arguments:
        _log.warning(
            "%s: nulls in the arguments of tool calls are left out, here and in later records: Arrow writes them for "
            "fields that other calls have; to train on a null give the arguments as JSON text",
            fields.null_arguments,
        )
    return total, parts


def _reuse(work: WorkDir, block: RecordBlock) -> Future[Counts] | None:
    """Return the counts of the block's part if an earlier preparation finished it."""
    part = read_part(part_file(work.parts, block.index))
    if part is None or part[0].get("block") != block.key():
        return None
    return completed(counts_of(part[0]))


@contextmanager
def _progress() -> Iterator[Callable[[Counts], None]]:
    """Yield a function that shows the counts so far, on a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("Tokenising {task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task, started = progress.add_task("", total=None, text=""), time.monotonic()

        def show(total: Counts) -> None:
            rate = total.tokens / max(time.monotonic() - started, 1e-3)
            progress.update(
                task, text=f"{total.samples:,} samples, {total.tokens:,} tokens, {rate:,.0f} tokens/s"
            )

        yield show
