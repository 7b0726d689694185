"""Folders of checkpoints: their names, finding, pruning and cleaning up. A checkpoint is complete or absent.

    step_000050/
        card.json      step, model, layout, versions, configuration
        hf_assets/     config.json, tokenizer, chat template: a checkpoint needs no other folder
        state/         megatron-core's sharded tensors: weights, and optimizer state after training
        SHA256SUMS     checksums of all these files

A checkpoint is written into a hidden folder and renamed (``saver.py``), so a folder with such a name is complete. It
can be read on any tensor/pipeline/data-parallel layout.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_align import faults
from megatron_align.errors import TrainingFault, warn_once
from megatron_align.storage.checksums import CHECKSUMS
from megatron_align.storage.deletion import delete_folder, discard, hide, why_undeletable

CARD, ASSETS, STATE = "card.json", "hf_assets", "state"
HF = "hf"  # the exported model, in a run's folder
ADAPTER = "adapter"  # the exported adapter
CRITIC = "critic"  # the exported critic
CORRUPT_SUFFIX = ".damaged"  # appended to the name of a corrupt checkpoint that a run fell back from
_STEP = re.compile(r"step_(\d{6,})")


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / f"step_{step:06d}"


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of a run's checkpoints, oldest first."""
    if not run.is_dir():
        return []
    matches = [(match, path) for path in run.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in matches if path.is_dir())


def folder_taken(taken_by: str | None) -> TrainingFault:
    """Return the error of a run whose folder another process took while it was paused; None: rank 0 knows which."""
    return TrainingFault(
        f"{taken_by or 'another run'} took over checkpoint.dir while this run was paused; it is left unchanged"
    )


def find_checkpoint(path: str | Path) -> Path | None:
    """Return ``path`` if it is a checkpoint, or the newest checkpoint of a run's folder; None: it is neither.

    A folder with a config.json or safetensors files is a Hugging Face folder, whatever else it holds.
    """
    path = Path(path)
    if (path / "config.json").exists() or next(path.glob("*.safetensors"), None):
        return None
    if any((path / name).is_file() for name in (CARD, CHECKSUMS)):
        return path
    steps = list_steps(path)
    return steps[-1][1] if steps else None


def prune(run: Path, keep: int, keep_every: int | None = None, best: int | None = None) -> None:
    """Delete old checkpoints; call it on one rank, after a save. One that cannot be deleted stays, with a warning.

    Args:
        run: folder of the run.
        keep: number of most recent checkpoints to retain.
        keep_every: also retain steps divisible by this.
        best: also retain this step.
    """
    for step, path in list_steps(run)[:-keep]:
        if step == best or (keep_every is not None and step % keep_every == 0):
            continue
        _delete(path, step)


def _delete(checkpoint: Path, step: int) -> None:
    """Delete a checkpoint, never through a link; warn once about what cannot be deleted."""
    stays, reason = checkpoint, why_undeletable(checkpoint)
    if reason is None:
        try:
            # Renamed first: a kill halfway must not leave a folder that looks complete.
            stays = hide(checkpoint)
            faults.at("prune.hidden", step)
            reason = delete_folder(stays)
        except OSError as error:
            reason = error.strerror or str(error)
    if reason is not None:
        warn_once(
            f"the old checkpoint of step {step} is not deleted, it stays at {stays}: {reason}; training continues",
            key=f"undeletable {checkpoint}",
        )


def move_corrupt_aside(folder: Path) -> None:
    """Rename a corrupt checkpoint so that it can be inspected; call it on one rank."""
    target = folder.with_name(folder.name + CORRUPT_SUFFIX)
    if os.path.lexists(target):
        discard(target)
    folder.rename(target)
    faults.at("resume.aside")


def clean_up_after_kill(run: Path) -> None:
    """Delete what a killed run left in its folder; call it on one rank, before anything is written.

    Incomplete and half-deleted folders are deleted; one that was being replaced is restored if its replacement was
    not completed. What cannot be deleted stays, with a warning.
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
            discard(path)
