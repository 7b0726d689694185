"""Select the checkpoint to resume from: the newest intact one of this run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_align.checkpoint.card import read_checkpoint_metadata, require_same_model
from megatron_align.checkpoint.folder import list_steps, move_corrupt_aside
from megatron_align.checkpoint.integrity import find_corrupt_files
from megatron_align.config import RunConfig
from megatron_align.errors import InputError, listed
from megatron_align.model import parallel
from megatron_align.model.families import ModelShape
from megatron_align.training.resume_compatibility import require_same_run


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint to resume from.

    Args:
        step: steps already made.
        folder: of the checkpoint.
        corrupt: newer checkpoints that are corrupt, each with one line saying why.
    """

    step: int
    folder: Path
    corrupt: tuple[tuple[Path, str], ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        """The checkpoint's metadata, from card.json."""
        return read_checkpoint_metadata(self.folder)


def find_resume_point(
    config: RunConfig, run: Path, shape: ModelShape, corrupt: tuple[tuple[Path, str], ...] = ()
) -> ResumePoint | None:
    """Return the newest checkpoint whose small files are intact; None: the run has none. Reads without collectives.

    Args:
        config: of the run.
        run: its folder.
        shape: of the model that it trains.
        corrupt: checkpoints already known to be corrupt.

    Raises:
        InputError: there are checkpoints and none is intact, or the newest intact one is of another model.
    """
    steps = list_steps(run)
    if steps and config.checkpoint.resume == "never":
        raise InputError(
            f"checkpoint.resume: never needs a checkpoint.dir without checkpoints, found {steps[-1][1]}"
        )
    reasons = dict(corrupt)
    for step, folder in reversed(steps):
        if folder in reasons:
            continue
        if not (faults := find_corrupt_files(folder, quick=True)):
            require_same_model(read_checkpoint_metadata(folder), shape, folder)
            return ResumePoint(step, folder, tuple(reasons.items()))
        reasons[folder] = listed(faults, "; ")
    if steps:
        raise InputError(
            f"no intact checkpoint in {run}: {listed(reasons.values(), '; ')}; delete them to restart from scratch"
        )
    return None


def verified_resume_point(
    config: RunConfig, run: Path, shape: ModelShape, data_key: str, assets: Path, steps: int
) -> ResumePoint | None:
    """Return the newest checkpoint of which every file is intact; None: the run has none. Collective.

    Corrupt checkpoints are renamed: the resumed run will write checkpoints of their names again.

    Raises:
        InputError: on every rank: no checkpoint is intact, or the newest intact one is of another run or model, or
            ranks see different checkpoints.
    """
    point = find_resume_point(config, run, shape)
    parallel.require_agreement(
        {"the newest step": point and point.step}, "checkpoint.dir must be the same for all ranks"
    )
    while point is not None and (faults := find_corrupt_files(point.folder)):
        point = find_resume_point(config, run, shape, (*point.corrupt, (point.folder, listed(faults, "; "))))
    if point is None:
        return None
    require_same_run(config, data_key, point.metadata, point.folder, assets, steps)
    dist.barrier()  # all ranks have finished reading
    if dist.get_rank() == 0:
        for folder, _ in point.corrupt:
            move_corrupt_aside(folder)
    return point
