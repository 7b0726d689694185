"""Save a sharded checkpoint, synchronously or in the background. The write is atomic.

Four stages. *Begin* (collective): rank 0 creates a hidden folder, all ranks plan with megatron-core. *Copy* (each rank
on a thread): what training will change goes to host memory; gradients may be computed meanwhile, the update waits.
*Write* (on threads): the optimizer's state is gathered, and each rank writes its files, hashed on the way and forced
onto the disk. *Finish* (collective): if every rank has written, rank 0 adds the metadata and renames the folder.
Threads, not processes: no writer outlives a killed rank.
"""

from __future__ import annotations

import io
import json
import os
import pickle
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
from megatron_align.checkpoint.folder import ASSETS, CARD, STATE, folder_taken
from megatron_align.checkpoint.host_optimizer_state import SaveableOptimizer
from megatron_align.checkpoint.save_plan import (
    RankSavePlan,
    SavedCritic,
    SaveItem,
    SavePlanCache,
    unwrap,
    with_exact_storage,
)
from megatron_align.checkpoint.torch_metadata import (
    COMMON,
    FORMAT_FILE,
    FORMAT_OF_STATE,
    METADATA,
    OPTIMIZER,
)
from megatron_align.errors import one_line
from megatron_align.hf.assets import AssetChanges, write_assets
from megatron_align.model.families import ModelShape
from megatron_align.model.policy import Policy
from megatron_align.storage.atomic_write import CommitFailed, commit_folder, files_below, partial_folder
from megatron_align.storage.checksums import HashingFile, hash_files, without_zip_checksums, write_checksums
from megatron_align.storage.deletion import discard


class SaveFailed(OSError):
    """A checkpoint could not be written; raised on all ranks. Its files are deleted, unless only renaming failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointContent:
    """The content of a checkpoint to be saved, on this rank.

    Args:
        model: this rank's chunks.
        optimizer: None: weights only.
        metadata: see :func:`card.make_checkpoint_metadata`.
        assets: HF folder whose config and tokenizer are copied.
        reference: chunks of a reference model that training updates.
        critic: of objective ppo; None: there is none.
        changes: of training in the copied files.
    """

    model: Sequence[Policy | DistributedDataParallel]
    optimizer: SaveableOptimizer | None
    metadata: dict[str, Any]
    assets: Path
    reference: Sequence[Policy] | None = None
    critic: SavedCritic | None = None
    changes: AssetChanges = AssetChanges()


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was written."""

    step: int
    folder: Path
    bytes: int
    pause_seconds: float  # for which training was blocked
    seconds: float  # from the beginning until the folder was renamed


@dataclass(frozen=True, slots=True)
class _WrittenFiles:
    """The files that one rank wrote: checksums by path, byte ranges by tensor."""

    checksums: dict[str, str]
    locations: dict[MetadataIndex, _StorageInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SaveJob:
    """What this rank copies and writes for a save."""

    step: int
    folder: Path
    partial: Path
    plan: RankSavePlan
    copies: list[tuple[Tensor, Tensor]]  # (host memory, original)
    optimizers: list[SaveableOptimizer]
    small_files: dict[str, bytes]  # content by path; empty but on rank 0
    assets: Path
    changes: AssetChanges
    shape: ModelShape


@dataclass(slots=True, kw_only=True)
class _PendingSave:
    """A save between its stages."""

    job: _SaveJob
    copied: Future[None]
    written: Future[_WrittenFiles]
    started: float
    pause: float


class Saver:
    """Save one checkpoint at a time; every rank has a saver and makes the same calls.

    Args:
        background: write while training continues. Needs host memory for a copy of this rank's part, kept for the
            next save.
        before: called on rank 0 before each save, to force rows onto the disk; its OSError fails the save.
        taken_by: called on rank 0 before anything is created, renamed or deleted: returns which process took the
            run's folder from this one, or None. The save then ends without touching the folder.
    """

    def __init__(
        self,
        background: bool = False,
        before: Callable[[], None] = lambda: None,
        taken_by: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.background, self._before, self._taken_by = background, before, taken_by
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._plans = SavePlanCache()
        self._host_copies: dict[MetadataIndex, Tensor] = {}
        # copies concurrently with training
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._pending: _PendingSave | None = None

    @property
    def pending(self) -> bool:
        """Whether a save has begun and is not finished."""
        return self._pending is not None

    def written(self) -> bool:
        """Return whether this rank's writer has finished the pending save (successfully or not)."""
        return self._pending is not None and self._pending.written.done()

    def begin(self, folder: Path, content: CheckpointContent) -> None:
        """Begin to write a checkpoint; what it holds must not change until :meth:`wait_until_copied` returns.

        Without ``background``, not until :meth:`finish` returns. An existing ``folder`` is replaced.

        Raises:
            SaveFailed: on every rank, if the folder cannot be created.
            TrainingFault: on every rank, if another process took the run's folder.
        """
        assert self._pending is None, "one save at a time"
        started = time.perf_counter()
        partial, step = partial_folder(folder), content.metadata["step"]
        self._on_rank_0(partial, lambda: _create(partial, step, self._before))
        plan = self._plans.plan(content.model, content.optimizer, content.reference, content.critic)
        copies: list[tuple[Tensor, Tensor]] = []
        if self.background or torch.cuda.is_available():
            plan, copies = self._with_host_copies(plan)
        metadata = {**content.metadata, "optimizer": content.optimizer is not None}
        job = _SaveJob(
            step=step,
            folder=folder,
            partial=partial,
            plan=plan,
            copies=copies,
            optimizers=[
                *([] if content.optimizer is None else [content.optimizer]),
                *([] if content.critic is None else [content.critic.optimizer]),
            ],
            small_files=_small_files(metadata, plan.common),
            assets=content.assets,
            changes=content.changes,
            shape=unwrap(content.model)[0][0].shape,
        )
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        copied = self._pool.submit(_copy, job, self._stream)
        written = self._pool.submit(_write, job, copied, dist.get_rank())
        pause = time.perf_counter() - started
        self._pending = _PendingSave(job=job, copied=copied, written=written, started=started, pause=pause)

    def wait_until_copied(self) -> float:
        """Wait until training may change what the pending save holds, if there is one; return the seconds waited."""
        if self._pending is None:
            return 0.0
        started = time.perf_counter()
        self._pending.copied.result()
        waited = time.perf_counter() - started
        self._pending.pause += waited
        return waited

    def finish(self) -> Saved:
        """Wait for all ranks' writers, complete the checkpoint and rename its folder.

        Raises:
            SaveFailed: on every rank, if any of them could not write its part (a full disk, for example).
            TrainingFault: on every rank, if another process took the run's folder.
        """
        save, self._pending = self._pending, None
        assert save is not None, "no save has begun"
        resumed = time.perf_counter() if self.background else save.started + save.pause
        try:
            result: _WrittenFiles | OSError = save.written.result()
        except OSError as error:
            result = error
        results: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(result, results if dist.get_rank() == 0 else None)
        size = self._on_rank_0(save.job.partial, lambda: _complete(save.job, results))
        now = time.perf_counter()
        return Saved(save.job.step, save.job.folder, size, save.pause + now - resumed, now - save.started)

    def save(self, folder: Path, content: CheckpointContent) -> Saved:
        """Write a checkpoint and wait for it: :meth:`begin` and :meth:`finish`."""
        self.begin(folder, content)
        return self.finish()

    def _on_rank_0(self, partial: Path, call: Callable[[], Any]) -> Any:
        """Make a call that uses the disk on rank 0, if the folder is still the run's; return its result on every rank.

        Raises:
            SaveFailed: on every rank; the partial folder is deleted, which frees the space on a full disk, unless it is
                complete and could not be renamed.
            TrainingFault: on every rank, if another process took the run's folder; nothing is changed there.
        """
        answer: list[Any] = [None, None, None]  # result, reason of a failure, who took the folder
        if dist.get_rank() == 0:
            taken_by = self._taken_by()
            answer = [None, None, taken_by] if taken_by else self._attempt(partial, call)
        dist.broadcast_object_list(answer, src=0)
        result, failure, taken_by = answer
        if taken_by:
            raise folder_taken(taken_by)
        if failure is not None:
            raise SaveFailed(f"writing the checkpoint failed at {partial}: {failure}")
        return result

    def _attempt(self, partial: Path, call: Callable[[], Any]) -> list[Any]:
        """Make the call; return its result, the reason if it failed, and who has taken the folder meanwhile."""
        try:
            return [call(), None, None]
        except CommitFailed as error:
            remedy = "rename it before the next start of this run, which deletes it"
            return [None, f"{_reason(error)}; {remedy}", None]
        except OSError as error:
            # Once the folder is taken, the other run has deleted the files, and may write its own there.
            taken_by = self._taken_by()
            if not taken_by and os.path.lexists(partial):
                discard(partial)
            return [None, _reason(error), taken_by]

    def _with_host_copies(self, plan: RankSavePlan) -> tuple[RankSavePlan, list[tuple[Tensor, Tensor]]]:
        """Return the plan with host memory in place of the tensors that training changes, and the copies to make.

        The optimizer's state is not among them: ``host_state`` copies it, into memory that nothing else writes until
        the next save.
        """
        copies = []

        def in_host_memory(item: SaveItem) -> SaveItem:
            index, data = item[0].index, item[1]
            if not isinstance(data, Tensor) or not _is_changed_by_training(index, data):
                return item
            if index not in self._host_copies:
                self._host_copies[index] = torch.empty(
                    data.shape, dtype=data.dtype, device="cpu", pin_memory=data.is_cuda
                )
            copies.append((self._host_copies[index], data.detach()))
            return item[0], self._host_copies[index]

        buckets = [[in_host_memory(item) for item in bucket] for bucket in plan.buckets]
        return RankSavePlan(buckets, plan.metadata, plan.common), copies


def _is_changed_by_training(index: MetadataIndex, data: Tensor) -> bool:
    return data.is_cuda or not index.fqn.startswith(OPTIMIZER)


def _create(partial: Path, step: int, before: Callable[[], None]) -> None:
    """Force the rows onto the disk, and create the hidden folder, empty."""
    before()
    if os.path.lexists(partial):
        discard(partial)
    (partial / STATE).mkdir(parents=True)
    faults.at("save.begun", step)


def _small_files(metadata: dict[str, Any], common: dict[str, Any]) -> dict[str, bytes]:
    """Return the content of the small files that rank 0 writes, by path; empty on other ranks."""
    if dist.get_rank() != 0:
        return {}
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return {
        f"{STATE}/{COMMON}": buffer.getvalue(),
        f"{STATE}/{FORMAT_FILE}": json.dumps(FORMAT_OF_STATE).encode(),
        CARD: (json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode(),
    }


def _copy(job: _SaveJob, stream: torch.cuda.Stream | None) -> None:
    """Copy into host memory what this rank writes, or what it sends to the rank that writes it."""
    faults.at("save.copying", job.step)
    if stream:
        torch.cuda.set_device(stream.device)  # a new thread starts on device 0
    with torch.cuda.stream(stream):
        for copy, original in job.copies:
            copy.copy_(original, non_blocking=True)
        for optimizer in job.optimizers:
            optimizer.host_state.copy()
    if stream:
        stream.synchronize()


def _write(job: _SaveJob, copied: Future[None], rank: int) -> _WrittenFiles:
    """Write this rank's files; rank 0 also writes the small ones."""
    copied.result()
    for optimizer in job.optimizers:
        optimizer.host_state.gather()
    checksums: dict[str, str] = {}
    locations: dict[MetadataIndex, _StorageInfo] = {}
    paths = [job.partial / STATE / f"__{rank}_{number}.distcp" for number in range(len(job.plan.buckets))]
    with without_zip_checksums(), ThreadPoolExecutor(max(1, len(paths))) as pool:
        pending = [
            pool.submit(copy_context().run, _write_bucket, path, bucket, job.step)
            for path, bucket in zip(paths, job.plan.buckets, strict=True)
        ]
        for path, future in zip(paths, pending, strict=True):
            checksums[f"{STATE}/{path.name}"], locations_in_file = future.result()
            locations |= locations_in_file
    if rank == 0:
        checksums |= _write_small_files(job.partial, job.small_files)
        (job.partial / ASSETS).mkdir()
        write_assets(job.assets, job.partial / ASSETS, job.shape, job.changes)
        checksums |= hash_files(job.partial, files_below(job.partial, ASSETS))
    faults.at("save.written", job.step)
    return _WrittenFiles(checksums, locations)


def _write_bucket(
    path: Path, bucket: list[SaveItem], step: int
) -> tuple[str, dict[MetadataIndex, _StorageInfo]]:
    """Write one file; return its checksum, and the byte range of each item."""
    locations = {}
    with HashingFile(path) as file:
        for item, data in bucket:
            start = file.tell()
            if isinstance(data, io.BytesIO):
                file.write(data.getbuffer())
            else:
                file.save(with_exact_storage(data))
            locations[item.index] = _StorageInfo(path.name, start, file.tell() - start)
            faults.at("save.file", step)
        return file.finish(), locations


def _write_small_files(folder: Path, contents: dict[str, bytes]) -> dict[str, str]:
    """Write files; return their checksums by path."""
    checksums = {}
    for name, content in contents.items():
        with HashingFile(folder / name) as file:
            file.write(content)
            checksums[name] = file.finish()
    return checksums


def _complete(job: _SaveJob, results: list[_WrittenFiles | OSError]) -> int:
    """Write the metadata of all ranks' files and rename the folder; return the checkpoint's bytes. On rank 0."""
    written = []
    for rank, result in enumerate(results):
        if isinstance(result, OSError):
            raise OSError(f"rank {rank}: {_reason(result)}")
        written.append(result)
    metadata = job.plan.metadata
    assert metadata is not None, "rank 0 has the metadata"
    metadata.storage_data = {index: info for files in written for index, info in files.locations.items()}
    checksums = {name: checksum for files in written for name, checksum in files.checksums.items()}
    checksums |= _write_small_files(job.partial, {f"{STATE}/{METADATA}": pickle.dumps(metadata)})
    write_checksums(job.partial, checksums)
    size = sum((job.partial / name).stat().st_size for name in files_below(job.partial))
    commit_folder(job.partial, job.folder, job.step)
    return size


def _reason(error: OSError) -> str:
    reason = one_line(error.strerror or error, 1000)
    return f"{reason} in {error.filename}" if error.filename else reason
