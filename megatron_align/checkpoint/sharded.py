"""Our checkpoints: megatron-core's sharded tensors, the HF folder's small files, and a card. Complete or absent.

    step_000050/
        card.json      step, model, layout, configuration: what a person or a program wants to know first
        hf_assets/     config.json, tokenizer, chat template: a checkpoint needs no other folder
        state/         megatron-core's sharded tensors: weights, and optimizer state after training

A checkpoint is written into a hidden folder and renamed, so a folder of that name is whole. It can be read
on any tensor/pipeline/data-parallel layout.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException

from megatron_align.checkpoint.files import partial_folder, put_in_place
from megatron_align.checkpoint.hf import copy_assets
from megatron_align.checkpoint.state_read import read_metadata
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, read_json, read_shape
from megatron_align.model.policy import Policy

CARD, ASSETS, STATE = "card.json", "hf_assets", "state"
FORMAT = 1
_REFERENCE = "reference."  # before the names of a second model's tensors
_STEP = re.compile(r"step_(\d{6,})")


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / f"step_{step:06d}"


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """Return the complete checkpoints of a run folder, oldest first."""
    if not run.is_dir():
        return []
    found = [(match, path) for path in run.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if (path / CARD).is_file())


def find(path: str | Path) -> Path | None:
    """Return the checkpoint that ``path`` is, or the newest one of a run folder; None if it is neither."""
    path = Path(path)
    if (path / CARD).is_file():
        return path
    steps = list_steps(path)
    return steps[-1][1] if steps else None


def read_card(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's card.

    Raises:
        InputError: it is unreadable, or of a format that this version does not know.
    """
    card = read_json(folder / CARD)
    if card.get("format") != FORMAT:
        raise InputError(
            f"a checkpoint of format {FORMAT} is needed, got {card.get('format')!r} in {folder / CARD}"
        )
    if absent := [key for key in ("step", "dtype", "shape", "optimizer") if key not in card]:
        raise InputError(f"a checkpoint's card needs {', '.join(absent)}, found none in {folder / CARD}")
    return card


def checkpoint_shape(folder: Path) -> ModelShape:
    """Return the model shape of a checkpoint."""
    return read_shape(folder / ASSETS)


def make_card(step: int, shape: ModelShape, dtype: torch.dtype, **facts: Any) -> dict[str, Any]:
    """Return the card of a checkpoint; ``facts`` are further entries (layout, config, data)."""
    return {
        "format": FORMAT,
        "step": step,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": dataclasses.asdict(shape),
        **facts,
    }


def same_model(card: dict[str, Any], shape: ModelShape, folder: Path) -> None:
    """Check that a checkpoint holds this model.

    Raises:
        InputError: naming each size that differs.
    """
    apart = shape_differences(dataclasses.asdict(shape), card["shape"])
    if apart:
        facts = ", ".join(f"{key} {theirs!r} for {ours!r}" for key, (ours, theirs) in apart.items())
        raise InputError(f"the checkpoint must hold the model of model.path, it has {facts} in {folder}")


def shape_differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what differs of two shapes, given as dictionaries: ``{key: (of one, of the other)}``."""
    other = {"qk_norm": False, "norm_head": False, **other}  # older cards lack these
    return {key: (value, other.get(key)) for key, value in one.items() if value != other.get(key)}


def save(
    folder: Path,
    model: list[Policy] | list[DistributedDataParallel],
    optimizer: DistributedOptimizer | None,
    card: dict[str, Any],
    assets: Path,
    reference: list[Policy] | None = None,
) -> None:
    """Write a checkpoint from all ranks; it appears whole or not at all.

    Args:
        folder: of the checkpoint; one that exists is replaced by the new one.
        model: this rank's chunks.
        optimizer: None for weights only.
        card: see :func:`make_card`.
        assets: HF folder whose small files go with the weights.
        reference: chunks of a second model that training moves too.

    Raises:
        OSError: on every rank, if any of them could not write its part (a full disk).
    """
    partial = partial_folder(folder)
    chunks, groups = _unwrap(model)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / STATE).mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, groups, is_loading=False)
    state |= _reference_state(reference, groups)
    # megatron-core would start a manager process for this queue: seconds, and an orphan after a kill. We save
    # synchronously, so both of its ends are in this process.
    filesystem_async._results_queue = queue.Queue()
    try:
        dist_checkpointing.save(state, str(partial / STATE), ("torch_dist", 1))
    except CheckpointException as error:
        raise OSError(f"writing the checkpoint failed at {partial}: {_reason(error)}") from error
    if dist.get_rank() == 0:
        (partial / ASSETS).mkdir()
        copy_assets(assets, partial / ASSETS)
        text = json.dumps({**card, "optimizer": optimizer is not None}, indent=2, ensure_ascii=False)
        (partial / CARD).write_text(text + "\n", encoding="utf-8")
        put_in_place(partial, folder)
    dist.barrier()


def load(
    folder: Path,
    model: list[Policy] | list[DistributedDataParallel],
    optimizer: DistributedOptimizer | None = None,
    reference: list[Policy] | None = None,
) -> None:
    """Read weights, with ``optimizer`` its state, with ``reference`` the second model; in place, on any layout.

    Raises:
        InputError: if the optimizer state is asked for and the checkpoint has none, or it is damaged.
    """
    if optimizer is not None and not read_card(folder)["optimizer"]:
        raise InputError(f"resuming needs optimizer state; the checkpoint holds weights only: {folder}")
    read_metadata(folder / STATE)  # torch's own reading would run whatever a forged pickle names
    chunks, groups = _unwrap(model)
    state = _sharded_state(chunks, optimizer, groups, is_loading=True)
    state |= _reference_state(reference, groups)
    try:
        loaded = dist_checkpointing.load(state, str(folder / STATE))
    except (CheckpointingException, CheckpointException, UnpicklingError, OSError) as error:
        raise InputError(
            f"a complete checkpoint is needed, reading it failed in {folder}: {_reason(error)}"
        ) from error
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"])
    for number, chunk in enumerate(reference or []):
        named = loaded[f"reference{number}"]
        chunk.load_state_dict({name.removeprefix(_REFERENCE): tensor for name, tensor in named.items()})
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])


def _reason(error: BaseException) -> str:
    """Return one line. torch gathers the ranks' errors in one that is no Exception and prints their traces."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    return " ".join(str(error).split())[:300] or type(error).__name__


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints; call it on one rank, after a save."""
    for _, path in list_steps(run)[:-keep]:
        # Renamed first: a kill in the middle must not leave a folder that looks complete.
        doomed = path.with_name(f".{path.name}.deleted")
        path.rename(doomed)
        shutil.rmtree(doomed)


def tidy(run: Path) -> None:
    """Clear up what a kill left in a run's folder; call it on one rank, before anything is written.

    Unfinished and half-deleted folders go; one that was being replaced comes back if its successor did not
    make it.
    """
    for path in sorted(run.glob(".*")):
        name = path.name.removeprefix(".")
        if (
            path.is_dir()
            and name.endswith(".replaced")
            and not (run / name.removesuffix(".replaced")).exists()
        ):
            path.rename(run / name.removesuffix(".replaced"))
        elif path.is_dir() and name.endswith((".partial", ".deleted", ".replaced")):
            shutil.rmtree(path)


def _unwrap(model: list[Any]) -> tuple[list[Policy], ProcessGroupCollection]:
    chunks = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in model]
    return chunks, chunks[0].pg_collection


def _sharded_state(
    chunks: list[Policy],
    optimizer: DistributedOptimizer | None,
    groups: ProcessGroupCollection,
    is_loading: bool,
) -> dict[str, Any]:
    metadata = _metadata(groups)
    model = {f"model{n}": chunk.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(chunks)}
    state = dict(model)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return state


def _reference_state(reference: list[Policy] | None, groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        f"reference{n}": chunk.sharded_state_dict(prefix=_REFERENCE, metadata=_metadata(groups))
        for n, chunk in enumerate(reference or [])
    }


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": groups.dp_cp,
    }
