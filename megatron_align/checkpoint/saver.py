"""Writing a checkpoint from all ranks: at once, or behind training's back. It appears whole or not at all.

Four stages. *Begin* (all ranks together): a hidden folder and megatron-core's plan. *Copy* (each rank alone, in a
thread): what training will change; gradients may be computed meanwhile, the update waits. *Write* (in threads): the
optimizer's state is gathered, and each rank writes its files, hashed on the way and forced onto the disk. *Finish*
(together again): if every rank has written, rank 0 adds what describes the whole and gives the folder its name.
Threads, not processes: a killed rank leaves nobody behind who still writes.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_align import faults
from megatron_align.checkpoint.folder import ASSETS, CARD, STATE
from megatron_align.checkpoint.metadata import COMMON, FORMAT_FILE, FORMAT_OF_STATE, METADATA
from megatron_align.checkpoint.optimizer_state import HostedOptimizer
from megatron_align.checkpoint.save_plan import Item, Planned, Planner, exact, unwrap
from megatron_align.hf.writer import copy_assets, write_config_architecture
from megatron_align.model.families import ModelShape
from megatron_align.model.policy import Policy
from megatron_align.storage.atomic_write import files_below, partial_folder, put_in_place
from megatron_align.storage.checksums import HashingFile, hash_files, without_checksums_of_zip, write_sums


class SaveFailed(OSError):
    """A checkpoint could not be written, by any of the ranks; all of them get it, and nothing of it is left."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was written."""

    step: int
    folder: Path
    bytes: int
    pause_seconds: float  # training stood still
    seconds: float  # from the beginning until it had its name


@dataclass(frozen=True, slots=True)
class _Written:
    """What one rank wrote: hashes by path, places by tensor."""

    sums: dict[str, str]
    places: dict[MetadataIndex, _StorageInfo]


@dataclass(slots=True, kw_only=True)
class _Job:
    """A save between its stages."""

    step: int
    folder: Path
    partial: Path
    planned: Planned
    copies: list[tuple[Tensor, Tensor]]  # where to, where from
    optimizer: HostedOptimizer | None
    small: dict[str, bytes]  # rank 0's small files, by path
    assets: Path
    shape: ModelShape
    started: float
    pause: float = 0.0
    copied: Future[None] | None = None
    future: Future[_Written] | None = None


class Saver:
    """Saves one checkpoint at a time; every rank has one and calls it alike.

    Args:
        background: write while training goes on. Costs host memory for a copy of this rank's part, kept for the next.
        before: what rank 0 must have on the disk before a save; its OSError is one of the save.
    """

    def __init__(self, background: bool = False, before: Callable[[], None] | None = None) -> None:
        self.background, self._before = background, before or (lambda: None)
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._planner = Planner()
        self._copies: dict[MetadataIndex, Tensor] = {}
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # copies beside training
        self._job: _Job | None = None

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not finished."""
        return self._job is not None

    def written(self) -> bool:
        """Tell whether this rank's files of the pending save are written, well or not."""
        return self._job is not None and self._job.future.done()

    def begin(
        self,
        folder: Path,
        model: Sequence[Policy | DistributedDataParallel],
        optimizer: HostedOptimizer | None,
        card: dict[str, Any],
        assets: Path,
        reference: Sequence[Policy] | None = None,
    ) -> None:
        """Begin to write a checkpoint: nothing that it holds may change before it is copied.

        That is when :meth:`wait_until_copied` returns; with ``background`` off, when :meth:`finish` does.

        Args:
            folder: of the checkpoint; one that exists is replaced by the new one.
            model: this rank's chunks.
            optimizer: None for weights only.
            card: see :func:`sharded.make_card`.
            assets: HF folder whose small files go with the weights.
            reference: chunks of a second model that training moves too.

        Raises:
            SaveFailed: on every rank, if the folder cannot be made.
        """
        assert self._job is None, "one save at a time"
        started = time.perf_counter()
        partial = partial_folder(folder)
        _on_rank_0(partial, lambda: (self._before(), _make(partial, card["step"])))
        planned, copies = self._planner.plan(model, optimizer, reference), []
        if self.background or torch.cuda.is_available():
            planned, copies = self._detach(planned)
        self._job = job = _Job(
            step=card["step"],
            folder=folder,
            partial=partial,
            planned=planned,
            copies=copies,
            optimizer=optimizer,
            small=_small_files({**card, "optimizer": optimizer is not None}, planned.common),
            assets=assets,
            shape=unwrap(model)[0][0].shape,
            started=started,
        )
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        job.copied = self._pool.submit(_copy, job, self._stream)
        job.future = self._pool.submit(_write, job, dist.get_rank())
        job.pause = time.perf_counter() - started

    def wait_until_copied(self) -> float:
        """Wait until training may change what the pending save holds, if one is; return for how many seconds."""
        if self._job is None:
            return 0.0
        started = time.perf_counter()
        self._job.copied.result()
        waited = time.perf_counter() - started
        self._job.pause += waited
        return waited

    def finish(self) -> Saved:
        """Wait for all ranks' writers and give the checkpoint its name.

        Raises:
            SaveFailed: on every rank, if any of them could not write its part (a full disk).
        """
        job, self._job = self._job, None
        assert job is not None, "no save has begun"
        resumed = time.perf_counter() if self.background else job.started + job.pause
        try:
            answer: _Written | OSError = job.future.result()
        except OSError as error:
            answer = error
        answers: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(answer, answers if dist.get_rank() == 0 else None)
        size = _on_rank_0(job.partial, lambda: _commit(job, answers))
        now = time.perf_counter()
        return Saved(job.step, job.folder, size, job.pause + now - resumed, now - job.started)

    def save(self, *arguments: Any, **options: Any) -> Saved:
        """Begin and finish, see there."""
        self.begin(*arguments, **options)
        return self.finish()

    def _detach(self, planned: Planned) -> tuple[Planned, list[tuple[Tensor, Tensor]]]:
        """Return the plan with host memory of this saver's own where training could change what is written.

        Also returns what must be copied: pairs of such memory and the tensor that it stands for. The optimizer's state
        is copied by the optimizer itself, into host memory that nobody else writes until the next save.
        """
        copies = []

        def detached(item: Item) -> Item:
            index, data = item[0].index, item[1]
            if not _changes(index, data):
                return item
            if index not in self._copies:
                self._copies[index] = torch.empty(
                    data.shape, dtype=data.dtype, device="cpu", pin_memory=data.is_cuda
                )
            copies.append((self._copies[index], data.detach()))
            return item[0], self._copies[index]

        buckets = [[detached(item) for item in bucket] for bucket in planned.buckets]
        return Planned(buckets, planned.metadata, planned.common), copies


def _changes(index: MetadataIndex, data: Tensor | io.BytesIO) -> bool:
    return isinstance(data, Tensor) and (data.is_cuda or not index.fqn.startswith("optimizer."))


def _make(partial: Path, step: int) -> None:
    """Make the hidden folder, empty."""
    shutil.rmtree(partial, ignore_errors=True)
    (partial / STATE).mkdir(parents=True)
    faults.at("save.begun", step)


def _small_files(card: dict[str, Any], common: dict[str, Any]) -> dict[str, bytes]:
    """Return the content of the files that rank 0 writes at once, by path."""
    if dist.get_rank() != 0:
        return {}
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return {
        f"{STATE}/{COMMON}": buffer.getvalue(),
        f"{STATE}/{FORMAT_FILE}": json.dumps(FORMAT_OF_STATE).encode(),
        CARD: (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _copy(job: _Job, stream: torch.cuda.Stream | None) -> None:
    """Copy what this rank writes, or hands to the rank that does, into host memory."""
    faults.at("save.copying", job.step)
    if stream:
        torch.cuda.set_device(stream.device)  # a thread starts on the first
    with torch.cuda.stream(stream):
        for copy, original in job.copies:
            copy.copy_(original, non_blocking=True)
        if job.optimizer is not None:
            job.optimizer.copy_state()
    if stream:
        stream.synchronize()


def _write(job: _Job, rank: int) -> _Written:
    """Write this rank's files, and rank 0's small ones."""
    job.copied.result()
    if job.optimizer is not None:
        job.optimizer.gather_state()
    sums: dict[str, str] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    paths = [job.partial / STATE / f"__{rank}_{number}.distcp" for number in range(len(job.planned.buckets))]
    with without_checksums_of_zip(), ThreadPoolExecutor(max(1, len(paths))) as pool:
        found = [
            pool.submit(copy_context().run, _write_bucket, path, bucket, job.step)
            for path, bucket in zip(paths, job.planned.buckets, strict=True)
        ]
        for path, future in zip(paths, found, strict=True):
            sums[f"{STATE}/{path.name}"], of_file = future.result()
            places |= of_file
    if rank == 0:
        sums |= _write_small(job.partial, job.small)
        (job.partial / ASSETS).mkdir()
        copy_assets(job.assets, job.partial / ASSETS)
        write_config_architecture(job.partial / ASSETS, job.shape)
        sums |= hash_files(job.partial, files_below(job.partial, ASSETS))
    faults.at("save.written", job.step)
    return _Written(sums, places)


def _write_bucket(path: Path, bucket: list[Item], step: int) -> tuple[str, dict[MetadataIndex, _StorageInfo]]:
    places = {}
    with HashingFile(path) as file:
        try:
            for item, data in bucket:
                start = file.tell()
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    torch.save(exact(data), file)
                places[item.index] = _StorageInfo(path.name, start, file.tell() - start)
                faults.at("save.file", step)
        except RuntimeError as error:  # torch's own, about its writer, in place of the file's
            raise file.error or error from error
        return file.finish(), places


def _write_small(folder: Path, contents: dict[str, bytes]) -> dict[str, str]:
    sums = {}
    for name, content in contents.items():
        with HashingFile(folder / name) as file:
            file.write(content)
            sums[name] = file.finish()
    return sums


def _commit(job: _Job, answers: list[_Written | OSError]) -> int:
    """Describe what all ranks wrote and give it its name; return the bytes of it all. On rank 0."""
    for rank, answer in enumerate(answers):
        if isinstance(answer, OSError):
            raise OSError(f"rank {rank}: {_reason(answer)}")
    metadata = job.planned.metadata
    metadata.storage_data = {index: info for answer in answers for index, info in answer.places.items()}
    sums = {name: digest for answer in answers for name, digest in answer.sums.items()}
    sums |= _write_small(job.partial, {f"{STATE}/{METADATA}": pickle.dumps(metadata)})
    write_sums(job.partial, sums)
    size = sum((job.partial / name).stat().st_size for name in files_below(job.partial))
    put_in_place(job.partial, job.folder, job.step)
    return size


def _on_rank_0(partial: Path, call: Callable[[], Any]) -> Any:
    """Let rank 0 do something with the disk; every rank gets what it returns.

    Raises:
        SaveFailed: on every rank; what was written is removed, which gives a full disk its space back.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = call()
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            answer[1] = _reason(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise SaveFailed(f"writing the checkpoint failed at {partial}: {answer[1]}")
    return answer[0]


def _reason(error: OSError) -> str:
    reason = " ".join(str(error.strerror or error).split())[:300] or type(error).__name__
    return f"{reason} in {error.filename}" if error.filename else reason
