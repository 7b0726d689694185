"""Cached likeliest tokens of the reference and their logits, for objectives on them: K of each scored token of a store.

Two files in the folder of the cached log-probs. One has a row of each scored token, ``4 K`` bytes of tokens (int32) and
as many of logits in the run's precision, ``2 K`` in bf16: 3.0 kB at K = 500. They are kept at temperature 1, where they
have the bits of the reference's output layer, so that a policy with the same weights has the same logits, bit for bit.
Rows are written in place, as the file may be larger than memory, and read through a map. The other file is a
:class:`.Column`: the CRC-32 of each completion's rows, saved after they are on the disk. Rows without one do not count.

Shapes: N scored tokens and C completions of a pack, S completions of a step, K tokens of a row.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.config import RunConfig
from megatron_align.data.batching.step_batches import Step, StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.model.parallel import all_reduce_sum, failing_together, is_metric_rank
from megatron_align.objectives.base import Objective
from megatron_align.records import LossRows
from megatron_align.storage.folder_lock import FolderLock
from megatron_align.storage.fsync import fsync_open
from megatron_align.training.reference.cache import (
    Column,
    broadcast,
    cache_folder,
    computed_steps,
    missing_steps,
    shape_key,
)
from megatron_align.training.reference.logprobs import CachedReference
from megatron_align.training.reference_model import ReferenceModel
from megatron_align.training.scoring import Scorer, gather_step
from megatron_align.training.setup import RunSetup
from megatron_align.training.watchdog import Watchdog

LOGITS = {"bf16": "<u2", "fp32": "<f4"}  # by train.precision; numpy has no bf16: its bits


@dataclass(frozen=True, slots=True)
class TopKColumns:
    """The cached tokens and logits of one split of a run.

    Args:
        key: what the rows depend on, by name.
        checksums: CRC-32 of each completion's rows, NaN where they are not computed yet.
        file: of the rows.
        row: type of a row, with the fields ``tokens`` and ``logits``.
        first_row_C: number of the first row of each completion, and that of all rows at the end.
    """

    key: dict[str, Any]
    checksums: Column
    file: Path
    row: np.dtype
    first_row_C: np.ndarray

    @classmethod
    def open_all(
        cls, setup: RunSetup, config: RunConfig, objective: Objective, weights: str
    ) -> dict[str, TopKColumns]:
        """Open the rows of training and validation data, see :meth:`open`. Collective.

        Args:
            setup: of the run.
            config: of the run.
            objective: of the run.
            weights: hash of the reference's weights.
        """
        stores = {"train": setup.train, "validation": setup.validation}
        opened: dict[str, TopKColumns] = {}
        of_stores: dict[str, TopKColumns] = {}  # both splits may be the same data: their rows are one file
        for split, store in stores.items():
            if isinstance(store, TokenStore):
                name = store.path.name
                if name not in of_stores:
                    of_stores[name] = cls.open(store, config, objective.top_k, weights, setup.reference)
                opened[split] = of_stores[name]
        return opened

    @classmethod
    def open(
        cls, store: TokenStore, config: RunConfig, top_k: int, weights: str, reference: ReferenceModel
    ) -> TopKColumns:
        """Open the rows of a store, or start a file without any. Collective; rank 0 checks what is there.

        Args:
            store: of the data.
            config: of the run.
            top_k: tokens of each row.
            weights: hash of the reference's weights.
            reference: whose tokens that the policy lacks are in no row.

        Raises:
            InputError: on every rank: a file is corrupt, or not every rank sees the same files.
        """
        key = {
            "weights": weights,
            "shape": shape_key(reference.shape),
            "precision": config.train.arithmetic,
            "data": store.path.name,
            "top_k": top_k,
        }
        if reference.shared_tokens is not None:
            key["tokens"] = reference.shared_tokens
        row = np.dtype([("tokens", "<i4", (top_k,)), ("logits", LOGITS[config.train.precision], (top_k,))])
        first_row_C = np.concatenate([[0], np.cumsum(store.completion_scored)])
        checksums = Column.open(cache_folder(config), key, len(first_row_C) - 1)
        columns = cls(key, checksums, checksums.file.with_suffix(".rows"), row, first_row_C)
        broadcast(checksums)
        with failing_together():
            if dist.get_rank() == 0:
                columns._check_or_start()
        [blind] = all_reduce_sum([float(not columns.file.exists())])
        if blind:
            raise InputError(
                f"the reference's likeliest tokens must be in one folder for all machines: {blind:.0f} ranks do not "
                f"see {columns.file}; set data.cache to a folder of a shared file system"
            )
        return columns

    @property
    def size(self) -> int:
        """Bytes of the file of all rows."""
        return int(self.first_row_C[-1]) * self.row.itemsize

    @property
    def _remedy(self) -> str:
        return f"delete it and {self.checksums.file.name}: they will be computed again"

    def added_to(self, store: TokenStore) -> TokenStore:
        """Return the store with two further columns of its targets, which are read from the file when needed."""
        rows_N = self._mapped()
        return store.with_row_columns({f"reference_{name}": rows_N[name] for name in ("tokens", "logits")})

    def reference(self) -> CachedReference:
        """Return the reference whose values come with the packs."""
        return CachedReference()

    def missing(self, steps: StepBatches, wanted: range) -> list[int]:
        """Return the steps of ``wanted`` with rows that neither the file nor earlier steps of the list provide."""
        return missing_steps(self.checksums.values_K, steps, wanted)

    def fill(
        self,
        steps: StepBatches,
        missing: list[int],
        scorer: Scorer,
        groups: ProcessGroupCollection,
        watchdog: Watchdog,
    ) -> None:
        """Compute the rows of some steps with a model that holds the reference's weights; every rank writes its own.

        The packs are those of training, see :meth:`.ReferenceColumns.fill`.

        Raises:
            InputError: on every rank: another run computes them, the disk refuses them, or a logit is not finite.
        """
        if dist.get_rank() == 0:
            size = f"{self.size / 1e6:,.1f} MB" if self.size < 1e9 else f"{self.size / 1e9:,.1f} GB"
            print(f"computing the reference's likeliest tokens: up to {size} in {self.file}", flush=True)
        with self._locked(), _opened(self.file) as file:
            for step in computed_steps(steps, missing, "Reference logits", watchdog, self._save):
                self._fill_step(step, scorer, groups, file)
        dist.barrier()

    def _fill_step(self, step: Step, scorer: Scorer, groups: ProcessGroupCollection, file: int) -> None:
        of_packs = scorer.collect(step.batches, self._on_host)
        checksums = []
        with failing_together():
            if of_packs and is_metric_rank(groups):  # the other ranks have computed the same
                for rows_N, places, batch in zip(of_packs, step.packs.completions, step.batches, strict=True):
                    checksums.append(self._write(file, rows_N, step.stored_C[places], batch.rows))
                fsync_open(file, self.file, times=False)
        values_S = gather_step(checksums, step.packs, step, groups)
        self.checksums.values_K[step.stored_C] = values_S.numpy()

    def _on_host(self, values_2NK: Tensor, rows: LossRows) -> np.ndarray:
        """Return the rows of a pack as they are in the file."""
        tokens_NK, logits_NK = values_2NK
        rows_N = np.empty(len(tokens_NK), self.row)
        rows_N["tokens"] = tokens_NK.to(torch.int32).cpu().numpy()
        if self.row["logits"].base == np.uint16:
            rows_N["logits"] = logits_NK.bfloat16().cpu().view(torch.int16).numpy().view(np.uint16)
        else:
            rows_N["logits"] = logits_NK.cpu().numpy()
        return rows_N

    def _write(self, file: int, rows_N: np.ndarray, stored_C: np.ndarray, rows: LossRows) -> Tensor:
        """Write the rows of a pack, completion by completion; return their checksums ``[C]``."""
        checksums, start = [], 0
        for stored, count in zip(stored_C.tolist(), rows.completions.length_C.tolist(), strict=True):
            part, start = rows_N[start : start + count], start + count
            if not _finite(part["logits"]):
                raise InputError(f"the reference's logits must be finite, got others at sample {stored + 1}")
            content, at = memoryview(part.tobytes()), int(self.first_row_C[stored]) * self.row.itemsize
            checksums.append(zlib.crc32(content))
            while content:
                written = os.pwrite(file, content, at)
                content, at = content[written:], at + written
        return torch.tensor(checksums, dtype=torch.float64)

    def _check_or_start(self) -> None:
        """Compare the rows that count with their checksums, or create the file; on rank 0."""
        computed = np.flatnonzero(~np.isnan(self.checksums.values_K))
        if not len(computed):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "ab") as out:
                out.truncate(self.size)  # holes: no disk space yet
            return
        found = self.file.stat().st_size if self.file.exists() else None
        if found != self.size:
            raise InputError(
                f"cached likeliest tokens of the reference must have {self.size} bytes, got {found} in {self.file}; "
                f"{self._remedy}"
            )
        rows_N = self._mapped()
        for stored in computed:
            content = rows_N[self.first_row_C[stored] : self.first_row_C[stored + 1]].tobytes()
            if zlib.crc32(content) != self.checksums.values_K[stored]:
                raise InputError(
                    "cached likeliest tokens of the reference are corrupt: CRC-32 mismatch at completion "
                    f"{stored + 1} in {self.file}; {self._remedy}"
                )

    def _mapped(self) -> np.ndarray:
        return np.memmap(self.file, dtype=self.row, mode="r", shape=(int(self.first_row_C[-1]),))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other runs from writing these rows inside a with-block. Collective."""
        lock = FolderLock(
            self.file.with_suffix(".lock"),
            f"{self.file} is being computed by another run",
            "start this run when that one trains",
        )

        with lock:
            with failing_together():
                if dist.get_rank() == 0:
                    lock.acquire()
                    now_K = Column.open(self.file.parent, self.key, len(self.checksums.values_K)).values_K
                    if not np.array_equal(now_K, self.checksums.values_K, equal_nan=True):
                        raise InputError(
                            f"another run has just computed rows of {self.file}: start this run again"
                        )
            yield

    def _save(self) -> None:
        if dist.get_rank() == 0:
            self.checksums.save()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Open a file to write into it, not to read: over NFS other machines' rows in the same pages stay theirs."""
    with failing_together():
        file = os.open(path, os.O_WRONLY)
    try:
        yield file
    finally:
        os.close(file)


def _finite(logits_NK: np.ndarray) -> bool:
    """Return whether all logits are finite, given as in the file."""
    if logits_NK.dtype == np.uint16:
        return bool(((logits_NK & 0x7F80) != 0x7F80).all())  # no exponent of ones alone
    return bool(np.isfinite(logits_NK).all())
