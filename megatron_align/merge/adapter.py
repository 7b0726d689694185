"""Low-rank adapters and complete models: merge an adapter into its base, or extract one from a trained model.

Tensors are read and written in blocks of rows. In memory are A and B, which are small, and a few blocks; for an
extraction the difference of one tensor and its singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from megatron_align.errors import InputError, require
from megatron_align.hf.adapter import (
    WEIGHTS,
    base_hash,
    read_adapter,
    read_tensors,
    require_base,
    write_adapter,
)
from megatron_align.hf.assets import copy_assets, write_config_dtype
from megatron_align.hf.hub import model_folder
from megatron_align.hf.load import largest_difference, open_hf, require_tied_head, weights_hash
from megatron_align.hf.safetensors import DTYPES, HFWeights
from megatron_align.hf.writer import ShardWriter, TensorSpec, hf_specs
from megatron_align.merge.merge import open_alike
from megatron_align.model.adapter_start import truncated_svd
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import (
    EMBED_TOKENS,
    MAGNITUDE,
    PEFT,
    Adapter,
    adapter_tensors,
    module_name,
    select_modules,
)
from megatron_align.model.families.saved_modules import SCORE
from megatron_align.storage.atomic_write import require_new, require_one_process, require_space
from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.journal import fingerprint
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import count_nonfinite
from megatron_align.storage.threads import in_order, single_threaded

BLOCK_ELEMENTS = 1 << 19  # of a tensor, merged at once: in fp32 they fit a core's cache
EXACT = 1024  # matrices with a side up to this are decomposed completely, others by random projections
_OVERSAMPLING, _ITERATIONS = 16, 6


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path, dtype: str | None = None) -> int:
    """Write ``base + scale x B A`` as a Hugging Face folder; the sum is taken in fp32 and rounded once.

    The write is atomic and resumes after a kill.

    Args:
        base: Hugging Face folder, or name on the hub.
        adapter: PEFT folder of an adapter of the base.
        out: folder to write, new or empty.
        dtype: of the result (``"bfloat16"``); None: that of each base tensor.

    Returns:
        the number of tensors that the adapter changes.

    Raises:
        InputError: the adapter is not of this base, either or the result holds non-finite values, or ``out`` is not
            usable.
    """
    require_one_process()
    base = model_folder(base)
    weights, shape = open_hf(base)
    require_tied_head(weights, shape)
    found = read_adapter(adapter, shape)
    target = require_new(out)
    stored = {name: getattr(torch, dtype) if dtype else DTYPES[weights.dtype(name)] for name in weights.names}
    specs = {
        name: TensorSpec(stored[name], size) for name, (_, size) in hf_specs(shape, torch.float32).items()
    }
    require_space(target, sum(spec.nbytes for spec in specs.values()))
    tensors = read_tensors(adapter, copies=False)
    inputs = _Inputs(weights, HFWeights(adapter, WEIGHTS), found, tensors)
    key = {"adapter": [fingerprint(Path(folder)) for folder in (base, adapter)], "dtype": dtype}
    with (
        ShardWriter(target, specs, key=key) as writer,
        Progress("merging", sum(spec.nbytes for spec in specs.values())) as progress,
        BackgroundWorker() as writing,
        BackgroundWorker() as hashing,
        single_threaded(),
    ):
        if base_hash(adapter) is not None:  # hashed while it is merged: a disk reads it once for both
            hashing.run(lambda: require_base(adapter, weights_hash(Path(base)), base))
        missing = {name: spec for name, spec in specs.items() if not writer.has(name)}
        progress.add(sum(spec.nbytes for name, spec in specs.items() if name not in missing))
        for block in in_order(_merges(inputs, missing)):
            writing.run(partial(writer.write_flat, block.name, block.start, block.elements))
            if block.start + len(block.elements) == math.prod(specs[block.name].shape):
                writing.run(partial(writer.finish, block.name))
                weights.release(block.name)
                progress.add(specs[block.name].nbytes)
        writing.wait()
        hashing.wait()
        copy_assets(base, writer.partial)
        if dtype:
            write_config_dtype(writer.partial, getattr(torch, dtype))
    return len(found.modules) + len(found.saved) + shape.is_reward


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A base and an adapter of it.

    Args:
        weights: of the base.
        copies: of the adapter's file, which holds complete modules too.
        adapter: options.
        tensors: A, B and magnitudes by PEFT's names.
    """

    weights: HFWeights
    copies: HFWeights
    adapter: Adapter
    tensors: Mapping[str, Tensor]

    def source(self, name: str) -> tuple[HFWeights, str]:
        """Return which file a Hugging Face tensor is read from, and its name there."""
        module = module_name(name)
        if module in self.adapter.saved or module == SCORE:
            return self.copies, f"{PEFT}{name}"
        return self.weights, name


class AdaptedWeights:
    """The tensors of a base with an adapter, computed in fp32 as they are read.

    Args:
        base: weights of the base.
        folder: PEFT's.
        adapter: of the folder.
    """

    def __init__(self, base: HFWeights, folder: Path, adapter: Adapter):
        self._inputs = _Inputs(base, HFWeights(folder, WEIGHTS), adapter, read_tensors(folder, copies=False))

    def dtype(self, name: str) -> str:
        """Return the dtype of the elements that :meth:`read_flat` gives."""
        weights, stored = self._inputs.source(name)
        found = weights.dtype(stored)
        return "F32" if is_adapted(name, self._inputs.adapter) and found != "F64" else found

    def numel(self, name: str) -> int:
        """Return a tensor's number of elements."""
        return self._inputs.weights.numel(name)

    def read_flat(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with the merged elements from ``start`` on; of rows that are cut, the part within."""
        weights, stored = self._inputs.source(name)
        if not is_adapted(name, self._inputs.adapter):
            weights.read_flat(stored, start, out)
            return
        columns = self._inputs.weights.shape(name)[1]
        first, last = start // columns, -(-(start + len(out)) // columns)
        block = torch.empty((last - first) * columns, dtype=DTYPES[weights.dtype(stored)])
        weights.read_flat(stored, first * columns, block)
        inputs, rows = self._inputs, slice(first, last)
        merged = merged_rows(name, rows, block.view(-1, columns), inputs.adapter, inputs.tensors)
        begin = start - first * columns
        out.copy_(merged.reshape(-1)[begin : begin + len(out)])

    def release(self, name: str) -> None:
        """Do nothing: the base's own reader drops what all have read."""


class _Block(NamedTuple):
    """Elements of a merged tensor from ``start`` on, one-dimensional, in memory of their own."""

    name: str
    start: int
    elements: Tensor


def _merges(inputs: _Inputs, specs: Mapping[str, TensorSpec]) -> Iterator[Callable[[], _Block]]:
    """Yield the calls that read and merge the blocks of all tensors, in order."""
    for name, spec in specs.items():
        count = max(1, BLOCK_ELEMENTS // math.prod(spec.shape[1:]))
        for first in range(0, spec.shape[0], count):
            yield partial(_merge_block, inputs, name, spec, slice(first, min(first + count, spec.shape[0])))


def _merge_block(inputs: _Inputs, name: str, spec: TensorSpec, rows: slice) -> _Block:
    """Read rows of a tensor, with the adapter if it changes them.

    Raises:
        InputError: they are not finite, stored or merged.
    """
    weights, stored_name = inputs.source(name)
    columns = math.prod(spec.shape[1:])
    block = torch.empty((rows.stop - rows.start) * columns, dtype=DTYPES[weights.dtype(stored_name)])
    weights.read_flat(stored_name, rows.start * columns, block)
    merged = block
    if is_adapted(name, inputs.adapter):
        merged = merged_rows(name, rows, block.view(-1, columns), inputs.adapter, inputs.tensors).reshape(-1)
    stored = merged.to(spec.dtype)
    if count_nonfinite(stored) != (0, 0):
        _refuse_nonfinite(stored_name, block, spec, weights)
    return _Block(name, rows.start * columns, stored)


def is_adapted(name: str, adapter: Adapter) -> bool:
    """Return whether an adapter changes a Hugging Face tensor."""
    return name.endswith(".weight") and module_name(name) in adapter.modules


def weight_delta(name: str, rows: slice, adapter: Adapter, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return these rows of ``scale x B A``, what an adapter adds to a Hugging Face tensor, in fp32."""
    module = module_name(name)
    a, b = (tensors[factor].float() for factor in adapter_tensors(module))
    if module == EMBED_TOKENS:  # of an embedding A has the vocabulary
        return (a.T[rows] @ b.T).mul_(adapter.scale)
    return (b[rows] @ a).mul_(adapter.scale)


def merged_rows(
    name: str, rows: slice, weight: Tensor, adapter: Adapter, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Return rows of a Hugging Face tensor with the adapter, at least in fp32.

    Args:
        name: of the tensor.
        rows: of it.
        weight: these rows of the base. DoRA's lengths are rounded to its dtype, and divide the magnitudes in the dtype
            that those are stored in or the weight's, the wider: as in training and in PEFT.
        adapter: options.
        tensors: of the adapter, by PEFT's names.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    merged = weight_delta(name, rows, adapter, tensors).to(exact).add_(weight)
    if adapter.dora:
        magnitude = tensors[f"{PEFT}{module_name(name)}{MAGNITUDE}"][rows]
        merged *= (magnitude / merged.norm(dim=1).to(weight.dtype))[:, None].to(exact)
    return merged


def _refuse_nonfinite(name: str, block: Tensor, spec: TensorSpec, weights: HFWeights) -> NoReturn:
    """Raise InputError for a merged block that is not finite: ``block`` is what it was made of."""
    if count_nonfinite(block) != (0, 0):
        raise InputError(f"weights must be finite, {name} is not in {weights.folder}")
    raise InputError(
        f"the merged weights are not finite in {str(spec.dtype).removeprefix('torch.')}: {name}; choose a dtype of "
        "wider range by --dtype"
    )


@dataclass(frozen=True, slots=True)
class Extracted:
    """An extracted adapter's share of the difference of two models.

    Args:
        modules: number of adapted linear layers.
        share: of the sum of squares of all of their differences.
        worst: smallest share of one module.
        worst_module: its name.
        left_out: largest difference of each tensor that has no adapter and differs.
    """

    modules: int
    share: float
    worst: float
    worst_module: str
    left_out: dict[str, float]


def extract_adapter(
    base: str | Path, model: str | Path, out: str | Path, rank: int, targets: list[str] | None = None
) -> Extracted:
    """Write the adapter of a rank that comes nearest to ``model - base``: its largest singular values.

    Args:
        base: Hugging Face folder.
        model: Hugging Face folder of a model of the base's architecture and sizes.
        out: PEFT folder to write, new or empty; its alpha is the rank, so that its scale is 1.
        rank: of the adapter.
        targets: names or patterns of modules; None: all linear layers of the transformer.

    Raises:
        InputError: the folders do not fit each other, or nothing differs.
    """
    require_one_process()
    base, model = model_folder(base), model_folder(model)
    require(rank >= 1, f"--rank must be at least 1, got {rank}")
    target = require_new(out)
    opened, shape = open_alike([Path(base), Path(model)])
    ours, theirs = opened[Path(base)], opened[Path(model)]
    adapter = Adapter(
        rank=rank, alpha=float(rank), rslora=False, modules=select_modules(shape, targets or "all-linear")
    )
    require_rank(adapter, shape)
    tensors: dict[str, Tensor] = {}
    left_out: dict[str, float] = {}
    squares: dict[str, tuple[float, float]] = {}  # of the difference, and of what the adapter holds of it
    specs = hf_specs(shape, torch.float32)
    with Progress("extracting", sum(spec.nbytes for spec in specs.values())) as progress:
        for name, spec in specs.items():
            module = module_name(name)
            if module in adapter.modules and name.endswith(".weight"):
                difference = (_read(theirs, name) - _read(ours, name)).reshape(spec.shape)
                a, b, held = nearest_factors(difference.T if module == EMBED_TOKENS else difference, rank)
                tensors |= dict(zip(adapter_tensors(module), (a, b), strict=True))
                squares[module] = (difference.double().square().sum().item(), held)
            elif (largest := largest_difference(_read(theirs, name), _read(ours, name))) != 0:
                left_out[name] = largest
            progress.add(spec.nbytes)
    total = sum(square for square, _ in squares.values())
    require(total > 0, f"the models must differ in the adapted layers, {model} equals {base} there")
    if shape.is_reward:
        tensors[f"{PEFT}score.weight"] = _read(theirs, "score.weight").reshape(1, -1)
        left_out.pop("score.weight", None)
    write_adapter(target, tensors, adapter, shape, str(base), weights_hash(Path(base)))
    shares = {module: held / square for module, (square, held) in squares.items() if square > 0}
    worst = min(shares, key=lambda module: shares[module])
    held = sum(held for _, held in squares.values())
    return Extracted(len(squares), held / total, shares[worst], worst, left_out)


def require_rank(adapter: Adapter, shape: ModelShape) -> None:
    """Refuse a rank that is larger than a module's smaller side."""
    sizes = hf_specs(shape, torch.float32)
    smallest = min((min(sizes[f"{module}.weight"].shape), module) for module in adapter.modules)
    require(
        adapter.rank <= smallest[0],
        f"--rank must be at most {smallest[0]}, the smaller side of {smallest[1]}, got {adapter.rank}",
    )


def _read(weights: HFWeights, name: str) -> Tensor:
    """Return a tensor as one dimension of fp32. Raises InputError if it is not finite."""
    tensor = torch.cat([block.float() for block in weights.blocks(name)])
    if count_nonfinite(tensor) != (0, 0):
        raise InputError(f"weights must be finite, {name} is not in {weights.folder}")
    return tensor


def nearest_factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return A and B whose product comes nearest to a matrix, and the sum of squares that they hold of it."""
    if min(difference.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    else:
        u, s, vh = truncated_svd(difference, rank + _OVERSAMPLING, _ITERATIONS)
    root = s[:rank].sqrt()
    a, b = (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()
    return a, b, s[:rank].double().square().sum().item()
