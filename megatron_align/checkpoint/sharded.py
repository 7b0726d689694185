"""Our checkpoints: megatron-core's sharded tensors, the HF folder's small files, and a card. Complete or absent.

    step_000050/
        card.json      step, model, layout, versions, configuration: what a person or a program wants to know first
        hf_assets/     config.json, tokenizer, chat template: a checkpoint needs no other folder
        state/         megatron-core's sharded tensors: weights, and optimizer state after training
        SHA256SUMS     of all these files

A checkpoint is written into a hidden folder and renamed (``save.py``), so a folder of that name is whole. It can be
read on any tensor/pipeline/data-parallel layout.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import re
import shutil
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_align import __version__, faults
from megatron_align.checkpoint import sums
from megatron_align.checkpoint.planning import REFERENCE, reference_state, sharded_state, unwrap
from megatron_align.checkpoint.state_read import read_metadata
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, read_json, read_shape
from megatron_align.model.policy import Policy

CARD, ASSETS, STATE = "card.json", "hf_assets", "state"
FORMAT = 2  # 1 had no hashes
DAMAGED = ".damaged"  # after the name of a checkpoint that a run could not go on from
_STEP = re.compile(r"step_(\d{6,})")
_VERSIONS = ("torch", "megatron-core", "transformers")


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / f"step_{step:06d}"


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a run folder, oldest first."""
    if not run.is_dir():
        return []
    found = [(match, path) for path in run.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found if path.is_dir())


def find(path: str | Path) -> Path | None:
    """Return the checkpoint that ``path`` is, or the newest one of a run folder; None if it is neither."""
    path = Path(path)
    if any((path / name).is_file() for name in (CARD, sums.NAME)):
        return path
    steps = list_steps(path)
    return steps[-1][1] if steps else None


def read_card(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's card.

    Raises:
        InputError: it is missing or unreadable, or of a format that this version does not know.
    """
    if not (folder / CARD).is_file():
        raise InputError(f"a checkpoint needs a card, found none at {folder / CARD}")
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
        "versions": {
            "megatron_align": __version__,
            **{name: importlib.metadata.version(name) for name in _VERSIONS},
            "python": platform.python_version(),
        },
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


def damage(folder: Path, *, small: bool = False) -> list[str]:
    """Return one line about each file of a checkpoint that is not what was written; none: it is whole.

    Where ranks have met, each calls this: each reads its share, all get the same answer.

    Args:
        folder: of the checkpoint.
        small: each process for itself, and of the files with tensors only whether they are there.
    """
    alone = small or not dist.is_initialized()
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    try:
        known = sums.read_sums(folder)
        large = {name for name in known if name.endswith(".distcp")} if small else set()
        found = sums.damage(folder, sorted(known.keys() - large)[rank::ranks], known)
        found += [f"{folder / name} is missing" for name in sorted(large) if not (folder / name).is_file()]
    except sums.Damaged as error:
        found = [str(error)]
    if alone:
        return found
    everyone: list[list[str]] = [[]] * ranks
    dist.all_gather_object(everyone, found)
    return sorted(set(chain.from_iterable(everyone)))


def need_intact(folder: Path) -> None:
    """Check that a checkpoint's files are what was written; see :func:`damage` for who calls it.

    Raises:
        InputError: naming the files that are not.
    """
    if found := damage(folder):
        raise InputError(f"an undamaged checkpoint is needed: {'; '.join(found)}")


def load(
    folder: Path,
    model: list[Policy] | list[DistributedDataParallel],
    optimizer: DistributedOptimizer | None = None,
    reference: list[Policy] | None = None,
    *,
    without: frozenset[str] = frozenset(),
) -> None:
    """Read weights, with ``optimizer`` its state, with ``reference`` the second model; in place, on any layout.

    Args:
        folder: of the checkpoint.
        model: this rank's chunks.
        optimizer: None: weights only.
        reference: chunks of the second model.
        without: parameters that the checkpoint does not have, and that stay as they are.

    Raises:
        InputError: if the optimizer state is asked for and the checkpoint has none, or it does not fit.
    """
    if optimizer is not None and not read_card(folder)["optimizer"]:
        raise InputError(f"resuming needs optimizer state; the checkpoint holds weights only: {folder}")
    read_metadata(folder / STATE)  # torch's own reading would run whatever a forged pickle names
    chunks, groups = unwrap(model)
    state = sharded_state(chunks, optimizer, groups, is_loading=True) | reference_state(reference, groups)
    for number in range(len(chunks)):
        for name in without:
            state[f"model{number}"].pop(name, None)
    try:
        loaded = dist_checkpointing.load(state, str(folder / STATE))
    except (CheckpointingException, CheckpointException, UnpicklingError, OSError) as error:
        raise InputError(
            f"a complete checkpoint is needed, reading it failed in {folder}: {_reason(error)}"
        ) from error
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{number}"], strict=not without)
    for number, chunk in enumerate(reference or []):
        named = loaded[f"reference{number}"]
        chunk.load_state_dict({name.removeprefix(REFERENCE): tensor for name, tensor in named.items()})
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])


def _reason(error: BaseException) -> str:
    """Return one line. torch gathers the ranks' errors in one that is no Exception and prints their traces."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    return " ".join(str(error).split())[:300] or type(error).__name__


def prune(run: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete old checkpoints; call it on one rank, after a save.

    Args:
        run: folder of the run.
        keep: so many of the newest stay.
        keep_every: those of steps that it divides stay too.
    """
    for step, path in list_steps(run)[:-keep]:
        if keep_every is not None and step % keep_every == 0:
            continue
        # Renamed first: a kill in the middle must not leave a folder that looks complete.
        doomed = path.with_name(f".{path.name}.deleted")
        path.rename(doomed)
        faults.at("prune.hidden", step)
        shutil.rmtree(doomed)


def set_aside(folder: Path) -> None:
    """Move a damaged checkpoint out of the way, for people to look at; call it on one rank."""
    aside = folder.with_name(folder.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
    faults.at("resume.aside")


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
