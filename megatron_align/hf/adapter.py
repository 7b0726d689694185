"""PEFT folders of low-rank adapters: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from megatron_align.errors import InputError, TrainingFault, listed, shown
from megatron_align.hf.adapter_checks import (
    require_equal_copies,
    require_linear,
    require_no_tied,
    require_one_use,
    require_targets,
    without_base,
)
from megatron_align.hf.adapter_start import plain_adapter, plain_tensors
from megatron_align.hf.gather import collect, owning_stages
from megatron_align.hf.safetensors import open_safetensors
from megatron_align.hf.writer import PYTORCH, hf_specs, save_tensors
from megatron_align.model.families import ModelShape, Row, copy_segments, read_json, rows
from megatron_align.model.families.adapter import (
    PEFT,
    Adapter,
    adaptable_modules,
    adapter_tensors,
    all_adapter_rows,
    is_low_rank,
    linear_modules,
    module_name,
    start_rows,
)
from megatron_align.model.families.saved_modules import (
    SCORE,
    copies_of,
    is_tied_copy,
    saved_names,
    saved_rows,
    select_saved,
    with_tied_head,
)
from megatron_align.model.parallel import all_reduce_sum
from megatron_align.model.policy import Policy
from megatron_align.storage.atomic_write import commit_folder, naming_file, partial_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_HASH = "base_weights"  # in the safetensors metadata: a hash of the base's weight files
RANK, ALPHA = 16, 32.0  # where neither the configuration nor an adapter says otherwise
REWARD_HEAD = "reward_head.weight"
# Options of PEFT's LoRA that do not change what A and B mean, or are read here. Any other one must be off.
_KNOWN_NAMES = """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
    lora_alpha lora_dropout use_rslora use_dora target_modules exclude_modules layers_to_transform
    layers_pattern modules_to_save megatron_config megatron_core eva_config qalora_group_size
    runtime_config ensure_weight_tying
"""
_KNOWN = frozenset(_KNOWN_NAMES.split())
# The others (PiSSA, OLoRA, CorDA, ...) change the base's weights too.
_PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")


def read_adapter(folder: str | Path, shape: ModelShape, *, linear_copies: bool = False) -> Adapter:
    """Return the adapter of a PEFT folder, having checked that it fits a model.

    Args:
        folder: PEFT's.
        shape: of the model.
        linear_copies: accept complete copies of linear layers, which can be merged but not trained.

    Raises:
        InputError: it is missing, incomplete, of another model, or of a kind that is not built.
    """
    folder = Path(folder)
    config = _read_config(folder)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and alpha > 0):
        raise InputError(
            f"an adapter needs a positive r and lora_alpha, found {rank!r} and {alpha!r} in {folder / CONFIG}"
        )
    saved = _saved_modules(config, shape, folder, linear_copies)
    with _open(folder) as file:
        sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    modules = frozenset(module for module in adaptable_modules(shape) if adapter_tensors(module)[0] in sizes)
    adapter = Adapter(
        rank=rank,
        alpha=float(alpha),
        rslora=bool(config.get("use_rslora")),
        modules=modules,
        dora=bool(config.get("use_dora")),
        saved=saved,
    )
    require_no_tied(adapter, shape, folder / WEIGHTS)
    require_linear(adapter, f"use_dora in {folder / CONFIG}")
    require_one_use(adapter, f"modules_to_save in {folder / CONFIG}")
    _check_tensors(adapter, shape, without_base(sizes, adapter), folder)
    require_targets(config, adapter, shape, folder)
    with _open(folder) as file:
        require_equal_copies(file, adapter, shape, folder / WEIGHTS)
    return adapter


def _saved_modules(
    config: Mapping[str, Any], shape: ModelShape, folder: Path, linear: bool
) -> frozenset[str]:
    """Return the modules of which the folder has complete copies, without a reward model's score."""
    names = config.get("modules_to_save") or []
    if not shape.is_reward and set(names) & {SCORE, "classifier"}:
        raise InputError(
            "a reward model's adapter of a language model is not merged: the run's hf/ is the merged model, found in "
            f"{folder / CONFIG}"
        )
    tied = bool(config.get("ensure_weight_tying"))
    option = f"modules_to_save in {folder / CONFIG}"
    return select_saved(shape, names, tied=tied, option=option, linear=linear)


def base_hash(folder: str | Path) -> str | None:
    """Return the hash of the base's weights that an adapter was trained on; None: it does not say."""
    with _open(Path(folder)) as file:
        return (file.metadata() or {}).get(BASE_HASH)


def base_name(folder: str | Path) -> str | None:
    """Return the path or name of the base model that an adapter's configuration states; None: it states none."""
    return _read_config(Path(folder)).get("base_model_name_or_path") or None


def read_tensors(folder: str | Path, *, copies: bool = True) -> dict[str, Tensor]:
    """Return an adapter's tensors by PEFT's names, checked to be finite.

    Args:
        folder: PEFT's.
        copies: those of complete modules too, which may be large.

    Raises:
        InputError: there are none, or one is not finite.
    """
    with _open(Path(folder)) as file:
        names = [name for name in file.keys() if not name.endswith("base_layer.weight")]  # noqa: SIM118
        names = [name for name in names if copies or is_low_rank(name)]
        tensors = {name: file.get_tensor(name) for name in names}
    require_finite_tensors(tensors, Path(folder) / WEIGHTS)
    return tensors


def require_finite_tensors(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse an adapter that is not finite.

    Raises:
        InputError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"adapter weights must be finite, {name} is not in {source}")


def require_base(folder: str | Path, weights_hash: str, base: str | Path) -> None:
    """Refuse an adapter that says that it was trained on other weights; PEFT's own adapters do not say.

    Raises:
        InputError: naming both hashes.
    """
    stored = base_hash(folder)
    if stored not in (None, weights_hash):
        raise InputError(
            f"the adapter is of another base: it was trained on weights with sha256 {str(stored)[:16]}, those in "
            f"{base} have {weights_hash[:16]} (adapter {folder})"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(f"no adapter folder at {folder}")
    if not (folder / CONFIG).is_file():
        inside = next((path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))), None)
        hint = f": give {inside}" if inside else ""
        raise InputError(f"an adapter folder must hold {CONFIG}, found none in {folder}{hint}")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise InputError(f"peft_type must be LORA, found {config.get('peft_type')!r} in {folder / CONFIG}")
    plain: dict[str, tuple[Any, ...]] = {"bias": ("none", None), "init_lora_weights": _PLAIN_INIT}
    for key, value in config.items():
        if key not in _KNOWN and value not in plain.get(key, (False, None, {}, [])):
            remedy = ""
            if key == "init_lora_weights":
                remedy = "; it changed the base: save it with PEFT's path_initial_model_for_weight_conversion"
            raise InputError(
                f"an adapter with {key} {shown(value)} is not built, found in {folder / CONFIG}{remedy}"
            )
    return config


def _open(folder: Path) -> safe_open:
    if (folder / WEIGHTS).is_file():
        return open_safetensors(folder / WEIGHTS)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    found = f"; {pickles[0]} is a pickle and is not read: convert it to safetensors first" if pickles else ""
    raise InputError(f"an adapter folder must hold {WEIGHTS}, found none in {folder}{found}")


def _check_tensors(
    adapter: Adapter, shape: ModelShape, sizes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    table = {row.hf[0]: row.hf_shapes(shape)[0] for row in adapter_table(shape, adapter)}
    linear = set(linear_modules(shape)) & adapter.saved
    sizes_of_base = hf_specs(shape, torch.float32)
    table |= {
        f"{PEFT}{name}": spec.shape for name, spec in sizes_of_base.items() if module_name(name) in linear
    }
    expected = with_tied_head(table, shape, adapter)
    missing, unexpected = sorted(expected.keys() - sizes.keys()), sorted(sizes.keys() - expected.keys())
    if missing or unexpected or not adapter.modules:
        kinds = [("missing", missing), ("unexpected", unexpected)]
        reason = "; ".join(f"{kind} {listed(names)}" for kind, names in kinds if names) or "it has no tensors"
        raise InputError(f"the adapter does not match {shape.architecture}: {reason} in {folder / WEIGHTS}")
    wrong = [
        f"{name} must be {list(size)}, found {list(sizes[name])}"
        for name, size in expected.items()
        if sizes[name] != size
    ]
    if wrong:
        raise InputError(
            f"the adapter is of another size than the model or its r: {listed(wrong)} in {folder / WEIGHTS}"
        )


def adapter_table(
    shape: ModelShape, adapter: Adapter, tensor_ranks: int = 1, *, with_start: bool = False
) -> Iterator[Row]:
    """Yield the rows of an adapter's tensors, of the copies and of the reward head that are trained with it.

    Args:
        shape: of the model.
        adapter: rank and modules.
        tensor_ranks: that share a layer.
        with_start: with those of what A and B started with, where the base lacks it.
    """
    yield from all_adapter_rows(shape, adapter, tensor_ranks)
    if with_start:
        yield from start_rows(shape, adapter, tensor_ranks)
    yield from saved_rows(shape, adapter)
    for row in rows(shape):
        if row.megatron == REWARD_HEAD:
            yield Row(row.megatron, (f"{PEFT}{row.hf[0]}",), row.dims)


@torch.no_grad()
def load_adapter(folder: str | Path, chunks: Sequence[Policy]) -> None:
    """Fill this rank's A and B (and reward head) from a PEFT folder, cast to their dtype.

    Raises:
        InputError: the folder does not match the model or the adapter of its chunks.
    """
    adapter = read_adapter(folder, chunks[0].shape)
    with _open(Path(folder)) as file:
        fill_adapter(chunks, adapter, file.get_tensor)


@torch.no_grad()
def fill_adapter(chunks: Sequence[Policy], adapter: Adapter, tensor: Callable[[str], Tensor]) -> None:
    """Fill this rank's A and B (and reward head), cast to their dtype; ``tensor`` returns one by PEFT's name."""
    shape, groups = chunks[0].shape, chunks[0].pg_collection
    local = {name: p for chunk in chunks for name, p in chunk.trained_parameters().items()}
    for row in adapter_table(shape, adapter, groups.tp.size()):
        for parameter in (local[name] for name in copies_of(row, shape) if name in local):
            stored = tensor(row.hf[0])
            for segment in copy_segments(row, shape, groups.tp.rank(), groups.tp.size()):
                segment.of_megatron(parameter).copy_(segment.of_hf(stored))


@torch.no_grad()
def export_adapter(chunks: list[Policy], folder: Path, base: str, weights_hash: str) -> None:
    """Write the adapter that all ranks hold as a PEFT folder; every rank calls this, rank 0 writes, atomically.

    Rank 0 holds all of the adapter's tensors in host memory. An existing folder is replaced.

    Args:
        chunks: this rank's chunks.
        folder: to be written.
        base: what adapter_config.json names as the base model.
        weights_hash: of the base's weights.

    Raises:
        TrainingFault: on every rank: the adapter is not finite; nothing is written.
    """
    policy = chunks[0]
    groups, adapter = policy.pg_collection, policy.adapter
    assert adapter is not None, "the model has an adapter"
    local = _stored_parameters(chunks)
    bad = sum(not parameter.isfinite().all() for parameter in local.values())
    if all_reduce_sum([float(bad)])[0]:
        raise TrainingFault(
            f"the trained adapter is not finite, no folder was written to {folder}; start from an older checkpoint, "
            "with a smaller optimizer.lr"
        )
    if groups.dp_cp.rank() == 0:
        tensors = gather_adapter(chunks)
        if dist.get_rank() == 0:
            tensors = plain_tensors(adapter, tensors)
            write_adapter(folder, tensors, plain_adapter(adapter), policy.shape, base, weights_hash)
    dist.barrier()


@torch.no_grad()
def gather_adapter(chunks: Sequence[Policy], *, everywhere: bool = False) -> dict[str, Tensor]:
    """Return the tensors of the adapter that a model's ranks hold, by PEFT's names, and what A and B started with.

    Collective over a model's ranks; each data- and context-parallel rank gathers by itself.

    Args:
        chunks: this rank's.
        everywhere: give the tensors to every rank; otherwise only the first tensor rank of the first stage has them, in
            host memory.
    """
    policy, local = chunks[0], _stored_parameters(chunks)
    groups, adapter = policy.pg_collection, policy.adapter
    assert adapter is not None, "the model has an adapter"
    owners = owning_stages(set(local), groups.pp)
    tensors: dict[str, Tensor] = {}
    for row in adapter_table(policy.shape, adapter, groups.tp.size(), with_start=True):
        found = collect(row, local.get(row.megatron), owners[row.megatron], policy, everywhere=everywhere)
        tensors |= found if everywhere else {name: tensor.cpu() for name, tensor in found.items()}
    return with_tied_head(tensors, policy.shape, adapter)


def _stored_parameters(chunks: Sequence[Policy]) -> dict[str, nn.Parameter]:
    return {name: p for chunk in chunks for name, p in chunk.stored_parameters().items()}


def write_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    shape: ModelShape,
    base: str,
    weights_hash: str | None,
) -> None:
    """Write a PEFT folder atomically; see :func:`export_adapter`."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    metadata = {**PYTORCH, **({BASE_HASH: weights_hash} if weights_hash else {})}
    is_tied_here = is_tied_copy(shape, adapter)
    stored = with_tied_head(tensors, shape, adapter)  # PEFT reads a tied copy by both names
    with naming_file("adapter", partial / WEIGHTS):
        save_tensors(stored, partial / WEIGHTS, metadata)
    saved = saved_names(shape, adapter.saved) + ([SCORE] if shape.is_reward else [])
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if shape.is_reward else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "target_modules": _target_modules(adapter, shape),
        "modules_to_save": saved or None,
        **({"ensure_weight_tying": True} if is_tied_here else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    commit_folder(partial, folder)


def _target_modules(adapter: Adapter, shape: ModelShape) -> list[str]:
    """Return the shortest names that PEFT finds exactly the adapted modules by: ``q_proj``, or complete names."""
    short = {name.rpartition(".")[2] for name in adapter.modules}
    everywhere = {name for name in adaptable_modules(shape) if name.rpartition(".")[2] in short}
    return sorted(short if everywhere == adapter.modules else adapter.modules)
