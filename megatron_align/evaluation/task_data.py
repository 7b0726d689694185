"""Read the tasks of an evaluation with their data; what their results are, of the numbers of each completion.

Shapes: N items and C completions of a task.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_align.checkpoint.card import shape_differences
from megatron_align.config import ParallelConfig
from megatron_align.data.formats.files import expand
from megatron_align.data.sample_table import SampleTable
from megatron_align.data.store import TokenStore, sha256
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, require
from megatron_align.evaluation.answers import PromptedTask, read_prompted_task
from megatron_align.evaluation.config import (
    FILES,
    AnsweredTask,
    ChoiceTask,
    LMEvalTask,
    LossTask,
    PreferenceTask,
    Task,
)
from megatron_align.evaluation.directions import directions_of
from megatron_align.evaluation.progress import progress
from megatron_align.evaluation.results import Items, TaskResult
from megatron_align.evaluation.tables import Choices, TaskContext, open_store, read_choices
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.training.likelihood import CompletionScorer
from megatron_align.training.model_checks import require_vocabulary
from megatron_align.training.setup import locate

if TYPE_CHECKING:
    from megatron_align.evaluation.lm_eval_results import LoadedTask


@dataclass(frozen=True, slots=True)
class LikelihoodTask:
    """A task on log-probs with its data.

    Args:
        task: of the configuration.
        table: its samples.
        items: from the completions' numbers under the policy, and under the reference where there is one.
        reference: None: the task compares with none.
        rendered: whether the chat template has rendered a record.
    """

    task: Task
    table: SampleTable
    items: Callable[[np.ndarray, np.ndarray | None], Items]
    reference: str | None = None
    rendered: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """Tasks with their data.

    Args:
        tasks: in order.
        scored: those on log-probs.
        answered: those whose answers are generated.
        lm_eval: lm-eval's.
        context: that they were read with.
    """

    tasks: tuple[Task, ...]
    scored: list[LikelihoodTask]
    answered: list[PromptedTask]
    lm_eval: list[LoadedTask]
    context: TaskContext

    @property
    def directions(self) -> dict[str, Mapping[str, bool]]:
        """Which metrics of each task are better when they are higher, and which when they are lower."""
        of_lm_eval = {loaded.task.name: loaded.directions for loaded in self.lm_eval}
        own = {task.name: directions_of(task) for task in self.tasks if task.name not in of_lm_eval}
        return {task.name: {**own, **of_lm_eval}[task.name] for task in self.tasks}

    def results(self, items: Mapping[str, TaskResult], about: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of ``results.json``.

        Args:
            items: of each task, by name.
            about: what was evaluated: model, precision, layout.
        """
        rendered: list[Any] = [each.task for each in self.scored if each.rendered]
        rendered += [each.task for each in self.answered if each.rendered]
        rendered += [each.task for each in self.lm_eval if each.task.apply_chat_template]
        clocks = {task.name: reads for task in rendered if (reads := self.context.clock(task))}
        given = {name: of_task.data for name, of_task in items.items()}
        return {
            "tasks": {task.name: items[task.name].result(task.sources) for task in self.tasks},
            "primary": {name: of_task.primary for name, of_task in items.items()},
            "higher_is_better": self.directions,
            "data": {
                task.name: given[task.name]
                or [sha256(file) for path in task.sources for file in expand(path)]
                for task in self.tasks
            },
            "files": {task.name: found for task in self.tasks if (found := _other_files(task))},
            **about,
            "template_date": self.context.template_date if clocks else None,
            "clock": clocks,
            "configuration": {task.name: dataclasses.asdict(task) for task in self.tasks},
        }


def layout_of(parallel: ParallelConfig, ranks: int) -> dict[str, int]:
    """Return the layout as results.json has it."""
    return {"ranks": ranks, **{name: getattr(parallel, name) for name in ("tensor", "pipeline", "context")}}


def read_tasks(tasks: Sequence[Task], shape: ModelShape, context: TaskContext) -> TaskSet:
    """Read the data of all tasks, and tokenise them if need be, before the ranks meet.

    Raises:
        InputError: bad data, or a task that the model cannot do; names the task.
    """
    scored: list[LikelihoodTask] = []
    answered: list[PromptedTask] = []
    lm_eval: list[LoadedTask] = []
    for task in tasks:
        require(
            not shape.is_reward or (isinstance(task, PreferenceTask) and task.score in (None, "reward")),
            f"task {task.name}: {shape.architecture} has rewards only: kind preference with score reward, "
            f"got kind {task.kind}",
        )
        if isinstance(task, AnsweredTask):
            answered.append(
                read_prompted_task(
                    task, context.assets, shape.max_positions, context.now, context.template_of(task)
                )
            )
        elif isinstance(task, LMEvalTask):
            from megatron_align.evaluation.lm_eval_results import load_lm_eval  # an optional package

            lm_eval.append(load_lm_eval(task, quiet=not context.shows))
        elif isinstance(task, ChoiceTask):
            tokenizer = load_tokenizer(str(context.assets))
            template = context.template_of(task)
            choices = read_choices(task, tokenizer, context.sequence_length, context.now, template)
            of_item = partial(_choice_items, choices)
            scored.append(LikelihoodTask(task, choices.table, of_item, rendered=choices.rendered))
        else:
            scored.append(_stored_task(task, shape, context))
    stores = {f"task {s.task.name}": s.table for s in scored if isinstance(s.table, TokenStore)}
    require_vocabulary(stores, shape)
    return TaskSet(tasks=tuple(tasks), scored=scored, answered=answered, lm_eval=lm_eval, context=context)


def numbers_of(
    tasks: Sequence[LikelihoodTask], score: CompletionScorer, context: TaskContext
) -> dict[str, np.ndarray]:
    """Return the numbers of the completions of some tasks by name, under the weights that are loaded. Collective."""
    numbers = {}
    for scored in tasks:
        name = scored.task.name
        with progress(f"scoring {name}", len(scored.table), context.shows) as advance:
            numbers[name] = score(scored.table, f"scoring {name}", advance)
    return numbers


def scored_items(
    tasks: Sequence[LikelihoodTask],
    numbers: Mapping[str, np.ndarray],
    references: Mapping[str, np.ndarray],
) -> dict[str, TaskResult]:
    """Return the items of tasks by name, of the numbers under the policy and under the references they have."""
    return {
        scored.task.name: scored.items(numbers[scored.task.name], references.get(scored.task.name))
        for scored in tasks
    }


def _stored_task(task: Task, shape: ModelShape, context: TaskContext) -> LikelihoodTask:
    """Return a task on chat data or pairs, tokenised."""
    if isinstance(task, LossTask):
        store = open_store(task, ("chat",), context)
        return LikelihoodTask(task, store, partial(_loss_items, store))
    assert isinstance(task, PreferenceTask), "every other kind is handled by the caller"
    score = task.score or (
        "reward" if shape.is_reward else "implicit_reward" if task.reference else "logprob"
    )
    require(
        score != "reward" or shape.is_reward,
        f"task {task.name}: score reward needs a reward model, got {shape.architecture}",
    )
    require(
        (score == "implicit_reward") == (task.reference is not None),
        f"task {task.name}: reference belongs to score implicit_reward, got score {score} with {task.reference}",
    )
    if task.reference is not None:
        _require_same_shape(task, shape)
    store = open_store(task, ("pair", "triple"), context)
    return LikelihoodTask(task, store, partial(_preference_items, store, score), task.reference)


def _require_same_shape(task: PreferenceTask, shape: ModelShape) -> None:
    assert task.reference is not None, "checked by the caller"
    theirs = read_shape(locate(task.reference)[1])
    if differences := shape_differences(dataclasses.asdict(shape), dataclasses.asdict(theirs)):
        listed = ", ".join(f"{key} {found!r} for {ours!r}" for key, (ours, found) in differences.items())
        raise InputError(
            f"task {task.name}: reference must be of the model's shape, got {listed} in {task.reference}"
        )


def _loss_items(store: TokenStore, sums_C: np.ndarray, _: np.ndarray | None) -> Items:
    counts_N = store.completion_scored.astype(np.float64)  # a chat sample is one completion
    return Items(
        primary="loss", values={"loss": -sums_C}, weights_N=counts_N, sources_N=np.asarray(store.sources)
    )


def _preference_items(
    store: TokenStore, score: str, policy_C: np.ndarray, reference_C: np.ndarray | None
) -> Items:
    scores_C = policy_C
    if score == "per_token":
        scores_C = policy_C / store.completion_scored
    elif score == "implicit_reward":
        assert reference_C is not None, "it was scored"
        scores_C = policy_C - reference_C
    width = 3 if store.kind == "triple" else 2
    chosen_N, rejected_N = scores_C[0::width], scores_C[1::width]
    values = {
        "accuracy": (chosen_N > rejected_N).astype(np.float64),
        "margin": chosen_N - rejected_N,
        "chosen": chosen_N,
        "rejected": rejected_N,
    }
    return Items(primary="accuracy", values=values, sources_N=np.asarray(store.sources))


def _choice_items(choices: Choices, sums_C: np.ndarray, _: np.ndarray | None) -> Items:
    ends = choices.table.completion_offsets[1:-1]
    right: dict[str, list[float]] = {"accuracy": [], "accuracy_norm": []}
    rows = []
    scores = {"accuracy": sums_C, "accuracy_norm": sums_C / choices.characters}
    for name, scores_C in scores.items():
        for of_question, correct in zip(np.split(scores_C, ends), choices.correct, strict=True):
            right[name].append(float(of_question.argmax() == correct))
    for of_question, correct in zip(np.split(sums_C, ends), choices.correct, strict=True):
        rows.append({"logprobs": of_question.tolist(), "correct": int(correct)})
    return Items(
        primary="accuracy",
        values={name: np.array(values) for name, values in right.items()},
        sources_N=choices.table.sources,
        rows=rows,
    )


def _other_files(task: Task) -> dict[str, str]:
    """Return the hashes of the files that a task reads besides its data, by the name of their option."""
    return {name: sha256(file) for name in FILES if (file := getattr(task, name, None))}
