"""Checkpoints from Hugging Face folders and back: weights only, in one CPU process, whatever the model's size.

Both directions walk the weight table and stream: no model is built, no process group joined. What is in memory
is a few chunks; on the way out, where they are no stretches of HF tensors, those of one row of the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.checkpoint import folder as sharded
from megatron_align.checkpoint.chunk_reader import Source
from megatron_align.config import ParallelConfig
from megatron_align.convert.state_reader import StateReader, Stretch
from megatron_align.convert.state_writer import StateWriter
from megatron_align.errors import InputError
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.hf.safetensors import DTYPES, STRETCH, HFWeights
from megatron_align.hf.writer import ShardWriter, copy_assets, hf_specs, write_config_dtype
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape, Row, copy_segments, local_shape, rows
from megatron_align.model.policy import Policy, build_policy, transformer_config
from megatron_align.storage.atomic_write import (
    files_below,
    put_in_place,
    require_new,
    require_one_process,
    require_space,
)
from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.checksums import PassingFile, hash_files, without_checksums_of_zip, write_sums
from megatron_align.storage.journal import Journal, fingerprint
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import Facts, count_nonfinite, require_finite

CHUNK_BYTES = 64 << 20  # largest piece of a tensor on the way in


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found, and what its card says of the model."""

    folder: Path
    shape: ModelShape
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {str(self.dtype).removeprefix('torch.')}"

    @property
    def parameters(self) -> int:
        """Parameters of the model, without vocabulary padding."""
        return sum(math.prod(size) for row in rows(self.shape) for size in row.hf_shapes(self.shape))


def import_hf(
    hf: str | Path, out: str | Path, dtype: str | None = None, file_bytes: int = 5 * 10**9
) -> Checkpoint:
    """Turn a Hugging Face folder into a checkpoint. Memory: one chunk of at most :data:`CHUNK_BYTES`, or a row.

    Args:
        hf: Hugging Face folder.
        out: becomes the checkpoint, whole or not at all; must be new or empty.
        dtype: what to cast the weights to (``"bfloat16"``); None keeps what they are stored in.
        file_bytes: size at which a file is full.

    Raises:
        InputError: the folder does not hold a model that we know, holds numbers that are not finite, or
            ``out`` is in the way.
    """
    require_one_process()
    weights, shape = open_hf(hf)
    require_tied_head(weights, shape)
    kept = getattr(torch, dtype) if dtype else _one_dtype(weights, shape)
    target = require_new(out)
    found = Checkpoint(target, shape, kept)
    require_space(target, found.parameters * kept.itemsize)
    key = {"import": fingerprint(hf), "format": sharded.FORMAT, "dtype": dtype}
    key |= {"file_bytes": file_bytes, "chunk_bytes": CHUNK_BYTES}
    journal = Journal(target, key)
    try:
        state = StateWriter(journal, sharded.STATE, shape, kept, file_bytes)
        _import_tensors(weights, state)
        _require_finite(state.notes(), weights.folder)
        state.finish()
        (journal.partial / sharded.ASSETS).mkdir(exist_ok=True)
        copy_assets(hf, journal.partial / sharded.ASSETS)
        card = sharded.make_card(0, shape, kept, world_size=1, source=str(hf))
        text = json.dumps({**card, "optimizer": False}, indent=2, ensure_ascii=False)
        (journal.partial / sharded.CARD).write_text(text + "\n", encoding="utf-8")
        journal.close()
        rest = set(files_below(journal.partial)) - state.sums.keys()
        write_sums(journal.partial, state.sums | hash_files(journal.partial, rest))
        put_in_place(journal.partial, target)
    except BaseException as error:
        journal.leave(type(error))
        raise
    return found


def export_hf(
    checkpoint: str | Path, out: str | Path, dtype: str | None = None, shard_bytes: int = 5 * 10**9
) -> Checkpoint:
    """Turn a checkpoint of any layout into a Hugging Face folder; return what was exported.

    Memory: twice the largest row of the weight table whose HF tensors are interleaved (query, key and value), or whose
    chunks are not whole rows of it, at least twice :data:`CHUNK_BYTES`; the others pass in stretches of no more.

    Args:
        checkpoint: a checkpoint, or a run's folder, of which the newest is taken.
        out: becomes the Hugging Face folder, whole or not at all; must be new or empty.
        dtype: what to cast the weights to; None keeps the checkpoint's.
        shard_bytes: largest size of a file.

    Raises:
        InputError: there is no complete checkpoint, it holds numbers that are not finite, or ``out`` is in
            the way.
    """
    require_one_process()
    found = open_checkpoint(checkpoint)
    state = open_state(found)
    kept = getattr(torch, dtype) if dtype else found.dtype
    specs = hf_specs(found.shape, kept)
    target = require_new(out)
    size = sum(spec.nbytes for spec in specs.values())
    require_space(target, size)
    key = {"export": fingerprint(found.folder), "dtype": dtype, "shard_bytes": shard_bytes}
    with (
        ShardWriter(target, specs, shard_bytes, key=key) as writer,
        # Checked before, the disk would stand idle for writing.
        sharded.checked_meanwhile(found.folder, passing=state.files()) as passing,
        Progress("exporting", size) as progress,
        _single_threaded(),
        BackgroundWorker() as hashing,
        BackgroundWorker() as behind,
    ):
        exporter, buffers = _Exporter(writer, kept, passing, hashing), _two_buffers(state)
        for row in rows(found.shape):
            if not all(writer.has(name) for name in row.hf):
                for stretch in state.stretches(row, buffers):
                    behind.run(partial(exporter.write, stretch))
                behind.run(partial(exporter.finish, row.hf))
            progress.add(sum(specs[name].nbytes for name in row.hf))
        behind.wait()
        require_finite({name: Facts("", *writer.facts(name)) for name in specs}, found.folder)
        copy_assets(found.folder / sharded.ASSETS, writer.partial)
        write_config_dtype(writer.partial, kept)
    return Checkpoint(found.folder, found.shape, kept)


def open_state(checkpoint: Checkpoint) -> StateReader:
    """Return a checkpoint's weights; whether its files are what was written is not looked at.

    Raises:
        InputError: they are incomplete, or not those of its card.
    """
    folder = checkpoint.folder / sharded.STATE
    state = StateReader(folder, checkpoint.shape)
    stored = {row.megatron: state.dtype(row) for row in rows(checkpoint.shape)}
    if facts := [f"{name} is {dtype}" for name, dtype in stored.items() if dtype != checkpoint.dtype]:
        raise InputError(
            f"all must be {checkpoint.dtype}, as {sharded.CARD} says: {', '.join(facts)} in {folder}"
        )
    return state


def _two_buffers(state: StateReader) -> Iterator[Tensor]:
    """Yield memory for what is read next, in turn: one is filled while the other is written."""
    whole = [state.group_bytes(row) for row in rows(state.shape) if not state.streams(row)]
    size = max([CHUNK_BYTES, *whole])
    return cycle([torch.empty(size, dtype=torch.uint8) for _ in range(2)])


class _Exporter:
    """Hands numbers on to a writer, cast, and to the hashes of the files that they are from, as they were.

    Counts those that are not finite while the disk writes the last ones.
    """

    def __init__(
        self,
        writer: ShardWriter,
        dtype: torch.dtype,
        passing: Mapping[Path, PassingFile],
        hashing: BackgroundWorker,
    ) -> None:
        self.writer, self.dtype, self.passing, self.hashing = writer, dtype, passing, hashing
        self._counts: dict[str, tuple[int, int]] = {}

    def write(self, stretch: Stretch) -> None:
        """Take a stretch of a tensor; its memory may be taken for others when this returns."""
        name, start, elements, sources = stretch
        self.hashing.run(partial(self._hash, sources))
        for part in elements.split(STRETCH):
            counts = zip(self._counts.get(name, (0, 0)), count_nonfinite(part), strict=True)
            self._counts[name] = tuple(map(sum, counts))
            self.writer.write_flat(name, start, part.to(self.dtype))
            start += len(part)
        self.hashing.wait()

    def _hash(self, sources: Iterable[Source]) -> None:
        for path, start, numbers in sources:
            if path in self.passing:
                self.passing[path].add(start, memoryview(numbers.reshape(-1).view(torch.uint8).numpy()))

    def finish(self, names: Iterable[str]) -> None:
        """Say that these tensors are complete."""
        for name in names:
            self.writer.finish(name, facts=self._counts.pop(name))


class _ChunkReader:
    """Reads whole rows of Megatron tensors from Hugging Face's, into memory that the chunk after next takes again."""

    def __init__(self, weights: HFWeights, shape: ModelShape, dtype: torch.dtype) -> None:
        self.weights, self.shape, self.dtype = weights, shape, dtype
        widest = max(math.prod(local_shape(row, shape, 1)[1:]) for row in rows(shape))
        size = max(CHUNK_BYTES, widest * torch.float64.itemsize)
        # Two: one is filled while the other is written.
        self._chunks = [torch.empty(size, dtype=torch.uint8).numpy() for _ in range(2)]
        self._raw = torch.empty(size, dtype=torch.uint8)

    def height(self, row: Row) -> int:
        """Return how many rows of a tensor are read at once."""
        return max(
            1, CHUNK_BYTES // (math.prod(local_shape(row, self.shape, 1)[1:]) * torch.float64.itemsize)
        )

    def read(self, row: Row, start: int, count: int) -> tuple[Tensor, dict[str, list[int]]]:
        """Return the rows, and of each HF tensor that has NaN or infinite numbers among them how many."""
        tail = local_shape(row, self.shape, 1)[1:]
        width = math.prod(tail)
        # Not a slice of a tensor: saving one saves all that it is a slice of.
        self._chunks.reverse()
        chunk = torch.frombuffer(self._chunks[0], dtype=self.dtype, count=count * width)
        spoilt: dict[str, list[int]] = {}
        for segment in copy_segments(row, self.shape, dim=0, within=(start, start + count)):
            first = (segment.start - start) * width
            target = chunk[first : first + segment.size * width]
            if segment.name is None:
                target.zero_()
            else:
                self._fill(target, segment.name, segment.hf_start * width, spoilt)
        return chunk.view(count, *tail), spoilt

    def _fill(self, target: Tensor, name: str, start: int, spoilt: dict[str, list[int]]) -> None:
        stored = DTYPES[self.weights.dtype(name)]
        raw = target if stored == self.dtype else self._raw.view(stored)[: len(target)]
        self.weights.read_flat(name, start, raw)
        if any(counts := count_nonfinite(raw)):
            spoilt[name] = [a + b for a, b in zip(spoilt.get(name, (0, 0)), counts, strict=True)]
        if raw is not target:
            target.copy_(raw)


def _import_tensors(weights: HFWeights, state: StateWriter) -> None:
    shape = state.shape
    reader = _ChunkReader(weights, shape, state.dtype)
    size = sum(math.prod(local_shape(row, shape, 1)) for row in rows(shape)) * state.dtype.itemsize
    with (
        Progress("importing", size) as progress,
        without_checksums_of_zip(),
        _single_threaded(),
        BackgroundWorker() as behind,
    ):
        for row in rows(shape):
            rows_in_all, *tail = local_shape(row, shape, 1)
            step = reader.height(row)
            for start in range(0, rows_in_all, step):
                count = min(step, rows_in_all - start)
                if not state.has(row, start):
                    behind.run(partial(state.write, row, start, *reader.read(row, start, count)))
                progress.add(count * math.prod(tail) * state.dtype.itemsize)
            for name in row.hf:
                weights.release(name)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Keep torch's operations to the thread that calls them, those of threads that begin in the block included.

    Looking through a stretch is short and comes often: in between, OpenMP's idle threads spin on the cores that read,
    hash and write. Of 11 s of processor time that an export of 4.3 GB took, they took three.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_finite(notes: Iterable[dict[str, list[int]]], place: Path) -> None:
    spoilt: dict[str, list[int]] = {}
    for note in notes:
        for name, counts in note.items():
            spoilt[name] = [a + b for a, b in zip(spoilt.get(name, (0, 0)), counts, strict=True)]
    require_finite({name: Facts("", *counts) for name, counts in spoilt.items()}, place)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Return the checkpoint that ``path`` is, or the newest of a run's folder.

    Raises:
        InputError: there is none, or its parts contradict each other.
    """
    folder = sharded.find(path)
    if folder is None:
        raise InputError(
            f"a checkpoint (a folder with {sharded.CARD}), or a run's folder with a complete one, is needed, "
            f"found neither at {path}"
        )
    card, shape = sharded.read_card(folder), sharded.checkpoint_shape(folder)
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if card.get("dtype") not in names:
        raise InputError(
            f"dtype must be one of {list(names)}, found {card.get('dtype')!r} in {folder / sharded.CARD}"
        )
    noted = card.get("shape")
    if not isinstance(noted, dict) or (apart := sharded.shape_differences(asdict(shape), noted)):
        facts = (
            ", ".join(f"{key} {theirs!r} for {ours!r}" for key, (ours, theirs) in apart.items())
            if noted
            else "none"
        )
        raise InputError(
            f"{sharded.CARD} must have the shape of {sharded.ASSETS}, it has {facts} in {folder}"
        )
    return Checkpoint(folder, shape, names[card["dtype"]])


@contextmanager
def one_process() -> Iterator[ProcessGroupCollection]:
    """Give the process groups of a process that is alone, for the length of a with-block.

    Raises:
        InputError: a launcher started several.
    """
    require_one_process()
    parallel.join(parallel.RankInfo.from_environment(), ParallelConfig())
    try:
        yield parallel.groups()
    finally:
        parallel.leave()


def empty_model(shape: ModelShape, dtype: torch.dtype, groups: ProcessGroupCollection) -> list[Policy]:
    """Build the whole model, weights uninitialised."""
    return build_policy(transformer_config(shape, ParallelConfig(), dtype), shape, groups)


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, groups: ProcessGroupCollection) -> list[Policy]:
    """Build the whole model in ``dtype`` with a checkpoint's weights."""
    chunks = empty_model(checkpoint.shape, dtype, groups)
    sharded.load(checkpoint.folder, chunks)
    return chunks


def _one_dtype(weights: HFWeights, shape: ModelShape) -> torch.dtype:
    found: dict[str, list[str]] = {}
    for name in (name for row in rows(shape) for name in row.hf):
        found.setdefault(weights.dtype(name), []).append(name)
    if len(found) > 1:
        facts = ", ".join(
            f"{len(names)} {dtype} (such as {names[0]})" for dtype, names in sorted(found.items())
        )
        raise InputError(
            f"the tensors must share one dtype, or --dtype say one; found {facts} in {weights.folder}"
        )
    return DTYPES[next(iter(found))]
