"""Import a Hugging Face folder as a checkpoint: weights only, in one CPU process, in constant memory.

The weight table is walked block by block: no model is built, no process group created. A few blocks are in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_align.checkpoint.card import FORMAT, make_checkpoint_metadata
from megatron_align.checkpoint.folder import ASSETS, CARD, STATE
from megatron_align.convert.open_checkpoint import Checkpoint
from megatron_align.convert.state_writer import StateWriter
from megatron_align.convert.streaming import BLOCK_BYTES
from megatron_align.errors import InputError
from megatron_align.hf.assets import copy_assets
from megatron_align.hf.hub import model_folder
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.hf.safetensors import DTYPES, HFWeights
from megatron_align.model.families import ModelShape, Row, copy_segments, local_shape, rows
from megatron_align.storage.atomic_write import (
    commit_folder,
    files_below,
    require_new,
    require_one_process,
    require_space,
)
from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.checksums import hash_files, without_zip_checksums, write_checksums
from megatron_align.storage.journal import Journal, fingerprint
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import (
    Counts,
    TensorDigest,
    add_counts,
    count_nonfinite,
    require_finite,
)
from megatron_align.storage.threads import single_threaded


def import_hf(
    hf: str | Path,
    out: str | Path,
    dtype: str | None = None,
    file_bytes: int = 5 * 10**9,
    block_bytes: int = BLOCK_BYTES,
) -> Checkpoint:
    """Convert a Hugging Face folder to a checkpoint; the write is atomic and resumes after a kill.

    Memory: three blocks of ``block_bytes``, or of one row of the widest tensor.

    Args:
        hf: Hugging Face folder.
        out: checkpoint to write, a new or empty folder.
        dtype: to cast the weights to (``"bfloat16"``); None: as stored.
        file_bytes: size at which a file is closed.
        block_bytes: largest part of a tensor that is read and written at once.

    Raises:
        InputError: the folder does not hold a supported model, holds non-finite weights, or ``out`` is not usable.
    """
    require_one_process()
    hf = model_folder(hf)
    weights, shape = open_hf(hf)
    require_tied_head(weights, shape)
    stored = getattr(torch, dtype) if dtype else _common_dtype(weights, shape)
    target = require_new(out)
    checkpoint = Checkpoint(target, shape, stored)
    require_space(target, checkpoint.parameters * stored.itemsize)
    key = {"import": fingerprint(hf), "format": FORMAT, "dtype": dtype}
    key |= {"file_bytes": file_bytes, "block_bytes": block_bytes}
    with Journal(target, key) as journal:
        state = StateWriter(journal, STATE, shape, stored, file_bytes)
        _import_tensors(weights, state, block_bytes)
        _require_finite(state.notes(), weights.folder)
        state.finish()
        (journal.partial / ASSETS).mkdir(exist_ok=True)
        copy_assets(hf, journal.partial / ASSETS)
        metadata = make_checkpoint_metadata(0, shape, stored, world_size=1, source=str(hf))
        text = json.dumps({**metadata, "optimizer": False}, indent=2, ensure_ascii=False)
        (journal.partial / CARD).write_text(text + "\n", encoding="utf-8")
        journal.close()
        rest = set(files_below(journal.partial)) - state.checksums.keys()
        write_checksums(journal.partial, state.checksums | hash_files(journal.partial, rest))
        commit_folder(journal.partial, target)
    return checkpoint


class _BlockReader:
    """Read blocks of rows of Megatron tensors from Hugging Face weights, into one of two buffers in turn."""

    def __init__(self, weights: HFWeights, shape: ModelShape, dtype: torch.dtype, block_bytes: int) -> None:
        self.weights, self.shape, self.dtype, self.block_bytes = weights, shape, dtype, block_bytes
        widest = max(math.prod(local_shape(row, shape, 1)[1:]) for row in rows(shape))
        size = max(block_bytes, widest * torch.float64.itemsize)
        # Two: one is filled while the other is written.
        self._buffers = [torch.empty(size, dtype=torch.uint8).numpy() for _ in range(2)]
        self._before_cast = torch.empty(size, dtype=torch.uint8)

    def height(self, row: Row) -> int:
        """Return how many rows of a tensor are read at once."""
        width = math.prod(local_shape(row, self.shape, 1)[1:])
        return max(1, self.block_bytes // (width * torch.float64.itemsize))

    def read(self, row: Row, start: int, count: int) -> tuple[Tensor, dict[str, Counts]]:
        """Return a block of rows, and the numbers of NaN and infinite elements of the HF tensors that have any."""
        tail = local_shape(row, self.shape, 1)[1:]
        width = math.prod(tail)
        # Not a slice of a tensor: torch.save would write the entire tensor.
        self._buffers.reverse()
        block = torch.frombuffer(self._buffers[0], dtype=self.dtype, count=count * width)
        nonfinite: dict[str, Counts] = {}
        for segment in copy_segments(row, self.shape, dim=0, within=(start, start + count)):
            first = (segment.start - start) * width
            target = block[first : first + segment.size * width]
            if segment.name is None:
                target.zero_()
            elif any(counts := self._fill(target, segment.name, segment.hf_start * width)):
                add_counts(nonfinite, segment.name, counts)
        return block.view(count, *tail), nonfinite

    def _fill(self, target: Tensor, name: str, start: int) -> Counts:
        """Fill ``target`` with an HF tensor's elements; return how many are NaN and infinite."""
        stored = DTYPES[self.weights.dtype(name)]
        raw = target if stored == self.dtype else self._before_cast.view(stored)[: len(target)]
        self.weights.read_flat(name, start, raw)
        if raw is not target:
            target.copy_(raw)
        return count_nonfinite(target)  # after the cast, which may overflow


def _import_tensors(weights: HFWeights, state: StateWriter, block_bytes: int) -> None:
    shape = state.shape
    reader = _BlockReader(weights, shape, state.dtype, block_bytes)
    size = sum(math.prod(local_shape(row, shape, 1)) for row in rows(shape)) * state.dtype.itemsize
    with (
        Progress("importing", size) as progress,
        without_zip_checksums(),
        single_threaded(),
        BackgroundWorker() as writing,
    ):
        for row in rows(shape):
            height, *tail = local_shape(row, shape, 1)
            step = reader.height(row)
            for start in range(0, height, step):
                count = min(step, height - start)
                if not state.has(row, start):
                    writing.run(partial(state.write, row, start, *reader.read(row, start, count)))
                progress.add(count * math.prod(tail) * state.dtype.itemsize)
            for name in row.hf:
                weights.release(name)


def _require_finite(notes: Iterable[dict[str, Counts]], source: Path) -> None:
    totals: dict[str, Counts] = {}
    for note in notes:
        for name, counts in note.items():
            add_counts(totals, name, counts)
    require_finite({name: TensorDigest("", *counts) for name, counts in totals.items()}, source)


def _common_dtype(weights: HFWeights, shape: ModelShape) -> torch.dtype:
    names_by_dtype: dict[str, list[str]] = {}
    for name in (name for row in rows(shape) for name in row.hf):
        names_by_dtype.setdefault(weights.dtype(name), []).append(name)
    if len(names_by_dtype) > 1:
        listed = ", ".join(
            f"{len(names)} {dtype} (such as {names[0]})" for dtype, names in sorted(names_by_dtype.items())
        )
        raise InputError(
            f"tensors have different dtypes: {listed} in {weights.folder}; choose one by --dtype"
        )
    return DTYPES[next(iter(names_by_dtype))]
