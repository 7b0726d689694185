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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_align import faults
from megatron_align.checkpoint.load import model_pieces, optimizer_pieces, read_pieces
from megatron_align.checkpoint.save_plan import model_state, reference_state, unwrap
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, read_json, read_shape
from megatron_align.model.policy import Policy
from megatron_align.storage import checksums as sums
from megatron_align.version import __version__

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


def require_intact(folder: Path) -> None:
    """Check that a checkpoint's files are what was written; see :func:`damage` for who calls it.

    Raises:
        InputError: naming the files that are not.
    """
    _require_none(damage(folder))


@contextmanager
def checked_meanwhile(folder: Path, passing: Iterable[Path] = ()) -> Iterator[dict[Path, sums.PassingFile]]:
    """Check that a checkpoint's files are what was written while a with-block reads them, in one process.

    The block gets ``passing``, files that it mostly reads itself, and hands what it reads on to them.

    For blocks whose work comes to nothing where they fail: that a file is damaged is known when the block is done, or
    when it fails, which then is no wonder.

    Raises:
        InputError: naming the files that are not.
    """
    try:
        known = sums.read_sums(folder)
    except sums.Damaged as error:
        _require_none([str(error)])
    files = {path: sums.PassingFile(path) for path in passing if str(path.relative_to(folder)) in known}
    with sums.checking(folder, sorted(known), known, files) as found:
        try:
            yield files
        except OSError:  # a full disk must not wait for the hashes
            raise
        except Exception:  # a damaged pickle can raise anything
            _require_none(found())
            raise
        _require_none(found())


def _require_none(damaged: list[str]) -> None:
    if damaged:
        raise InputError(f"an undamaged checkpoint is needed: {'; '.join(damaged)}")


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
    chunks, groups = unwrap(model)
    states = list(model_state(chunks, groups).values())
    for state in states:
        for name in without:
            state.pop(name, None)
    pieces = [
        piece for state in [*states, reference_state(reference, groups)] for piece in model_pieces(state)
    ]
    if optimizer is not None:
        pieces += optimizer_pieces(states, optimizer)
    _on_all_ranks(lambda: read_pieces(folder / STATE, pieces))


def _on_all_ranks(call: Callable[[], None]) -> None:
    """Do something on every rank: refused on one, it is refused on all."""
    fault = None
    try:
        call()
    except InputError as error:
        fault = str(error)
    faults_of_ranks: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults_of_ranks, fault)
    if found := sorted(set(filter(None, faults_of_ranks))):
        raise InputError(found[0])


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
