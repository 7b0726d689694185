"""Where a run goes on: the newest checkpoint that is whole and of this run, and what was wrong with newer ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_align.checkpoint import folder as sharded
from megatron_align.config import RunConfig
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape
from megatron_align.training.resume_compatibility import require_same_run


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """A checkpoint to go on from; ``damaged`` are the newer ones that are not whole, with one line about each."""

    step: int
    folder: Path
    damaged: tuple[tuple[Path, str], ...] = ()

    @property
    def card(self) -> dict[str, Any]:
        """The checkpoint's card."""
        return sharded.read_card(self.folder)


def find_resume_point(
    config: RunConfig, run: Path, shape: ModelShape, damaged: tuple[tuple[Path, str], ...] = ()
) -> ResumePoint | None:
    """Return the newest checkpoint whose small files are whole; None: the run has none. No rank need have met.

    Args:
        config: of the run.
        run: its folder.
        shape: of the model that it trains.
        damaged: checkpoints known not to be whole.

    Raises:
        InputError: there are checkpoints and none is whole, or the newest whole one is of another model.
    """
    steps = sharded.list_steps(run)
    if steps and config.checkpoint.resume == "never":
        raise InputError(
            f"checkpoint.resume: never needs a checkpoint.dir without checkpoints, found {steps[-1][1]}"
        )
    known = dict(damaged)
    for step, folder in reversed(steps):
        if folder in known:
            continue
        if not (faults := sharded.damage(folder, small=True)):
            sharded.same_model(sharded.read_card(folder), shape, folder)
            return ResumePoint(step, folder, tuple(known.items()))
        known[folder] = "; ".join(faults)
    if steps:
        raise InputError(
            f"no checkpoint of {run} is whole: {'; '.join(known.values())}; to start anew, delete them"
        )
    return None


def require_resumable(point: ResumePoint, config: RunConfig, data_key: str, assets: Path) -> None:
    """Check that the run is the one that the checkpoint is of; see :func:`require_same_run`."""
    require_same_run(config, data_key, point.card, point.folder, assets)


def settle(
    point: ResumePoint | None, config: RunConfig, shape: ModelShape, data_key: str, assets: Path
) -> ResumePoint | None:
    """Read and hash the whole checkpoint, all ranks together; fall back to older ones until one is whole.

    Damaged ones are moved aside: a run that goes on before them will want their names.

    Raises:
        InputError: as in the functions above.
    """
    while point is not None and (faults := sharded.damage(point.folder)):
        damaged = (*point.damaged, (point.folder, "; ".join(faults)))
        point = find_resume_point(config, point.folder.parent, shape, damaged)
        require_resumable(point, config, data_key, assets)
    if point is not None:
        dist.barrier()  # nobody looks any more at what is moved
        if dist.get_rank() == 0:
            for folder, _ in point.damaged:
                sharded.set_aside(folder)
    return point
