"""Low-rank adapters and complete models: merge an adapter into its base, or extract one from a trained model.

Tensors are read and written in blocks of rows. In memory are A and B, which are small, and a few blocks; for an
extraction the difference of one tensor and its singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    require_finite_tensors,
    write_adapter,
)
from megatron_align.hf.assets import copy_assets, write_config_dtype
from megatron_align.hf.hub import model_folder
from megatron_align.hf.load import largest_difference, open_hf, require_tied_head, weights_hash
from megatron_align.hf.safetensors import DTYPES, HFWeights
from megatron_align.hf.writer import ShardWriter, TensorSpec, hf_specs
from megatron_align.merge.adapted_weights import BLOCK_ELEMENTS, AdapterInputs, is_adapted, merged_rows
from megatron_align.merge.merge import open_alike
from megatron_align.model.adapter_start import truncated_svd
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import (
    EMBED_TOKENS,
    LM_HEAD,
    PEFT,
    Adapter,
    adapter_tensors,
    module_name,
    select_modules,
)
from megatron_align.model.families.saved_modules import SCORE, select_saved
from megatron_align.storage.atomic_write import require_new, require_one_process, require_space
from megatron_align.storage.background_worker import BackgroundWorker
from megatron_align.storage.journal import fingerprint
from megatron_align.storage.progress import Progress
from megatron_align.storage.tensor_digest import count_nonfinite
from megatron_align.storage.threads import in_order, single_threaded

EXACT = 1024  # matrices with a side up to this are decomposed completely, others by random projections
_OVERSAMPLING, _ITERATIONS = 16, 6
EVERY = "all"  # modules that differ


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
    found = read_adapter(adapter, shape, linear_copies=True)
    target = require_new(out)
    stored = {name: getattr(torch, dtype) if dtype else DTYPES[weights.dtype(name)] for name in weights.names}
    specs = {
        name: TensorSpec(stored[name], size) for name, (_, size) in hf_specs(shape, torch.float32).items()
    }
    require_space(target, sum(spec.nbytes for spec in specs.values()))
    tensors = read_tensors(adapter, copies=False)
    inputs = AdapterInputs(weights, HFWeights(adapter, WEIGHTS), found, tensors)
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


class _Block(NamedTuple):
    """Elements of a merged tensor from ``start`` on, one-dimensional, in memory of their own."""

    name: str
    start: int
    elements: Tensor


def _merges(inputs: AdapterInputs, specs: Mapping[str, TensorSpec]) -> Iterator[Callable[[], _Block]]:
    """Yield the calls that read and merge the blocks of all tensors, in order."""
    for name, spec in specs.items():
        count = max(1, BLOCK_ELEMENTS // math.prod(spec.shape[1:]))
        for first in range(0, spec.shape[0], count):
            yield partial(_merge_block, inputs, name, spec, slice(first, min(first + count, spec.shape[0])))


def _merge_block(inputs: AdapterInputs, name: str, spec: TensorSpec, rows: slice) -> _Block:
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


def _refuse_nonfinite(name: str, block: Tensor, spec: TensorSpec, weights: HFWeights) -> NoReturn:
    """Raise InputError for a merged block that is not finite: ``block`` is what it was made of."""
    if count_nonfinite(block) != (0, 0):
        raise InputError(f"weights must be finite, {name} is not in {weights.folder}")
    raise InputError(
        f"the merged weights are not finite in {str(spec.dtype).removeprefix('torch.')}: {name}; choose a dtype of "
        "wider range by --dtype"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """An extracted adapter's share of the difference of two models.

    Args:
        adapter: its rank, its modules, and those of which it has a complete copy.
        copied_bytes: of the copies.
        share: of the sum of squares of the differences of all adapted layers.
        worst: smallest share of one module.
        worst_module: its name.
        left_out: largest difference of each tensor that differs and is not in the adapter.
        left_out_specs: dtype and shape of these tensors.
    """

    adapter: Adapter
    copied_bytes: int
    share: float
    worst: float
    worst_module: str
    left_out: dict[str, float]
    left_out_specs: dict[str, TensorSpec]

    @property
    def modules(self) -> int:
        """Number of adapted linear layers."""
        return len(self.adapter.modules)


@dataclass(frozen=True, slots=True)
class _Models:
    """A base, a model that was trained from it, and their common shape."""

    base: HFWeights
    model: HFWeights
    shape: ModelShape

    def difference(self, name: str) -> Tensor:
        """Return the difference of a tensor in fp32, in its shape."""
        return (_read(self.model, name) - _read(self.base, name)).reshape(self.model.shape(name))

    def outside(self, modules: frozenset[str]) -> dict[str, float]:
        """Return the largest difference of each tensor that differs, besides the weights of adapted modules."""
        found: dict[str, float] = {}
        for name in hf_specs(self.shape, torch.float32):
            if module_name(name) in modules and name.endswith(".weight"):
                continue
            if (largest := largest_difference(_read(self.model, name), _read(self.base, name))) != 0:
                found[name] = largest
        return found


def extract_adapter(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    rank: int | None,
    targets: list[str] | None = None,
    modules_to_save: Sequence[str] = (),
) -> Extracted:
    """Write the adapter of a rank that comes nearest to ``model - base``: its largest singular values.

    Args:
        base: Hugging Face folder.
        model: Hugging Face folder of a model of the base's architecture and sizes.
        out: PEFT folder to write, new or empty; its alpha is the rank, so that its scale is 1.
        rank: of the adapter; None: the rank that every difference has at most, so that nothing is lost.
        targets: names or patterns of modules; None: all linear layers of the transformer.
        modules_to_save: names or patterns of modules of which a complete copy is written as in ``model``, in place of A
            and B; ``all``: of every module that has a tensor outside of A and B that differs.

    Raises:
        InputError: the folders do not fit each other, or nothing differs.
    """
    require_one_process()
    base, model = model_folder(base), model_folder(model)
    require(rank is None or rank >= 1, f"--rank must be at least 1, got {rank}")
    target = require_new(out)
    opened, shape = open_alike([Path(base), Path(model)])
    models = _Models(opened[Path(base)], opened[Path(model)], shape)
    modules = select_modules(shape, targets or "all-linear")
    require_rank(Adapter(rank=rank or 1, alpha=1.0, rslora=False, modules=modules), shape)
    outside = models.outside(modules)
    saved = _select_copies(modules_to_save, shape, outside)
    require(
        bool(modules - saved),
        "an adapter needs a module with A and B: --modules-to-save leaves none of --targets, as each is copied",
    )
    rank = rank or max(min(models.model.shape(f"{module}.weight")) for module in modules - saved)
    adapter = Adapter(rank=rank, alpha=float(rank), rslora=False, modules=modules - saved, saved=saved)
    tensors, squares = _decompose(models, adapter)
    total = sum(square for square, _ in squares.values())
    require(
        total > 0 or bool(saved),
        f"the models must differ in the adapted layers, {model} equals {base} there",
    )
    copies = [name for name in hf_specs(shape, torch.float32) if module_name(name) in saved | _score(shape)]
    tensors |= {f"{PEFT}{name}": models.model.tensor(name) for name in copies}
    require_finite_tensors(tensors, Path(model))
    left_out = {name: largest for name, largest in outside.items() if name not in copies}
    write_adapter(target, tensors, adapter, shape, str(base), weights_hash(Path(base)))
    shares = {module: held / square for module, (square, held) in squares.items() if square > 0}
    worst = min(shares, key=lambda module: shares[module], default="")
    return Extracted(
        adapter=adapter,
        copied_bytes=sum(tensors[f"{PEFT}{name}"].nbytes for name in copies),
        share=sum(held for _, held in squares.values()) / total if total else 1.0,
        worst=shares.get(worst, 1.0),
        worst_module=worst,
        left_out=left_out,
        left_out_specs={
            name: TensorSpec(DTYPES[models.model.dtype(name)], models.model.shape(name)) for name in left_out
        },
    )


def _score(shape: ModelShape) -> frozenset[str]:
    """Return the head of a reward model, of which every adapter has a copy."""
    return frozenset({SCORE} if shape.is_reward else ())


def _select_copies(names: Sequence[str], shape: ModelShape, outside: Mapping[str, float]) -> frozenset[str]:
    """Return the modules of which ``--modules-to-save`` writes complete copies."""
    if list(names) == [EVERY]:
        found = set(map(module_name, outside)) - _score(shape)
        without = {LM_HEAD} if shape.norm_head else set()  # which has no copy, as its rows are normalised
        names = sorted(found - without)
    return select_saved(shape, names, tied=True, option="--modules-to-save", linear=True)


def _decompose(models: _Models, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Return A and B of every module, and of each the squared difference and what they hold of it."""
    tensors: dict[str, Tensor] = {}
    squares: dict[str, tuple[float, float]] = {}
    names = [f"{module}.weight" for module in sorted(adapter.modules)]
    with Progress("extracting", sum(models.model.numel(name) for name in names)) as progress:
        for name in names:
            module, difference = module_name(name), models.difference(name)
            is_embedding = module == EMBED_TOKENS  # whose A has the vocabulary
            a, b, held = nearest_factors(difference.T if is_embedding else difference, adapter.rank)
            tensors |= dict(zip(adapter_tensors(module), (a, b), strict=True))
            squares[module] = (difference.double().square().sum().item(), held)
            progress.add(difference.numel())
    return tensors, squares


def require_rank(adapter: Adapter, shape: ModelShape) -> None:
    """Refuse a rank that is larger than a module's smaller side."""
    sizes = hf_specs(shape, torch.float32)
    smallest = min((min(sizes[f"{module}.weight"].shape), module) for module in adapter.modules)
    require(
        adapter.rank <= smallest[0],
        f"--rank must be at most {smallest[0]}, the smaller side of {smallest[1]}, got {adapter.rank}; full is the "
        "rank at which nothing is lost",
    )


def _read(weights: HFWeights, name: str) -> Tensor:
    """Return a tensor as one dimension of fp32. Raises InputError if it is not finite."""
    tensor = torch.cat([block.float() for block in weights.blocks(name)])
    if count_nonfinite(tensor) != (0, 0):
        raise InputError(f"weights must be finite, {name} is not in {weights.folder}")
    return tensor


def nearest_factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return A and B whose product comes nearest to a matrix, and the sum of squares that they hold of it."""
    smaller = min(difference.shape)
    if smaller <= max(EXACT, rank):
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    else:
        u, s, vh = truncated_svd(difference, rank + _OVERSAMPLING, _ITERATIONS)
    kept = min(rank, smaller)  # of a smaller matrix the other rows are 0
    root = s[:kept].sqrt()
    a, b = difference.new_zeros(rank, difference.shape[1]), difference.new_zeros(difference.shape[0], rank)
    a[:kept], b[:, :kept] = root[:, None] * vh[:kept], u[:, :kept] * root
    return a, b, s[:kept].double().square().sum().item()
