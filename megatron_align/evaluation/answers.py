"""Tasks whose answers are generated, then checked or compared by a judge; every rank answers a share of the prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, require
from megatron_align.evaluation import judge
from megatron_align.evaluation.config import AnsweredTask, GenerateTask, JudgeTask
from megatron_align.evaluation.judge import Judge, read_baselines, read_comparison
from megatron_align.evaluation.progress import progress
from megatron_align.evaluation.results import ITEMS, Items
from megatron_align.evaluation.tables import TaskContext
from megatron_align.model import parallel
from megatron_align.rollout.engine import Engine
from megatron_align.rollout.prompts import PromptRecord, PromptTokenizer, read_prompts
from megatron_align.rollout.types import Completion, Prompt, require_fitting
from megatron_align.rollout.verifiers.checks import CHECKS, Scores
from megatron_align.rollout.verifiers.running import Scoring, checking, share_of_cores
from megatron_align.training.watchdog import Watchdog

CHUNK = 64  # prompts of a rank between two signs of progress


class NotScored(InputError):
    """Answers could not be scored: a judge does not answer, programs cannot be confined, ..."""


@dataclass(frozen=True, slots=True)
class PromptedTask:
    """An answered task with its prompts, what their answers are compared with, and whether any was messages.

    ``records`` and ``tokenizer`` are what the prompts were made of; ``complements`` were appended to them, by index.
    """

    task: AnsweredTask
    prompts: list[Prompt]
    expected: list[Any]
    sources: list[int]
    rendered: bool
    records: list[PromptRecord]
    tokenizer: PromptTokenizer
    complements: Mapping[int, str | None] = field(default_factory=dict)


def read_prompted_task(
    task: AnsweredTask,
    assets: Path,
    context: int,
    now: datetime | None = None,
    chat_template: str | None = None,
) -> PromptedTask:
    """Read and tokenise the prompts of a task.

    Args:
        task: of the evaluation.
        assets: folder of the model's tokenizer.
        context: most tokens of a prompt with its answer.
        now: what the chat template reads from the clock; None: the time of each rendering.
        chat_template: file of the template if the task names none; None: the tokenizer's own.

    Raises:
        InputError: a record is malformed, lacks what the check compares with, or does not fit the context.
    """
    file = task.chat_template or chat_template
    template = load_chat_template(file) if file else None
    tokenizer = PromptTokenizer(load_tokenizer(str(assets)), template, now)
    baselines = read_baselines(task.baseline) if isinstance(task, JudgeTask) and task.baseline else None
    prompts: list[Prompt] = []
    expected: list[Any] = []
    sources: list[int] = []
    records: list[PromptRecord] = []
    for source, path in enumerate(task.sources):
        for record in read_prompts(path, as_chat=task.as_chat, limit=task.limit):
            if isinstance(task, GenerateTask):
                expected.append(CHECKS[task.check].expected(record))
            else:
                # A missing one is found below, where all are counted.
                own = None if baselines is None else (*baselines, *[""] * (len(prompts) + 1))[len(prompts)]
                expected.append(read_comparison(record, own))
            prompts.append(tokenizer.prompt(record, len(prompts)))
            sources.append(source)
            records.append(record)
    require(
        baselines is None or len(baselines) == len(prompts),
        f"task {task.name}: baseline must have an answer for each of the {len(prompts)} prompts, "
        f"got {len(baselines or ())}",
    )
    require_fitting(prompts, context, f"prompts of task {task.name}")
    return PromptedTask(task, prompts, expected, sources, tokenizer.rendered, records, tokenizer)


def augmented(
    task: PromptedTask,
    augment: Callable[[Sequence[PromptRecord]], list[PromptRecord]],
    own: range,
    context: int,
) -> PromptedTask:
    """Return a task whose prompts of this rank have complements.

    Args:
        task: with its prompts.
        augment: appends complements.
        own: indices of this rank's prompts; the others stay as they are.
        context: most tokens of a prompt with its answer.

    Raises:
        InputError: a prompt with its complement does not fit the context.
    """
    made = dict(zip(own, augment([task.records[i] for i in own]), strict=True))
    prompts = [
        task.tokenizer.prompt(made[i], prompt.key) if i in made else prompt
        for i, prompt in enumerate(task.prompts)
    ]
    require_fitting([prompts[i] for i in own], context, f"augmented prompts of task {task.task.name}")
    return replace(task, prompts=prompts, complements={i: made[i].raw.get("complement") for i in own})


def own_prompts(task: PromptedTask, rank_info: parallel.RankInfo) -> range:
    """Return the indices of the prompts that a rank answers."""
    return range(rank_info.rank, len(task.prompts), rank_info.world_size)


def answer_all(task: PromptedTask, engine: Engine, watchdog: Watchdog, context: TaskContext) -> Items:
    """Return the scored answers of all prompts, on every rank. Collective.

    Args:
        task: with its prompts.
        engine: of this rank.
        watchdog: of this rank.
        context: this process, and the folder of the results.

    Raises:
        InputError: on every rank: one could not answer its share.
        NotScored: on every rank: one could not score its share.
    """
    options, ranks = task.task, context.rank_info.world_size
    own = own_prompts(task, context.rank_info)
    with watchdog.patient(f"answering {options.name}"), parallel.failing_together():
        answers = _generate(task, engine, watchdog, (own, context.shows))
    texts = [
        (completion.text, task.expected[i])
        for i, completions in zip(own, answers, strict=True)
        for completion in completions
    ]
    cores = share_of_cores()
    try:
        with (
            watchdog.patient(f"scoring {options.name}"),
            parallel.failing_together(),
            _scoring(options, context, cores) as scoring,
        ):
            scores = scoring(texts)
    except InputError as error:
        raise NotScored(str(error)) from error
    count = options.completions
    rows = [
        {
            "answers": [completion.text for completion in completions],
            "scores": scores[n * count : (n + 1) * count],
            "truncated": sum(completion.finish_reason == "length" for completion in completions) / count,
            **({"complement": task.complements[i]} if i in task.complements else {}),
        }
        for n, (i, completions) in enumerate(zip(own, answers, strict=True))
    ]
    gathered: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]
    watchdog.report(f"gathering the answers of {options.name}")
    dist.all_gather_object(gathered, rows)
    return _items(task, [gathered[i % ranks][i // ranks] for i in range(len(task.prompts))])


def _generate(
    task: PromptedTask, engine: Engine, watchdog: Watchdog, own: tuple[range, bool]
) -> list[list[Completion]]:
    """Return the answers of this rank's prompts; ``own``: their indices, and whether progress is shown."""
    (indices, shown), options = own, task.task
    answers: list[list[Completion]] = []
    with progress(f"answering {options.name}", len(indices), shown) as advance:

        def on_token(*_: int) -> None:
            watchdog.detail("generating")
            advance(0, 1)

        for start in range(0, len(indices), CHUNK):
            prompts = [task.prompts[i] for i in indices[start : start + CHUNK]]
            answers += engine.generate(prompts, options.sampling(), on_token)
            advance(len(prompts), 0)
    return answers


def _items(task: PromptedTask, rows: list[dict[str, Any]]) -> Items:
    options = task.task
    is_judged = isinstance(options, JudgeTask)
    metrics = CHECKS[options.check].metrics if isinstance(options, GenerateTask) else judge.METRICS
    names = (*metrics, *(("length_difference",) if is_judged else ()))
    values = {name: np.array([_mean(row["scores"], name) for row in rows]) for name in names}
    if isinstance(options, JudgeTask):
        judge.require_a_verdict(options, values["unjudged"])
    return Items(
        primary=metrics[0],
        values={**values, "truncated": np.array([row["truncated"] for row in rows])},
        sources_N=np.array(task.sources),
        rows=[{name: row[name] for name in ("answers", "complement") if name in row} for row in rows],
        extra=judge.extra_metrics if is_judged else None,
    )


def _mean(scores: list[Scores], metric: str) -> float:
    return sum(score[metric] for score in scores) / len(scores)


@contextmanager
def _scoring(task: AnsweredTask, context: TaskContext, cores: int) -> Iterator[Scoring]:
    """Yield the function that scores a task's answers; ``cores``: that this rank may keep busy."""
    if isinstance(task, JudgeTask):
        yield Judge(task, context.out / ITEMS, context.rank_info.rank).scores
        return
    assert isinstance(task, GenerateTask), "every other kind is no answered task"
    with checking(task.check, task.extract, cores) as scoring:
        yield scoring
