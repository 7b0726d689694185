"""Merge Hugging Face folders tensor by tensor, in blocks and constant memory.

Two windows of each input are in memory: while one is merged, threads read the next, hash it and check it for NaN and
infinity. The result is written directly to its shard. A window is merged in blocks that fit a core's cache.

Shapes: E elements of a block, N models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_align.errors import InputError
from megatron_align.hf.assets import copy_assets, write_config_dtype
from megatron_align.hf.hub import model_folder
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.hf.safetensors import DTYPES, HFWeights
from megatron_align.hf.tokenizer import require_same_tokenizer
from megatron_align.hf.writer import ShardWriter, TensorSpec, hf_specs
from megatron_align.merge.methods import Block, Method
from megatron_align.merge.model_card import Input, write_card
from megatron_align.model.families import ModelShape
from megatron_align.storage.atomic_write import require_new, require_one_process, require_space
from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.journal import fingerprint
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import (
    Counts,
    RunningDigest,
    TensorDigest,
    add_counts,
    count_nonfinite,
    describe_nonfinite,
    require_finite,
)

WINDOW_ELEMENTS = 1 << 22  # of each input, read at once
BLOCK_ELEMENTS = 1 << 18  # merged at once: fits a core's cache


def merge(
    method: Method,
    base: str | Path | None,
    models: Sequence[str | Path],
    out: str | Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> list[Input]:
    """Merge models into a new Hugging Face folder, with the first model's configuration and tokenizer.

    The write is atomic and resumes after a kill.

    Args:
        method: formula and options.
        base: the model that the others were trained from. A formula without a base only checks that it is
            compatible; slerp with one model starts from it.
        models: Hugging Face folders of one architecture, with equal sizes, constants and tokenizers.
        out: folder to write, new or empty.
        dtype: of the result (``"bfloat16"``); None: as stored, which must then be equal in all.
        shard_bytes: maximum size of a file.

    Raises:
        InputError: the folders do not fit each other or the method, hold non-finite weights, the result is not
            finite, or ``out`` is not usable.
    """
    require_one_process()
    base = None if base is None else model_folder(base)
    models = [model_folder(model) for model in models]
    merged = _merged_folders(method, base, models)
    # the base is compared even if the formula does not use it
    checked = [Path(base)] if base is not None else []
    opened, shape = open_alike(list(dict.fromkeys([*checked, *(folder for _, folder in merged)])))
    weights = [opened[folder] for _, folder in merged]
    specs = _specs(weights, shape, dtype)
    target = require_new(out)
    require_space(target, sum(spec.nbytes for spec in specs.values()))
    key = {
        "merge": type(method).__name__,
        "notes": 2,  # of each tensor: 1 had no counts of the result
        "options": asdict(method),
        "dtype": dtype,
        "shard_bytes": shard_bytes,
        "inputs": [fingerprint(folder) for _, folder in merged],
    }
    with ShardWriter(target, specs, shard_bytes, key=key) as writer:
        inputs = merge_into(writer, method, [(*entry, opened[entry[1]]) for entry in merged], specs)
        copy_assets(models[0], writer.partial)
        if dtype:
            write_config_dtype(writer.partial, getattr(torch, dtype))
        write_card(writer.partial, method, inputs)
    return inputs


class Weights(Protocol):
    """The tensors of a model as a merge reads them: :class:`.HFWeights`, or a base with an adapter."""

    def dtype(self, name: str) -> str:
        """Return the dtype in which a tensor is read, as safetensors spells it."""

    def numel(self, name: str) -> int:
        """Return a tensor's number of elements."""

    def read_flat(self, name: str, start: int, out: Tensor) -> None:
        """Fill the one-dimensional ``out`` with a tensor's elements from ``start`` on."""

    def release(self, name: str) -> None:
        """Drop a tensor that will not be read again from the page cache."""


def merge_into(
    writer: ShardWriter,
    method: Method,
    merged: Sequence[tuple[str, Path, Weights]],
    specs: dict[str, TensorSpec],
) -> list[Input]:
    """Merge all tensors into a writer's files; return the inputs with their digests.

    Args:
        writer: of the result.
        method: formula and options.
        merged: role, folder and tensors of every input of the formula, the base first if the formula uses it.
        specs: dtypes and shapes of the result's tensors.

    Raises:
        InputError: an input or the result is not finite.
    """
    _merge_tensors(method, [weights for _, _, weights in merged], specs, writer)
    inputs = [
        Input(role, folder, {name: TensorDigest(**writer.notes(name)[number]) for name in specs})
        for number, (role, folder, _) in enumerate(merged)
    ]
    for source in inputs:
        require_finite(source.tensors, source.folder)
    _require_finite_result({name: TensorDigest("", *writer.notes(name)[-1]) for name in specs}, specs)
    return inputs


def _merged_folders(
    method: Method, base: str | Path | None, models: Sequence[str | Path]
) -> list[tuple[str, Path]]:
    """Return role and folder of every input of the formula, the base first if the formula uses it."""
    base_entry = [("base", Path(base))] if base is not None else []
    entries = [(f"model {number}", Path(folder)) for number, folder in enumerate(models, start=1)]
    if method.starts_at_base and len(entries) == 1:
        entries = base_entry + entries
    method.check(len(entries))
    if method.needs_base:
        if base is None:
            raise InputError("--base is required: the formula uses differences from it")
        entries = base_entry + entries
    return entries


def open_alike(folders: list[Path]) -> tuple[dict[Path, HFWeights], ModelShape]:
    """Return the weights of compatible folders, and their common shape."""
    opened = {folder: open_hf(folder) for folder in folders}
    first = asdict(opened[folders[0]][1])
    for folder, (weights, shape) in opened.items():
        differences = [
            f"{key} {value!r} instead of {first[key]!r}"
            for key, value in asdict(shape).items()
            if value != first[key] and key != "max_positions"  # a longer context does not change the tensors
        ]
        if differences:
            raise InputError(f"models differ: {folder} has {', '.join(differences)} as in {folders[0]}")
        require_tied_head(weights, shape)
    require_same_tokenizer(folders)
    return {folder: weights for folder, (weights, _) in opened.items()}, opened[folders[0]][1]


def _specs(weights: list[HFWeights], shape: ModelShape, dtype: str | None) -> dict[str, TensorSpec]:
    """Return dtypes and shapes of the result's tensors."""
    if dtype:
        return hf_specs(shape, getattr(torch, dtype))
    specs = {}
    for name, (_, size) in hf_specs(shape, torch.float32).items():
        stored = {each.dtype(name): each.folder for each in weights}
        if len(stored) > 1:
            listed = ", ".join(f"{stored_dtype} in {folder}" for stored_dtype, folder in stored.items())
            raise InputError(f"{name} has different dtypes: {listed}; choose one by --dtype")
        specs[name] = TensorSpec(DTYPES[next(iter(stored))], size)
    return specs


def _merge_tensors(
    method: Method, weights: list[Weights], specs: dict[str, TensorSpec], writer: ShardWriter
) -> None:
    once = sum(DTYPES[each.dtype(name)].itemsize * each.numel(name) for each in weights for name in specs)
    with (
        Progress("merging", method.passes * once) as progress,
        ThreadPoolExecutor(len(weights)) as pool,
        BackgroundWorker() as writing,
    ):
        buffers, output = _InputWindows(weights, pool, progress), _OutputWindows(writer, writing)
        for name, spec in specs.items():
            if writer.has(name):
                progress.add(method.passes * sum(buffers.nbytes(name)))
                continue
            tensor = _TensorBlocks(name, buffers, method.needs_base)
            nonfinite = output.write(name, spec, method.merge(tensor, name))
            for each in weights:
                each.release(name)
            notes = [*(asdict(each.result()) for each in tensor.digests), nonfinite]
            writing.run(partial(writer.finish, name, notes))


def _require_finite_result(tensors: dict[str, TensorDigest], specs: dict[str, TensorSpec]) -> None:
    """Refuse a result that overflowed.

    Raises:
        InputError: naming such tensors.
    """
    if nonfinite := describe_nonfinite(tensors):
        dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()})
        raise InputError(
            f"the merged weights are not finite in {', '.join(dtypes)}: {nonfinite}; choose other weights or scales, "
            "or a dtype of wider range by --dtype"
        )


class _OutputWindows:
    """Two windows of the result: while one is written, the other collects blocks."""

    def __init__(self, writer: ShardWriter, writing: BackgroundWorker) -> None:
        self._writer, self._writing = writer, writing
        self._halves = list(torch.empty(2, WINDOW_ELEMENTS * torch.float64.itemsize, dtype=torch.uint8))

    def write(self, name: str, spec: TensorSpec, blocks: Iterable[Tensor]) -> Counts:
        """Write a tensor and count its NaN and infinities; its last window may still be being written afterwards."""
        start = filled = 0
        totals: dict[str, Counts] = {}
        for block_E in blocks:
            window = self._halves[0].view(spec.dtype)
            written_E = window[filled : filled + len(block_E)].copy_(block_E)
            add_counts(totals, name, count_nonfinite(written_E))
            filled += len(block_E)
            if filled == WINDOW_ELEMENTS or start + filled == math.prod(spec.shape):
                self._writing.run(partial(self._writer.write_flat, name, start, window[:filled]))
                self._halves.reverse()
                start, filled = start + filled, 0
        return totals[name]


class _InputWindows:
    """Two windows of every input, and the threads that fill them."""

    def __init__(self, weights: list[Weights], pool: ThreadPoolExecutor, progress: Progress) -> None:
        self.weights, self._pool, self.progress = weights, pool, progress
        self._raw = torch.empty(2, len(weights), WINDOW_ELEMENTS * torch.float64.itemsize, dtype=torch.uint8)

    def nbytes(self, name: str) -> list[int]:
        """Return the size of a tensor in each input."""
        return [DTYPES[each.dtype(name)].itemsize * each.numel(name) for each in self.weights]

    def fill(
        self, name: str, start: int, count: int, digests: list[RunningDigest] | None
    ) -> list[Future[Tensor]]:
        """Begin to read the same window of every input, into the half that was not used last."""
        half = start // WINDOW_ELEMENTS % 2
        return [
            self._pool.submit(
                self._read, number, (name, start, count), half, digests[number] if digests else None
            )
            for number in range(len(self.weights))
        ]

    def _read(
        self, number: int, window: tuple[str, int, int], half: int, digest: RunningDigest | None
    ) -> Tensor:
        name, start, count = window
        dtype = DTYPES[self.weights[number].dtype(name)]
        raw = self._raw[half, number, : count * dtype.itemsize].view(dtype)
        self.weights[number].read_flat(name, start, raw)
        if digest:
            digest.add(raw)
        return raw


class _TensorBlocks:
    """One tensor of all inputs as an iterable of blocks; the first iteration computes the digests."""

    def __init__(self, name: str, buffers: _InputWindows, has_base: bool) -> None:
        self.name, self.digests = name, [RunningDigest() for _ in buffers.weights]
        self._buffers, self._has_base, self._iterated = buffers, has_base, False
        stored = [DTYPES[each.dtype(name)] for each in buffers.weights]
        computed = torch.float64 if torch.float64 in stored else torch.float32
        self._block = torch.empty(len(stored), BLOCK_ELEMENTS, dtype=computed)
        self._numel = buffers.weights[0].numel(name)

    def __iter__(self) -> Iterator[Block]:
        digests = None if self._iterated else self.digests
        self._iterated = True
        pending = self._fill(0, digests)
        for start in range(0, self._numel, WINDOW_ELEMENTS):
            raws = [future.result() for future in pending]
            self._buffers.progress.add(sum(raw.nbytes for raw in raws))
            pending = self._fill(start + WINDOW_ELEMENTS, digests)
            for parts in zip(*(raw.split(BLOCK_ELEMENTS) for raw in raws), strict=True):
                block = self._block[:, : len(parts[0])]
                for row_E, part in zip(block, parts, strict=True):
                    row_E.copy_(part)
                yield Block(block[0], block[1:]) if self._has_base else Block(None, block)

    def _fill(self, start: int, digests: list[RunningDigest] | None) -> list[Future[Tensor]]:
        if start >= self._numel:
            return []
        return self._buffers.fill(self.name, start, min(WINDOW_ELEMENTS, self._numel - start), digests)
