"""Export a checkpoint of any layout as a Hugging Face folder, in one CPU process, tensor by tensor.

The weight table is walked: no model is built, no process group created. In memory are a few blocks, or the tensors of
one row where blocks of the checkpoint are not contiguous parts of HF tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from megatron_align.checkpoint.card import (
    is_of_training,
    metadata_of_critic,
    read_checkpoint_metadata,
)
from megatron_align.checkpoint.folder import ASSETS
from megatron_align.checkpoint.integrity import verifying_while_reading
from megatron_align.checkpoint.tensor_reader import FileRange
from megatron_align.convert.open_checkpoint import Checkpoint, open_checkpoint, open_state
from megatron_align.convert.state_reader import StateReader, TensorBlock
from megatron_align.convert.streaming import BLOCK_BYTES
from megatron_align.hf.assets import (
    AssetChanges,
    Padding,
    copy_assets,
    write_assets,
    write_config_dtype,
)
from megatron_align.hf.model_card import CARD, model_card
from megatron_align.hf.safetensors import BLOCK_ELEMENTS
from megatron_align.hf.writer import ShardWriter, hf_specs
from megatron_align.model.families import rows
from megatron_align.monitoring.metrics_file import METRICS, last_rows
from megatron_align.storage.atomic_write import require_new, require_one_process, require_space
from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.checksums import HashWhileReading
from megatron_align.storage.journal import fingerprint
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import (
    Counts,
    TensorDigest,
    add_counts,
    count_nonfinite,
    require_finite,
)
from megatron_align.storage.threads import single_threaded


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    *,
    critic: bool = False,
) -> Checkpoint:
    """Convert a checkpoint to a Hugging Face folder; the write is atomic and resumes after a kill.

    Memory: two blocks of :data:`BLOCK_BYTES`, or twice the HF tensors of the largest row of the weight table that
    cannot be streamed: interleaved ones (query, key and value), and those that the checkpoint cuts along columns.

    Args:
        checkpoint: a checkpoint, or a run's folder, meaning its newest.
        out: Hugging Face folder to write, new or empty.
        dtype: to cast the weights to; None: as stored.
        shard_bytes: maximum size of a file.
        critic: export the critic of a checkpoint of objective ppo, as a reward model, in place of the policy.

    Returns:
        The exported checkpoint, with the dtype of the result.

    Raises:
        InputError: the checkpoint is missing, incomplete or corrupt, holds non-finite weights, or ``out`` is not
            usable.
    """
    require_one_process()
    source = open_checkpoint(checkpoint, critic=critic)
    state = open_state(source)
    written = getattr(torch, dtype) if dtype else source.dtype
    specs = hf_specs(source.shape, written)
    target = require_new(out)
    size = sum(spec.nbytes for spec in specs.values())
    require_space(target, size)
    key = {"export": fingerprint(source.folder), "dtype": dtype, "shard_bytes": shard_bytes}
    key |= {"critic": True} if critic else {}
    with (
        ShardWriter(target, specs, shard_bytes, key=key) as writer,
        # Verified meanwhile rather than before, which would leave the disk idle for writing.
        verifying_while_reading(source.folder, hashed_by_block=state.weight_files()) as hashes,
        Progress("exporting", size) as progress,
        single_threaded(),
        BackgroundWorker() as hashing,
        BackgroundWorker() as writing,
    ):
        exporter, buffers = _Exporter(writer, written, hashes, hashing), _two_buffers(state)
        for row in rows(source.shape):
            if not all(writer.has(name) for name in row.hf):
                for block in state.blocks(row, buffers):
                    writing.run(partial(exporter.write, block))
                writing.run(partial(exporter.finish, row.hf))
            progress.add(sum(specs[name].nbytes for name in row.hf))
        writing.wait()
        require_finite({name: TensorDigest("", *writer.notes(name)) for name in specs}, source.folder)
        if critic:
            _write_critic_assets(source, writer.partial)
        else:
            copy_assets(source.folder / ASSETS, writer.partial)
        write_config_dtype(writer.partial, written)
        write_model_card(source.folder, writer.partial, critic=critic)
    return replace(source, dtype=written)


def _write_critic_assets(source: Checkpoint, folder: Path) -> None:
    critic = read_checkpoint_metadata(source.folder)["critic"]
    padding = critic["padding"]
    changes = AssetChanges(
        padding=None if padding is None else Padding(**padding), config=critic.get("config")
    )
    write_assets(source.folder / ASSETS, folder, source.shape, changes)


def write_model_card(checkpoint: Path, folder: Path, *, critic: bool = False) -> None:
    """Write the model card of a checkpoint that training wrote; an imported one has no training to describe."""
    if is_of_training(checkpoint):
        metadata = read_checkpoint_metadata(checkpoint)
        metadata = metadata_of_critic(metadata) if critic else metadata
        rows = last_rows(checkpoint.parent / METRICS, metadata["step"])
        (folder / CARD).write_text(model_card(metadata, rows), encoding="utf-8")


def _two_buffers(state: StateReader) -> Iterator[Tensor]:
    """Yield two buffers in turn: one is filled while the other is written."""
    entire_rows = [state.group_bytes(row) for row in rows(state.shape) if not state.can_stream(row)]
    size = max([BLOCK_BYTES, *entire_rows])
    return cycle([torch.empty(size, dtype=torch.uint8) for _ in range(2)])


class _Exporter:
    """Cast blocks, count their non-finite elements and pass them to a writer, while their files are hashed."""

    def __init__(
        self,
        writer: ShardWriter,
        dtype: torch.dtype,
        hashes: Mapping[Path, HashWhileReading],
        hashing: BackgroundWorker,
    ) -> None:
        self.writer, self.dtype, self.hashes, self.hashing = writer, dtype, hashes, hashing
        self._nonfinite: dict[str, Counts] = {}

    def write(self, block: TensorBlock) -> None:
        """Write a block of a tensor; its memory may be reused when this returns."""
        name, start, elements, ranges = block
        self.hashing.run(partial(self._hash, ranges))
        for part in elements.split(BLOCK_ELEMENTS):
            written = part.to(self.dtype)
            add_counts(self._nonfinite, name, count_nonfinite(written))  # after the cast, which may overflow
            self.writer.write_flat(name, start, written)
            start += len(part)
        self.hashing.wait()

    def _hash(self, ranges: Iterable[FileRange]) -> None:
        for path, start, elements in ranges:
            if path in self.hashes:
                self.hashes[path].add(start, memoryview(elements.reshape(-1).view(torch.uint8).numpy()))

    def finish(self, names: Iterable[str]) -> None:
        """Mark tensors as complete."""
        for name in names:
            self.writer.finish(name, notes=self._nonfinite.pop(name))
