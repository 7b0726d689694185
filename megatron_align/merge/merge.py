"""Merging Hugging Face folders tensor by tensor, block by block: memory does not grow with the model.

Two stretches of each input are in memory: while one is merged, the next is read, hashed and looked through for
NaN and infinity by other threads. The result goes straight to its shard.

Shapes: E elements of a block, N models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_align.errors import InputError
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.hf.safetensors import DTYPES, HFWeights
from megatron_align.hf.tokenizer import require_same_tokenizer
from megatron_align.hf.writer import ShardWriter, TensorSpec, copy_assets, hf_specs, write_config_dtype
from megatron_align.merge.methods import Block, Method
from megatron_align.merge.model_card import Input, write_card
from megatron_align.model.families import ModelShape
from megatron_align.storage.atomic_write import require_new, require_one_process, require_space
from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.journal import fingerprint
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import Digest, Facts, require_finite

READ_ELEMENTS = 1 << 22  # at once, of each input
BLOCK_ELEMENTS = 1 << 18  # merged at once: what a core's cache holds


def merge(
    method: Method,
    base: str | Path | None,
    models: Sequence[str | Path],
    out: str | Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> list[Input]:
    """Merge models into a new Hugging Face folder, with the first model's configuration and tokenizer.

    Args:
        method: formula and options.
        base: what the models were trained from. A formula without a base only compares it with the models;
            slerp with one model starts from it.
        models: Hugging Face folders of one architecture, with the same sizes, constants and tokenizer.
        out: becomes the folder, whole or not at all; must be new or empty.
        dtype: of the result (``"bfloat16"``); None: as stored, which must then be alike in all.
        shard_bytes: largest size of a file.

    Raises:
        InputError: the folders do not fit each other or the method, hold numbers that are not finite, or
            ``out`` is in the way.
    """
    require_one_process()
    given = [("base", Path(base))] if base is not None else []
    entries = [(f"model {number}", Path(folder)) for number, folder in enumerate(models, start=1)]
    if method.starts_at_base and len(entries) == 1:
        entries = given + entries
    method.check(len(entries))
    if method.needs_base:
        if not given:
            raise InputError("--base is needed: this formula works on differences to it")
        entries = given + entries
    opened, shape = _open(list(dict.fromkeys(folder for _, folder in given + entries)))
    weights = [opened[folder] for _, folder in entries]
    specs = _specs(weights, shape, dtype)
    target = require_new(out)
    require_space(target, sum(spec.nbytes for spec in specs.values()))
    key = {
        "merge": type(method).__name__,
        "options": asdict(method),
        "dtype": dtype,
        "shard_bytes": shard_bytes,
        "inputs": [fingerprint(folder) for _, folder in entries],
    }
    with ShardWriter(target, specs, shard_bytes, key=key) as writer:
        _merge_tensors(method, weights, specs, writer)
        inputs = [
            Input(role, folder, {name: Facts(**writer.facts(name)[number]) for name in specs})
            for number, (role, folder) in enumerate(entries)
        ]
        for each in inputs:
            require_finite(each.tensors, each.folder)
        copy_assets(models[0], writer.partial)
        if dtype:
            write_config_dtype(writer.partial, getattr(torch, dtype))
        write_card(writer.partial, method, inputs)
    return inputs


def _open(folders: list[Path]) -> tuple[dict[Path, HFWeights], ModelShape]:
    """Return the weights of folders that fit each other, and their common shape."""
    opened = {folder: open_hf(folder) for folder in folders}
    first = asdict(opened[folders[0]][1])
    for folder, (weights, shape) in opened.items():
        apart = [
            f"{key} {value!r} for {first[key]!r}"
            for key, value in asdict(shape).items()
            if value != first[key] and key != "max_positions"  # a longer context does not change the tensors
        ]
        if apart:
            raise InputError(f"the models must be alike: {folder} has {', '.join(apart)} of {folders[0]}")
        require_tied_head(weights, shape)
    require_same_tokenizer(folders)
    return {folder: weights for folder, (weights, _) in opened.items()}, opened[folders[0]][1]


def _specs(weights: list[HFWeights], shape: ModelShape, dtype: str | None) -> dict[str, TensorSpec]:
    """Return the tensors of the result."""
    if dtype:
        return hf_specs(shape, getattr(torch, dtype))
    specs = {}
    for name, (_, size) in hf_specs(shape, torch.float32).items():
        stored = {each.dtype(name): each.folder for each in weights}
        if len(stored) > 1:
            facts = ", ".join(f"{kind} in {folder}" for kind, folder in stored.items())
            raise InputError(f"{name} must be of one dtype, or --dtype say one; found {facts}")
        specs[name] = TensorSpec(DTYPES[next(iter(stored))], size)
    return specs


def _merge_tensors(
    method: Method, weights: list[HFWeights], specs: dict[str, TensorSpec], writer: ShardWriter
) -> None:
    once = sum(DTYPES[each.dtype(name)].itemsize * each.numel(name) for each in weights for name in specs)
    with (
        Progress("merging", method.passes * once) as progress,
        ThreadPoolExecutor(len(weights)) as pool,
        BackgroundWorker() as behind,
    ):
        buffers, output = _Buffers(weights, pool, progress), _Output(writer, behind)
        for name, spec in specs.items():
            if writer.has(name):
                progress.add(method.passes * sum(buffers.nbytes(name)))
                continue
            tensor = _Tensor(name, buffers, method.needs_base)
            output.write(name, spec, method.merge(tensor, name))
            for each in weights:
                each.release(name)
            behind.run(partial(writer.finish, name, [asdict(each.facts()) for each in tensor.digests]))


class _Output:
    """Memory for two stretches of the result: while one is written, the next gathers its blocks."""

    def __init__(self, writer: ShardWriter, behind: BackgroundWorker) -> None:
        self._writer, self._behind = writer, behind
        self._halves = list(torch.empty(2, READ_ELEMENTS * torch.float64.itemsize, dtype=torch.uint8))

    def write(self, name: str, spec: TensorSpec, blocks: Iterable[Tensor]) -> None:
        """Write a tensor; the last stretch may still be on its way when this returns."""
        start = filled = 0
        for block_E in blocks:
            stretch = self._halves[0].view(spec.dtype)
            stretch[filled : filled + len(block_E)].copy_(block_E)
            filled += len(block_E)
            if filled == READ_ELEMENTS or start + filled == math.prod(spec.shape):
                self._behind.run(partial(self._writer.write_flat, name, start, stretch[:filled]))
                self._halves.reverse()
                start, filled = start + filled, 0


class _Buffers:
    """Memory for two stretches of every input, and the threads that fill it."""

    def __init__(self, weights: list[HFWeights], pool: ThreadPoolExecutor, progress: Progress) -> None:
        self.weights, self._pool, self.progress = weights, pool, progress
        self._raw = torch.empty(2, len(weights), READ_ELEMENTS * torch.float64.itemsize, dtype=torch.uint8)

    def nbytes(self, name: str) -> list[int]:
        """Return the size of a tensor in each input."""
        return [DTYPES[each.dtype(name)].itemsize * each.numel(name) for each in self.weights]

    def fill(self, name: str, start: int, count: int, digests: list[Digest] | None) -> list[Future[Tensor]]:
        """Begin to read the same stretch of every input, into the half that was not used last."""
        half = start // READ_ELEMENTS % 2
        return [
            self._pool.submit(
                self._read, number, (name, start, count), half, digests[number] if digests else None
            )
            for number in range(len(self.weights))
        ]

    def _read(self, number: int, stretch: tuple[str, int, int], half: int, digest: Digest | None) -> Tensor:
        name, start, count = stretch
        dtype = DTYPES[self.weights[number].dtype(name)]
        raw = self._raw[half, number, : count * dtype.itemsize].view(dtype)
        self.weights[number].read_flat(name, start, raw)
        if digest:
            digest.add(raw)
        return raw


class _Tensor:
    """One tensor of all inputs, as blocks; the first walk through it gathers the digests."""

    def __init__(self, name: str, buffers: _Buffers, has_base: bool) -> None:
        self.name, self.digests = name, [Digest() for _ in buffers.weights]
        self._buffers, self._has_base, self._walked = buffers, has_base, False
        stored = [DTYPES[each.dtype(name)] for each in buffers.weights]
        exact = torch.float64 if torch.float64 in stored else torch.float32
        self._block = torch.empty(len(stored), BLOCK_ELEMENTS, dtype=exact)
        self._numel = buffers.weights[0].numel(name)

    def __iter__(self) -> Iterator[Block]:
        digests = None if self._walked else self.digests
        self._walked = True
        pending = self._fill(0, digests)
        for start in range(0, self._numel, READ_ELEMENTS):
            raws = [future.result() for future in pending]
            self._buffers.progress.add(sum(raw.nbytes for raw in raws))
            pending = self._fill(start + READ_ELEMENTS, digests)
            for parts in zip(*(raw.split(BLOCK_ELEMENTS) for raw in raws), strict=True):
                block = self._block[:, : len(parts[0])]
                for row_E, part in zip(block, parts, strict=True):
                    row_E.copy_(part)
                yield Block(block[0], block[1:]) if self._has_base else Block(None, block)

    def _fill(self, start: int, digests: list[Digest] | None) -> list[Future[Tensor]]:
        if start >= self._numel:
            return []
        return self._buffers.fill(self.name, start, min(READ_ELEMENTS, self._numel - start), digests)
