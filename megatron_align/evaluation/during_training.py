"""Tasks of an evaluation during training: on the policy that is trained, on its own layout, without export.

Shapes: C completions of a task.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_align.data.tokenize.cache_key import CACHE_IN_RUN
from megatron_align.errors import InputError, TrainingFault, require
from megatron_align.evaluation.answers import NotScored, answer_all
from megatron_align.evaluation.config import JudgeTask, tasks_of
from megatron_align.evaluation.results import RESULTS, TaskResult, write_results
from megatron_align.evaluation.run import SEQUENCE_LENGTH
from megatron_align.evaluation.tables import TaskContext
from megatron_align.evaluation.task_data import TaskSet, layout_of, numbers_of, read_tasks, scored_items
from megatron_align.model import parallel
from megatron_align.model.families import read_json
from megatron_align.model.policy import Policy, build_policy
from megatron_align.training.likelihood import CompletionScorer
from megatron_align.training.setup import RunSetup
from megatron_align.training.validation_tasks import TaskReport, TrainedModel
from megatron_align.training.weights import read_model_weights, require_finite_weights
from megatron_align.version import __version__

KEY = "validation.tasks"
FOLDER = "validation"  # of checkpoint.dir: a folder of results for each step
_SPLITS = ("train", "validation", "timing", "save")  # of metrics.jsonl


def prepare(setup: RunSetup, scratch_cache: Path | None = None) -> RunTasks:
    """Check the tasks of ``validation.tasks`` and tokenise their data, before the ranks meet.

    Args:
        setup: the checked run.
        scratch_cache: of a dry run: folder for data that are not in the cache; None: no dry run.

    Raises:
        InputError: a task is malformed, has bad data, or does not fit the model.
    """
    config = setup.config
    tasks = tasks_of(config.validation.tasks, KEY)
    for task in tasks:
        line = f"{KEY}: a task must not be named as a split of metrics.jsonl, got '{task.name}'"
        require(task.name not in _SPLITS, line)
    folder = setup.folder / FOLDER
    context = TaskContext(
        assets=setup.assets,
        out=folder,
        cache=Path(config.data.cache or setup.folder / CACHE_IN_RUN),
        rank_info=setup.rank_info,
        sequence_length=max(config.data.sequence_length, min(SEQUENCE_LENGTH, setup.shape.max_positions)),
        template_date=config.data.template_date or _earlier_date(folder) or date.today().isoformat(),
        chat_template=config.data.chat_template,
        scratch=scratch_cache,
        shown=False,  # the run has the terminal
    )
    try:
        found = read_tasks(tasks, setup.shape, context)
    except InputError as error:
        raise InputError(f"{KEY}: {error}") from error
    return RunTasks(setup=setup, tasks=found)


@dataclass(slots=True, kw_only=True)
class RunTasks:
    """The tasks of a run; a :class:`.ValidationTasks`.

    Args:
        setup: of the run.
        tasks: with their data.
    """

    setup: RunSetup
    tasks: TaskSet
    _references: dict[str, np.ndarray] | None = field(default=None, init=False)

    @property
    def higher_is_better(self) -> Mapping[str, bool]:
        """Of each ``TASK/METRIC`` that is better in one direction."""
        directions = self.tasks.directions.items()
        return {f"{task}/{metric}": higher for task, of in directions for metric, higher in of.items()}

    def start(self, model: TrainedModel) -> None:
        """Score the references of tasks, and drop results of steps that a resumed run makes again. Collective."""
        if self._references is not None:
            return
        parallel.require_agreement(
            {"template_date": self.tasks.context.template_date},
            "chat templates must read one date on all ranks",
        )
        if self.setup.rank_info.rank == 0:
            for file in self.tasks.context.out.glob(f"step_*/{RESULTS}"):
                if int(file.parent.name.removeprefix("step_")) > model.step:
                    file.unlink(missing_ok=True)
        self._references = self._score_references(model)

    def run(self, model: TrainedModel) -> TaskReport:
        """Run all tasks with the current weights, and write their results to ``validation/step_NNNNNN``. Collective.

        Raises:
            TrainingFault: on every rank: a task failed for another reason than a judge that does not answer.
        """
        self.setup.require_folder()
        self.start(model)
        assert self._references is not None, "start scores them"
        context = dataclasses.replace(
            self.tasks.context, out=self.tasks.context.out / f"step_{model.step:06d}"
        )
        tasks = dataclasses.replace(self.tasks, context=context)
        warnings: list[str] = []
        try:
            score = self._scorer(model, model.chunks)
            numbers = numbers_of(tasks.scored, score, context)
            items = scored_items(tasks.scored, numbers, self._references)
            if tasks.lm_eval:
                from megatron_align.evaluation.lm_eval_results import run_lm_eval  # an optional package

                with _random_state_kept():
                    items |= run_lm_eval(tasks.lm_eval, score, context, self.setup.changes)
            if tasks.answered:
                items |= _answer(tasks, model, warnings)
        except InputError as error:  # raised on every rank
            raise TrainingFault(f"{KEY} failed after step {model.step}: {error}") from error
        return self._report(tasks, items, model, warnings)

    def _scorer(self, model: TrainedModel, chunks: list[Policy]) -> CompletionScorer:
        return CompletionScorer(
            chunks=chunks,
            parallel=self.setup.config.parallel,
            groups=model.groups,
            watchdog=model.watchdog,
            sequence_length=self.tasks.context.sequence_length,
        )

    def _score_references(self, model: TrainedModel) -> dict[str, np.ndarray]:
        """Return the numbers of the tasks with a reference, by name; its weights are in memory only meanwhile."""
        compared = [scored for scored in self.tasks.scored if scored.reference]
        numbers: dict[str, np.ndarray] = {}
        for path in dict.fromkeys(scored.reference for scored in compared if scored.reference):
            chunks = build_policy(self.setup.megatron, self.setup.shape, model.groups)
            with model.watchdog.patient(f"loading {path}"):
                read_model_weights(chunks, path, self.setup.shape, model.groups)
                require_finite_weights(chunks, path)
            of_path = [scored for scored in compared if scored.reference == path]
            numbers |= numbers_of(of_path, self._scorer(model, chunks), self.tasks.context)
        return numbers

    def _report(
        self, tasks: TaskSet, items: dict[str, TaskResult], model: TrainedModel, warnings: list[str]
    ) -> TaskReport:
        """Return the metrics of the tasks that were finished; rank 0 writes their results."""
        finished = dataclasses.replace(
            tasks,
            tasks=tuple(task for task in tasks.tasks if task.name in items),
            answered=[each for each in tasks.answered if each.task.name in items],
        )
        config = self.setup.config
        about = {
            "model": str(self.setup.folder),
            "step": model.step,
            "precision": config.train.arithmetic,
            "parallel": layout_of(config.parallel, self.setup.rank_info.world_size),
            "version": __version__,
        }
        results = finished.results(items, about)
        if dist.get_rank() == 0 and self.setup.taken_by() is None:
            try:
                write_results(finished.context.out, items, results)
            except OSError as error:
                warnings.append(
                    f"{KEY}: the results were not written: {error.strerror} at {finished.context.out}"
                )
        absent = [task.name for task in tasks.tasks if task.name not in items]
        metrics = {f"{task}/{metric}": math.nan for task in absent for metric in tasks.directions[task]}
        metrics |= {
            f"{task}/{metric}": value
            for task, entry in results["tasks"].items()
            for metric, value in entry.items()
            if isinstance(value, float)
        }
        return TaskReport(metrics, warnings)


def _answer(tasks: TaskSet, model: TrainedModel, warnings: list[str]) -> dict[str, TaskResult]:
    """Return the items of the generated tasks: every rank answers a share of the prompts. Collective.

    Each rank holds a copy of the model only meanwhile. A judge that does not answer costs its task, not the run.
    """
    with model.watchdog.patient("building the engine"), parallel.failing_together():
        engine = model.live_engine()
    model.update_engine(engine)
    items: dict[str, TaskResult] = {}
    try:
        for task in tasks.answered:
            try:
                items[task.task.name] = answer_all(task, engine, model.watchdog, tasks.context)
            except NotScored as error:
                if not isinstance(task.task, JudgeTask):
                    raise
                warnings.append(f"{KEY}: {task.task.name} has no result after step {model.step}: {error}")
    finally:
        engine.close()
    return items


def _earlier_date(folder: Path) -> str | None:
    """Return the date that templates read in the newest results of the run; None: it has none, or none read it."""
    for file in sorted(folder.glob(f"step_*/{RESULTS}"), reverse=True):
        found = read_json(file).get("template_date")
        return found if isinstance(found, str) else None
    return None


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the global random numbers after a with-block: lm-eval seeds them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
