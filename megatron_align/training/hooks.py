"""Hooks: how logging, checkpoints, validation, health checks and the like attach to a run without touching the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from megatron_align.errors import TrainingFault

if TYPE_CHECKING:
    from megatron_align.training.trainer import StepReport, Trainer


class Hook:
    """A concern of a run. Every rank calls the same hooks in the same order, so hooks may communicate.

    A subclass overrides the moments it needs. ``trainer`` is set by :meth:`start`.
    """

    trainer: Trainer

    def start(self, trainer: Trainer) -> None:
        """Called once before the first step of this process."""
        self.trainer = trainer

    def before_step(self, step: int) -> None:
        """Called before a (1-based) step's data are waited for."""

    def before_update(self) -> None:
        """Called when a step's gradients are computed and nothing has been updated yet."""

    def after_step(self, report: StepReport) -> None:
        """Called after the update; a hook may add columns to the step's row (``report.columns``)."""

    def end_step(self, step: int) -> bool:
        """Called after :meth:`after_step` of all hooks; return True to stop the run after this step."""
        return False

    def on_fault(self) -> None:
        """Called on all ranks when a TrainingFault ends the run, before it is raised further."""

    def finish(self) -> None:
        """Called after the last step of the complete run."""

    def close(self, error: BaseException | None) -> None:
        """Called last, however the run ended; ``error`` is the exception that ended it."""


class Hooks:
    """Several hooks, called in their order (closed in reverse order)."""

    def __init__(self, hooks: Sequence[Hook]):
        self._hooks = list(hooks)

    @contextmanager
    def attached(self, trainer: Trainer) -> Iterator[Hooks]:
        """Start the hooks and, after the with-block, close them."""
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.push(lambda _, error, __, hook=hook: hook.close(error))
                hook.start(trainer)
            try:
                yield self
            except TrainingFault:
                for hook in self._hooks:
                    hook.on_fault()
                raise

    def before_step(self, step: int) -> None:
        """See :class:`Hook`."""
        for hook in self._hooks:
            hook.before_step(step)

    def before_update(self) -> None:
        """See :class:`Hook`."""
        for hook in self._hooks:
            hook.before_update()

    def after_step(self, report: StepReport) -> None:
        """See :class:`Hook`."""
        for hook in self._hooks:
            hook.after_step(report)

    def end_step(self, step: int) -> bool:
        """Call all hooks; return whether any of them stops the run."""
        stops = [hook.end_step(step) for hook in self._hooks]  # a list: every hook is called on every rank
        return any(stops)

    def finish(self) -> None:
        """See :class:`Hook`."""
        for hook in self._hooks:
            hook.finish()
