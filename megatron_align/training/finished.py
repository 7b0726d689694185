"""A finished run: a marker in its folder, so that the same command says so instead of doing the last part again."""

from __future__ import annotations

from pathlib import Path

from megatron_align.checkpoint.folder import ADAPTER, CRITIC, HF
from megatron_align.training.setup import RunSetup
from megatron_align.training.stop import remove_requeue_marker

FINISHED = "finished"  # file in the run's folder, with the number of its steps


def write_finished_marker(run: Path, steps: int | str) -> None:
    """Mark the run's folder: all ``steps`` are made and saved, everything to be exported is; see :func:`steps_made`."""
    (run / FINISHED).write_text(f"{steps}\n", encoding="utf-8")


def steps_made(setup: RunSetup, steps: int) -> str:
    """Return the marker's text: the number of steps, and if they were fewer than planned what ended the run."""
    if steps == setup.steps:
        return str(steps)
    early = setup.config.train.early_stopping
    assert early is not None, "nothing else ends a run as complete"
    return f"{steps} of {setup.steps}: no better {early.metric} in {early.patience} validations"


def remove_finished_marker(run: Path) -> None:
    """Remove the marker of :func:`write_finished_marker`: the run continues."""
    (run / FINISHED).unlink(missing_ok=True)


def is_finished(setup: RunSetup) -> bool:
    """Return whether nothing is left to do; every rank finds the same, in the same files."""
    if setup.resume is None or (
        setup.resume.step != setup.steps and setup.config.train.early_stopping is None
    ):
        return False
    try:
        marked = (setup.folder / FINISHED).read_text(encoding="utf-8").strip()
    except OSError:
        return False
    export_hf = setup.config.checkpoint.export_hf
    exports = {
        HF: export_hf,
        ADAPTER: setup.adapter is not None,
        CRITIC: export_hf and setup.critic is not None,
    }
    missing = [name for name, wanted in exports.items() if wanted and not (setup.folder / name).is_dir()]
    return marked == steps_made(setup, setup.resume.step) and not missing


def _done(setup: RunSetup) -> str:
    assert setup.resume is not None, "the run is finished"
    if setup.resume.step == setup.steps:
        return f"all {setup.steps} steps are done"
    return f"early stopping ended it after step {setup.resume.step} of {setup.steps}"


def report_finished(setup: RunSetup) -> None:
    """Print on rank 0 that there is nothing to do; a scheduler that waits for a requeue marker must not find one."""
    if setup.rank_info.rank != 0:
        return
    remove_requeue_marker(setup.folder)
    model = f", the model is in {setup.folder / HF}" if setup.config.checkpoint.export_hf else ""
    assert setup.resume is not None, "the run is finished"
    stopped_early = setup.resume.step != setup.steps
    more = "train.early_stopping.patience, or remove train.early_stopping" if stopped_early else "train.steps"
    print(
        f"already finished: {_done(setup)}{model}; for more steps raise {more}, for another run "
        "give another checkpoint.dir",
        flush=True,
    )
