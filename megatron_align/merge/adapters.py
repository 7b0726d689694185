"""Merge several low-rank adapters of one base: into one adapter, or with the base into a complete model.

A task vector ``d_i = scale_i B_i A_i`` is what an adapter adds to a tensor, and the formulas are those of complete
models. ``base + sum(w_i d_i)`` is again that of a low-rank adapter: of the concatenated A and B, or the nearest of a
smaller rank. Other formulas change single elements, and the nearest adapter of a rank holds a part of their result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_align.errors import InputError, listed, require
from megatron_align.hf.adapter import (
    CONFIG,
    base_hash,
    base_name,
    read_adapter,
    read_tensors,
    write_adapter,
)
from megatron_align.hf.assets import copy_assets, write_config_dtype
from megatron_align.hf.hub import is_hub_name, model_folder
from megatron_align.hf.load import open_hf, require_tied_head, weights_hash
from megatron_align.hf.safetensors import DTYPES, HFWeights
from megatron_align.hf.writer import ShardWriter, TensorSpec, hf_specs
from megatron_align.merge.adapted_weights import AdaptedWeights
from megatron_align.merge.adapter import require_rank
from megatron_align.merge.adapter_combinations import ModuleAdapters
from megatron_align.merge.merge import Weights, merge_into
from megatron_align.merge.methods import METHODS, Method, Slerp
from megatron_align.merge.model_card import Input, write_card
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import Adapter, adapter_tensors
from megatron_align.storage.atomic_write import require_new, require_one_process, require_space
from megatron_align.storage.journal import fingerprint
from megatron_align.storage.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """How one adapter holds the result of a formula.

    Args:
        kind: ``cat``: A and B are concatenated, so that nothing is lost; ``svd``: the nearest adapter of ``rank``;
            ``linear``: A and B are summed by themselves, PEFT's approximation. None: ``cat`` where the formula is a
            weighted sum, else ``svd``.
        rank: of ``svd``; None: the largest of the adapters'.
    """

    kind: str | None = None
    rank: int | None = None

    def chosen(self, method: Method, models: int) -> str:
        """Return the kind for a formula.

        Raises:
            InputError: the formula's result cannot be held so.
        """
        require(
            not isinstance(method, Slerp),
            "slerp interpolates complete weights, whose difference from the base is no adapter: give --merged, which "
            "writes the complete model",
        )
        is_sum = method.task_weights(torch.eye(models)) is not None
        require(
            is_sum or self.kind in (None, "svd"),
            f"--combination must be svd with {_name(method)}, whose result is no weighted sum of the adapters; got "
            f"{self.kind}",
        )
        kind = self.kind or ("cat" if is_sum else "svd")
        require(
            self.rank is None or kind == "svd",
            f"--rank belongs to --combination svd, got {self.rank} with {kind}",
        )
        require(self.rank is None or self.rank >= 1, f"--rank must be at least 1, got {self.rank}")
        return kind


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """An adapter that was merged from several.

    Args:
        adapter: rank and modules.
        combination: how it holds the result.
        share: of the sum of squares of the merged task vectors; 1: all of them.
    """

    adapter: Adapter
    combination: str
    share: float


@dataclass(frozen=True, slots=True)
class _Adapters:
    """Adapters of one base, opened and checked against it.

    Args:
        base: folder.
        shape: of the base.
        weights: of the base.
        folders: of the adapters.
        adapters: their options.
        weights_hash: of the base, where every adapter states it; None: one does not.
    """

    base: Path
    shape: ModelShape
    weights: HFWeights
    folders: tuple[Path, ...]
    adapters: tuple[Adapter, ...]
    weights_hash: str | None


def are_adapters(models: Sequence[str | Path]) -> bool:
    """Return whether the folders to merge are PEFT's.

    Raises:
        InputError: some are and some are not, or one is a run's folder that has an adapter inside.
    """
    found = [(Path(folder) / CONFIG).is_file() for folder in models]
    for folder in map(Path, models):
        inside = folder / "adapter"
        require(
            (folder / "config.json").is_file() or not (inside / CONFIG).is_file(),
            f"{folder} is the folder of a run: give its adapter, {inside}, or its merged model, {folder / 'hf'}",
        )
    if not any(found):
        return False
    other = [str(folder) for folder, is_adapter in zip(models, found, strict=True) if not is_adapter]
    require(
        not other,
        f"--models must all be adapters (PEFT folders), or all complete models; of the {len(found)}, "
        f"{listed(other)} {'is' if len(other) == 1 else 'are'} no adapter",
    )
    return True


def merge_adapters(
    method: Method,
    base: str | Path | None,
    models: Sequence[str | Path],
    out: str | Path,
    dtype: str | None = None,
    combination: Combination = Combination(),
) -> MergedAdapter:
    """Write one adapter of the base, a PEFT folder whose scale is 1.

    Args:
        method: formula and options.
        base: Hugging Face folder of the model that the adapters were trained on; None: the one that all of them name.
        models: PEFT folders of the adapters, of the same modules.
        out: PEFT folder to write, new or empty.
        dtype: of the result (``"bfloat16"``); None: as stored, which must then be equal in all.
        combination: how the adapter holds the result.

    Raises:
        InputError: the adapters are not of one base or the same modules, their kind or the formula has no merged
            adapter, or ``out`` is not usable.
    """
    require_one_process()
    method.check(len(models))
    kind = combination.chosen(method, len(models))
    opened = _open(base, models)
    _require_mergeable(opened, kind)
    adapter = _merged_adapter(opened.adapters, kind, combination.rank)
    if kind == "svd":
        require_rank(adapter, opened.shape)
    target = require_new(out)
    tensors = [read_tensors(folder) for folder in opened.folders]
    written = _dtype(tensors, opened.folders, dtype)
    found: dict[str, Tensor] = {}
    squares = held = 0.0
    with Progress("merging", len(adapter.modules)) as progress:
        for module in sorted(adapter.modules):
            merged = ModuleAdapters(module, opened.adapters, tensors).merged(method, kind, adapter.rank)
            for name, factor in zip(adapter_tensors(module), merged[:2], strict=True):
                found[name] = factor.to(written).contiguous()
                require(
                    bool(found[name].isfinite().all()),
                    f"the merged adapter is not finite in {str(written).removeprefix('torch.')}: {name}; choose other "
                    "weights or scales, or a dtype of wider range by --dtype",
                )
            squares, held = squares + merged.squares, held + merged.held
            progress.add(1)
    write_adapter(target, found, adapter, opened.shape, str(opened.base), opened.weights_hash)
    return MergedAdapter(adapter, kind, held / squares if squares else 1.0)


def merge_adapted_models(
    method: Method,
    base: str | Path | None,
    models: Sequence[str | Path],
    out: str | Path,
    dtype: str | None = None,
) -> list[Input]:
    """Write the complete model of a formula on the base with each adapter, which is computed in fp32 as it is read.

    The write is atomic and resumes after a kill. Arguments as :func:`merge_adapters`, but that each tensor's dtype is
    the base's where none is given.

    Raises:
        InputError: the adapters are not of the base, something is not finite, or ``out`` is not usable.
    """
    require_one_process()
    opened = _open(base, models)
    entries: list[tuple[str, Path, Weights]] = [
        (f"adapter {number}", folder, AdaptedWeights(opened.weights, folder, adapter))
        for number, (folder, adapter) in enumerate(zip(opened.folders, opened.adapters, strict=True), start=1)
    ]
    of_base: list[tuple[str, Path, Weights]] = [("base", opened.base, opened.weights)]
    if method.starts_at_base and len(entries) == 1:
        entries = of_base + entries
    method.check(len(entries))
    entries = of_base + entries if method.needs_base else entries
    fixed = getattr(torch, dtype) if dtype else None
    specs = {
        name: TensorSpec(fixed or DTYPES[opened.weights.dtype(name)], spec.shape)
        for name, spec in hf_specs(opened.shape, torch.float32).items()
    }
    target = require_new(out)
    require_space(target, sum(spec.nbytes for spec in specs.values()))
    key: dict[str, Any] = {
        "merge_adapters": type(method).__name__,
        "options": asdict(method),
        "dtype": dtype,
        "inputs": [fingerprint(folder) for folder in (opened.base, *opened.folders)],
    }
    with ShardWriter(target, specs, key=key) as writer:
        inputs = merge_into(writer, method, entries, specs)
        copy_assets(opened.base, writer.partial)
        if fixed:
            write_config_dtype(writer.partial, fixed)
        write_card(writer.partial, method, inputs, "the base")
    return inputs


def _open(base: str | Path | None, models: Sequence[str | Path]) -> _Adapters:
    """Open adapters and their base.

    Raises:
        InputError: an adapter is of another base, architecture or size, or the base is not here.
    """
    folders = tuple(Path(folder) for folder in models)
    hashes = {folder: base_hash(folder) for folder in folders}
    stated = {weights: folder for folder, weights in hashes.items() if weights is not None}
    if len(stated) > 1:
        (one, first), (other, second) = list(stated.items())[:2]
        raise InputError(
            f"the adapters are of different bases: {first} was trained on weights with sha256 {one[:16]}, {second} on "
            f"those with {other[:16]}"
        )
    folder = Path(model_folder(base if base is not None else _named_base(folders)))
    weights, shape = open_hf(folder)
    require_tied_head(weights, shape)
    adapters = tuple(read_adapter(each, shape, linear_copies=True) for each in folders)
    for stored, each in stated.items():
        found = weights_hash(folder)
        require(
            found == stored,
            f"the adapter is of another base: it was trained on weights with sha256 {stored[:16]}, those in {folder} "
            f"have {found[:16]} (adapter {each})",
        )
    known = next(iter(stated)) if None not in hashes.values() else None
    return _Adapters(folder, shape, weights, folders, adapters, known)


def _named_base(folders: Sequence[Path]) -> str:
    """Return the base that all adapters name."""
    names = {folder: base_name(folder) for folder in folders}
    found = set(names.values())
    require(
        len(found) == 1,
        f"the adapters name different bases, {listed([f'{name} in {folder}' for folder, name in names.items()])}: give "
        "the one that they were trained on as --base",
    )
    [name] = found
    if name is None or not (is_hub_name(name) or Path(name).is_dir()):
        raise InputError(f"the adapters' base {name or '(they name none)'} is not here: give it as --base")
    return name


def _require_mergeable(opened: _Adapters, combination: str) -> None:
    """Refuse adapters that have no merged adapter."""
    first = opened.adapters[0]
    whole = "; --merged writes the complete model of a formula"
    for folder, adapter in zip(opened.folders, opened.adapters, strict=True):
        require(
            not adapter.dora,
            f"adapters with DoRA do not add up: each scales the rows of the sum; found use_dora in {folder}{whole}",
        )
        copies = sorted(adapter.saved) + (["score"] if opened.shape.is_reward else [])
        require(
            not copies,
            f"adapters with complete copies of modules have no merged adapter, found modules_to_save {listed(copies)} "
            f"in {folder}{whole}",
        )
        apart = sorted(adapter.modules ^ first.modules)
        require(
            not apart,
            f"the adapters must change the same modules: {listed(apart)} {'is' if len(apart) == 1 else 'are'} adapted "
            f"in one of {opened.folders[0]} and {folder} alone{whole}",
        )
        require(
            combination != "linear" or adapter.rank == first.rank,
            f"--combination linear needs adapters of one rank, got {first.rank} in {opened.folders[0]} and "
            f"{adapter.rank} in {folder}; cat and svd take any",
        )


def _merged_adapter(adapters: Sequence[Adapter], kind: str, rank: int | None) -> Adapter:
    """Return the options of the merged adapter, whose scale is 1."""
    ranks = [adapter.rank for adapter in adapters]
    of_svd = max(ranks) if rank is None else rank
    merged = {"cat": sum(ranks), "linear": ranks[0], "svd": of_svd}[kind]
    return Adapter(rank=merged, alpha=float(merged), rslora=False, modules=adapters[0].modules)


def _dtype(
    tensors: Sequence[Mapping[str, Tensor]], folders: Sequence[Path], dtype: str | None
) -> torch.dtype:
    """Return the dtype of the result."""
    if dtype is not None:
        return getattr(torch, dtype)
    stored = {
        tensor.dtype: folder
        for each, folder in zip(tensors, folders, strict=True)
        for tensor in each.values()
    }
    if len(stored) > 1:
        names = [f"{str(found).removeprefix('torch.')} in {folder}" for found, folder in stored.items()]
        raise InputError(f"the adapters have different dtypes: {listed(names)}; choose one by --dtype")
    return next(iter(stored))


def _name(method: Method) -> str:
    return next(name for name, kind in METHODS.items() if kind is type(method))
