"""The hooks of every run: summary, profiling, health, self-check, rows, validation, checkpoints, export."""

from __future__ import annotations

import torch.distributed as dist
import yaml

from megatron_align import faults
from megatron_align.checkpoint.folder import ADAPTER, CORRUPT_SUFFIX, CRITIC, HF
from megatron_align.config import to_dict
from megatron_align.errors import TrainingFault
from megatron_align.hf.assets import describe_assets
from megatron_align.hf.finite import find_nonfinite_weights
from megatron_align.monitoring.logger import RunLog
from megatron_align.monitoring.memory import peak_memory_gb
from megatron_align.monitoring.mfu import Utilisation
from megatron_align.monitoring.profiling import Tracer
from megatron_align.monitoring.timing import timing_row
from megatron_align.storage.tensor_digest import describe_nonfinite
from megatron_align.training import self_check
from megatron_align.training.best import EarlyStopping, KeepBest
from megatron_align.training.checkpoint_hook import Checkpointing
from megatron_align.training.finished import steps_made, write_finished_marker
from megatron_align.training.hooks import Hook, Hooks
from megatron_align.training.resume_compatibility import harmless_differences
from megatron_align.training.samples import Samples
from megatron_align.training.summary import run_summary
from megatron_align.training.suspects import Suspects
from megatron_align.training.trainer import StepReport, Trainer


def open_log(trainer: Trainer) -> RunLog:
    """Write config.yaml and open the log on rank 0; return a log without outputs on the other ranks."""
    if dist.get_rank() != 0:
        return RunLog()
    setup, settings = trainer.setup, to_dict(trainer.config)
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (setup.folder / "config.yaml").write_text(text, encoding="utf-8")
    config = trainer.config.logging
    return RunLog.open(setup.folder, config, settings, trainer.step, trainer.steps, setup.taken_by)


class Summary(Hook):
    """Shows what the run is, which corrupt checkpoints it passed over, and what differs from when it was saved."""

    def __init__(self, log: RunLog):
        self._log = log

    def start(self, trainer: Trainer) -> None:
        """See :class:`Hook`."""
        self._log.summary("megatron_align", run_summary(trainer))
        for folder, reason in trainer.resumed.corrupt if trainer.resumed else ():
            self._log.message(f"warning: {reason}; moved to {folder}{CORRUPT_SUFFIX}")
        if trainer.resumed:
            for line in harmless_differences(trainer.config, trainer.resumed.metadata):
                self._log.message(f"resumed with a changed option: {line}")


class Profiling(Hook):
    """Traces the steps of ``logging.profile_steps``."""

    def start(self, trainer: Trainer) -> None:
        """See :class:`Hook`."""
        steps, setup = trainer.config.logging.profile_steps, trainer.setup
        self._tracer = Tracer(steps, setup.folder, setup.rank_info.rank)

    def before_step(self, step: int) -> None:
        """See :class:`Hook`."""
        self._tracer.begin(step)

    def end_step(self, step: int) -> bool:
        """See :class:`Hook`."""
        self._tracer.end(step)
        return False


class HealthCheck(Hook):
    """Reports non-finite steps and outliers with the samples that cause them; stops the run when it must.

    Adds the counts and, at a problem, ``suspects`` to the step's row.
    """

    def __init__(self, log: RunLog):
        self._log = log

    def start(self, trainer: Trainer) -> None:
        """See :class:`Hook`."""
        super().start(trainer)
        self._suspects = Suspects(trainer.stepper, trainer.setup.train)
        if trainer.critic is not None:
            self._suspects_of_critic = Suspects(trainer.critic.stepper, trainer.setup.train)

    def after_step(self, report: StepReport) -> None:
        """See :class:`Hook`."""
        health, result, step = self.trainer.health, report.result, report.step
        assert result.grad_norm is not None, "a training step has a gradient norm"
        critic, further = result.critic, {}
        if critic is not None and critic.grad_norm is not None:
            further = {"loss of the critic": critic.sums["loss"], "its gradient norm": critic.grad_norm}
        problems = health.record(result.sums["loss"], result.grad_norm, further)
        report.columns |= health.counts
        if not problems:
            return
        if not result.updated:
            self._require_finite_weights(step)
        if result.updated:
            samples = self._suspects.of_outlier(report.data, report.batches, result)
            cause = f"the pack with the largest loss is {self._suspects.named(samples)}"
        else:
            suspects, traced = self._suspects, result
            if critic is not None and result.is_finite:
                suspects, traced = self._suspects_of_critic, critic
            with self.trainer.watchdog.patient(f"tracing the non-finite numbers of step {step}"):
                samples = suspects.of_nonfinite(report.data, report.batches, traced)
            cause = f"the non-finite numbers come from {self._suspects.named(samples)}"
        health.require_can_continue(step, problems, cause)
        skipped = "" if result.updated else "skipped, no update: "
        for problem in problems:
            self._log.message(f"step {step}: {skipped}{problem}; {cause}")
        report.columns["suspects"] = samples

    def _require_finite_weights(self, step: int) -> None:
        """End the run if weights hold NaN or infinity: no sample is to blame, and no later step can succeed."""
        critic = self.trainer.critic
        for chunks, section in (
            (self.trainer.chunks, "optimizer"),
            *([(critic.chunks, "critic.optimizer")] if critic else []),
        ):
            if nonfinite := describe_nonfinite(find_nonfinite_weights(chunks)):
                raise TrainingFault(
                    f"step {step}: the weights are not finite since the update of an earlier step: {nonfinite}; "
                    f"start from an older checkpoint, with a smaller {section}.lr"
                )


class SelfCheck(Hook):
    """Checks layout, replicas and packing before the first step, and known values after step 1."""

    def start(self, trainer: Trainer) -> None:
        """See :class:`Hook`."""
        super().start(trainer)
        if trainer.config.train.self_check and trainer.step < trainer.steps:
            with trainer.watchdog.patient("self-check"):
                self_check.before_first_step(
                    trainer.model,
                    trainer.train_batches,
                    trainer.step,
                    trainer.groups,
                    trainer.critic.model if trainer.critic is not None else (),
                )

    def after_step(self, report: StepReport) -> None:
        """See :class:`Hook`."""
        config = self.trainer.config
        if config.train.self_check and report.step == 1 and report.result.updated:
            self_check.after_first_step(config, report.metrics, self.trainer.setup.megatron.params_dtype)


class MetricsLog(Hook):
    """Writes the row of every step, and every ``logging.timing_every`` steps its phases on all ranks."""

    def __init__(self, log: RunLog):
        self._log = log

    def start(self, trainer: Trainer) -> None:
        """See :class:`Hook`."""
        super().start(trainer)
        setup = trainer.setup
        self._utilisation = Utilisation(
            trainer.config, setup.shape, setup.rank_info.world_size, setup.second_shapes
        )

    def after_step(self, report: StepReport) -> None:
        """See :class:`Hook`."""
        counts, seconds = report.data.counts, report.seconds
        row = {
            "step": report.step,
            **report.metrics,
            "grad_norm": report.result.grad_norm,
            **report.columns,
            "lr": report.lr,
            "tokens": counts.laid_tokens,
            "tokens_saved": counts.duplicated_tokens - counts.laid_tokens,
            "trained_tokens": counts.scored_tokens,
            "padding": round(1 - counts.laid_tokens / counts.padded_tokens, 6),
            "samples": counts.samples,
            "tokens_per_second": counts.laid_tokens / seconds,
            "step_seconds": seconds,
        }
        faults.at("step.trained", report.step)
        mfu = self._utilisation.of_step(counts, seconds)
        self._log.write(row, {"peak_memory_gb": peak_memory_gb()} | ({} if mfu is None else {"mfu": mfu}))
        clock = self.trainer.stepper.clock
        if clock.running:
            self._log.write(timing_row(report.step, clock, mfu))


class Validation(Hook):
    """Evaluates the validation data and tasks every ``train.validate_every`` steps and after the last one.

    It must come before checkpoints: a run killed between the two resumes from before the step and validates again.
    """

    def __init__(self, log: RunLog):
        self._log = log

    def start(self, trainer: Trainer) -> None:
        """See :class:`Hook`."""
        super().start(trainer)
        if trainer.setup.tasks is not None and trainer.step < trainer.steps:
            with trainer.watchdog.patient("scoring the references of validation.tasks"):
                trainer.setup.tasks.start(trainer)

    def end_step(self, step: int) -> bool:
        """See :class:`Hook`."""
        trainer, every = self.trainer, self.trainer.config.train.validate_every
        due = step == trainer.steps or (every is not None and step % every == 0)
        if due and (trainer.setup.validation or trainer.setup.tasks):
            metrics = trainer.evaluate() if trainer.setup.validation else {}
            report = trainer.run_tasks()
            metrics |= report.metrics
            for warning in report.warnings:
                self._log.message(f"warning: {warning}")
            trainer.validated = {step: metrics}
            self._log.write({"step": step, "split": "validation", **metrics})
        faults.at("step.logged", step)
        return False


class Export(Hook):
    """Writes ``checkpoint.dir/hf``, also ``adapter`` or ``critic`` of such runs, and the marker that it is finished."""

    def __init__(self, log: RunLog):
        self._log = log

    def finish(self) -> None:
        """See :class:`Hook`."""
        run = self.trainer.setup.folder
        if self.trainer.base is not None:
            self.trainer.export_adapter(run / ADAPTER)
            self._log.message(f"exported the adapter to {run / ADAPTER}")
        if self.trainer.config.checkpoint.export_hf:
            folder = run / HF
            self.trainer.export(folder)
            if dist.get_rank() == 0:
                self._log.message(f"exported to {folder}: {describe_assets(folder)}")
            if self.trainer.critic is not None:
                self.trainer.export_critic(run / CRITIC)
                self._log.message(f"exported the critic to {run / CRITIC}")
        self.trainer.setup.require_folder()
        if dist.get_rank() == 0:
            write_finished_marker(run, steps_made(self.trainer.setup, self.trainer.steps))


def standard_hooks(trainer: Trainer, log: RunLog) -> Hooks:
    """Return the hooks of a run, in the order in which they are called.

    Health comes before the rows, which hold its counts; validation, and what follows its metrics, before checkpoints,
    see :class:`Validation`.
    """
    early, keep_best, samples = (
        trainer.config.train.early_stopping,
        trainer.config.checkpoint.keep_best,
        trainer.config.validation.generate,
    )
    followed = (trainer.setup.tasks, trainer.setup.validation is not None)
    best = None if keep_best is None else KeepBest(log, keep_best, *followed)
    return Hooks(
        [
            Summary(log),
            Profiling(),
            HealthCheck(log),
            SelfCheck(),
            MetricsLog(log),
            Validation(log),
            *([] if early is None else [EarlyStopping(log, early, *followed)]),
            *([] if best is None else [best]),
            *([] if samples is None else [Samples(log, samples)]),
            Checkpointing(trainer.config.checkpoint, log, best),
            Export(log),
        ]
    )
