"""The offline training loop: next step, train, report, validate, save."""

from __future__ import annotations

from megatron_align.checkpoint.folder import HF
from megatron_align.config import RunConfig
from megatron_align.hf.hub import upload
from megatron_align.model import parallel
from megatron_align.training.finished import is_finished, report_finished
from megatron_align.training.hooks import Hooks
from megatron_align.training.run_context import joined_ranks, prepared_run
from megatron_align.training.setup import RunSetup
from megatron_align.training.standard_hooks import open_log, standard_hooks
from megatron_align.training.stop import Interrupted
from megatron_align.training.trainer import Trainer


def run(config: RunConfig, rank_info: parallel.RankInfo) -> bool:
    """Run a training command on this rank; return False if a signal stopped it before its last step.

    Raises:
        InputError: for anything that the user can correct.
        TrainingFault: training itself failed.
        Interrupted: Ctrl-C stopped the run, after it saved.
    """
    with prepared_run(config, rank_info) as setup:
        is_complete = _run_unless_finished(setup)
    repository = config.checkpoint.push_to_hub
    if is_complete and repository and rank_info.rank == 0:  # the ranks have left: none waits for an upload
        print(f"uploaded to {upload(setup.folder / HF, repository)}", flush=True)
    return is_complete


def _run_unless_finished(setup: RunSetup) -> bool:
    if is_finished(setup):
        report_finished(setup)
        return True
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        is_complete = run_trainer(trainer)
    if trainer.interrupted:
        raise Interrupted
    return is_complete


def run_trainer(trainer: Trainer) -> bool:
    """Make the remaining steps with the standard log and hooks; return False if a signal stopped the run."""
    trainer.setup.require_folder()
    with open_log(trainer) as log:
        return fit(trainer, standard_hooks(trainer, log))


def fit(trainer: Trainer, hooks: Hooks) -> bool:
    """Make the remaining steps; return False if a hook stopped the run before its last step."""
    timing_every = trainer.config.logging.timing_every
    with hooks.attached(trainer), trainer.prefetched() as data:
        for step in range(trainer.step + 1, trainer.steps + 1):
            trainer.begin_step(timed=timing_every is not None and step % timing_every == 0)
            hooks.before_step(step)
            report = trainer.train_step(next(data), hooks.before_update)
            hooks.after_step(report)
            if hooks.end_step(step):  # validates, saves
                return False
            if step == trainer.steps:  # the planned last one, or an earlier one by early stopping
                break
        hooks.finish()
    return True
