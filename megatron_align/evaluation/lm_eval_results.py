"""Load lm-eval's tasks, run them on the policy, and turn their results into a task's entry of results.json.

Needs the package ``lm_eval`` (extra ``eval``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import yaml
from jinja2 import TemplateError
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.errors import InputError, one_line, require
from megatron_align.evaluation.config import LMEvalTask
from megatron_align.evaluation.lm_eval import PolicyLM
from megatron_align.evaluation.statistics import ratio_interval
from megatron_align.evaluation.tables import TaskContext
from megatron_align.hf.assets import AssetChanges
from megatron_align.storage.atomic_write import write_file
from megatron_align.training.likelihood import CompletionScorer

STDERR = "_stderr"
# What lm-eval and datasets raise for unknown tasks, malformed files and data that are not there.
_UNREADABLE = (
    LookupError,
    ValueError,
    TypeError,
    OSError,
    ImportError,
    AttributeError,
    yaml.YAMLError,
    TemplateError,
)


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task of a configuration with lm-eval's tasks.

    Args:
        task: of the configuration.
        specs: lm-eval's tasks and groups, as its evaluation takes them.
        names: of its tasks.
        group: that all of them belong to; None: there are several groups, or tasks without one.
        manager: that loaded them.
        directions: whether higher values of a metric are better, where lm-eval says so and its tasks agree.
    """

    task: LMEvalTask
    specs: list[Any]
    names: list[str]
    group: str | None
    manager: TaskManager
    directions: Mapping[str, bool] = field(default_factory=dict)


def load_lm_eval(task: LMEvalTask, *, quiet: bool = False) -> LoadedTask:
    """Load lm-eval's tasks with their data, before the ranks meet.

    Args:
        task: of the configuration.
        quiet: lm-eval logs errors only, on other ranks than the first.

    Raises:
        InputError: lm-eval does not know a task, or cannot read its file or data.
    """
    if quiet:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = all(Path(name).is_file() for name in task.sources)
    try:
        manager = TaskManager(include_path=task.include_path, include_defaults=not files)
        loaded = manager.load(list(task.sources))
    except _UNREADABLE as error:
        reason = one_line(error)
        raise InputError(
            f"task {task.name}: lm-eval could not load {', '.join(task.sources)}: {reason}"
        ) from error
    tasks, groups, children = loaded["tasks"], loaded["groups"], loaded["group_map"]
    inner = {child for names in children.values() for child in names}
    in_groups = {each.task_name for group in groups.values() for each in group.get_all_tasks()}
    specs = [group for name, group in groups.items() if name not in inner]
    specs += [each for name, each in tasks.items() if name not in in_groups]
    for name, each in tasks.items():
        require(
            not getattr(each, "UNSAFE_CODE", False),
            f"task {task.name}: lm-eval's {name} runs generated code unconfined and is refused; "
            "kind generate with check code confines it",
        )
    outer = [name for name in groups if name not in inner]
    group = outer[0] if len(specs) == len(outer) == 1 else None
    return LoadedTask(task, specs, list(tasks), group, manager, _directions(list(tasks.values())))


def _directions(tasks: Sequence[Any]) -> dict[str, bool]:
    """Return whether higher values are better, by metric (with its filter, unless that is ``none``)."""
    found: dict[str, set[Any]] = {}
    for task in tasks:
        for metric, higher in (task.higher_is_better() or {}).items():
            for each in getattr(task, "_filters", ()):
                key = metric if each.name == "none" else f"{metric},{each.name}"
                found.setdefault(key, set()).add(higher)
    return {key: of.pop() for key, of in found.items() if of in ({True}, {False})}


@dataclass(frozen=True, slots=True, kw_only=True)
class LMEvalItems:
    """The results of lm-eval's tasks as a task's result; the interface of :class:`.Items`.

    Args:
        primary: the metric that the interval is of.
        entry: of results.json.
        rows: one for each document, with its numbers and answers.
        data: hashes of the documents and prompts of each of lm-eval's tasks.
    """

    primary: str
    entry: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    data: list[str]

    def result(self, sources: Sequence[str]) -> dict[str, Any]:
        """Return the task's entry of results.json."""
        return dict(self.entry)

    def write(self, file: Path) -> None:
        """Write a row of JSON for each document."""
        lines = [json.dumps({"item": i, **row}, ensure_ascii=False) + "\n" for i, row in enumerate(self.rows)]
        write_file(file, "".join(lines))


def run_lm_eval(
    tasks: Sequence[LoadedTask],
    score: CompletionScorer,
    context: TaskContext,
    changes: AssetChanges = AssetChanges(),  # noqa: B008 - immutable
) -> dict[str, LMEvalItems]:
    """Run lm-eval's tasks on the policy and return their results by name, on every rank. Collective.

    Args:
        tasks: loaded.
        score: see :class:`.PolicyLM`.
        context: of the tasks.
        changes: see :class:`.PolicyLM`.

    Raises:
        InputError: a request that the policy cannot answer.
    """
    template = load_chat_template(context.chat_template) if context.chat_template else None
    lm = PolicyLM(
        score, context.assets, changes, now=context.now, chat_template=template, shown=context.shown
    )
    results = {}
    for loaded in tasks:
        with score.watchdog.patient(f"running {loaded.task.name}"):
            results[loaded.task.name] = _run(loaded, lm)
    return results


def _run(loaded: LoadedTask, lm: PolicyLM) -> LMEvalItems:
    task = loaded.task
    try:
        found = simple_evaluate(
            model=lm,
            tasks=loaded.specs,
            task_manager=loaded.manager,
            num_fewshot=task.num_fewshot,
            limit=task.limit,
            apply_chat_template=task.apply_chat_template,
            system_instruction=task.system_instruction,
            fewshot_as_multiturn=task.fewshot_as_multiturn,
            gen_kwargs=task.gen_kwargs,
            log_samples=True,
        )
    except (
        TemplateError
    ) as error:  # of a later document than the first, which was rendered when the task was loaded
        raise InputError(
            f"task {task.name}: a template of {', '.join(loaded.names)} fails: {one_line(error)}"
        ) from error
    items = [
        _items(found, loaded) if found is not None else None
    ]  # only the first rank of a node has results
    dist.broadcast_object_list(items, src=0)
    assert items[0] is not None, "rank 0 is the first of its node"
    return items[0]


def _items(found: Mapping[str, Any], loaded: LoadedTask) -> LMEvalItems:
    rows_by_task = {
        name: _means_only(found, name, _rows(name, found["samples"][name])) for name in loaded.names
    }
    rows = [row for name in loaded.names for row in rows_by_task[name]]
    entries = {name: _entry(found, name, rows_by_task[name]) for name in loaded.names}
    if loaded.group is not None:
        entry = {**_entry(found, loaded.group, rows), "sources": entries}
    elif len(entries) == 1:
        [entry] = entries.values()
    else:
        entry = {**_pooled(rows), "sources": entries}
    metrics = [key for key, value in entry.items() if isinstance(value, float)]
    if not metrics:
        raise InputError(
            f"task {loaded.task.name}: lm-eval's tasks must share a metric to be one task, "
            f"{', '.join(loaded.names)} share none: give each a task of its own"
        )
    digests = [_digest(found["samples"][name]) for name in loaded.names]
    return LMEvalItems(primary=metrics[0], entry=entry, rows=rows, data=digests)


def _metrics(found: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return a task's numbers and standard errors as lm-eval aggregates them, the filter ``none`` not named."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in found["results"][name].items()
        if "," in key and isinstance(value, numbers.Real)
    }


def _means_only(
    found: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a task's rows without the numbers whose mean is not the metric of that name.

    lm-eval's ``perplexity`` of a document is its log-likelihood, for example.
    """
    metrics = _metrics(found, name)
    keys = {key for row in rows for key, value in row.items() if isinstance(value, float)}
    others = {key for key in keys if key not in metrics or not _is_mean(metrics[key], key, rows)}
    return [{key: value for key, value in row.items() if key not in others} for row in rows]


def _is_mean(value: float, metric: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a metric is the mean of the rows' numbers of its name, which every row then has."""
    values_N = np.array([row.get(metric, np.nan) for row in rows], np.float64)
    return bool(len(values_N) and np.isclose(values_N.mean(), value, rtol=1e-9))


def _entry(found: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a task or group, means over its documents first; ``rows``: of these."""
    every = _metrics(found, name)
    metrics = {key: value for key, value in every.items() if STDERR not in key}
    means = {key: value for key, value in metrics.items() if _is_mean(value, key, rows)}
    metrics = {**means, **metrics}
    interval = None
    for primary in list(metrics)[:1]:
        metric, comma, filtered = primary.partition(",")
        stderr = every.get(f"{metric}{STDERR}{comma}{filtered}")
        interval = _interval(metrics[primary], stderr, primary, rows)
    return {**metrics, "n": len(rows), "ci95": interval}


def _interval(
    value: float, stderr: float | None, metric: str, rows: Sequence[Mapping[str, Any]]
) -> list[float] | None:
    """Return the bootstrap over documents where the metric is their mean, else 1.96 of lm-eval's standard errors."""
    if _is_mean(value, metric, rows):
        return ratio_interval(np.array([row[metric] for row in rows], np.float64), np.ones(len(rows)))
    return None if stderr is None else [value - 1.96 * stderr, value + 1.96 * stderr]


def _pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over the documents of several tasks, of the metrics that all of them have."""
    columns = {
        key: np.array([row[key] for row in rows])
        for key, value in rows[0].items()
        if isinstance(value, float) and all(key in row for row in rows)
    }
    first = next(iter(columns.values()), None)
    interval = None if first is None else ratio_interval(first, np.ones(len(rows)))
    means = {key: float(values_N.mean()) for key, values_N in columns.items()}
    return {**means, "n": len(rows), "ci95": interval}


def _rows(name: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each document: numbers of all filters, the end of the prompt, target and answers."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        arguments = sample["arguments"]
        row = rows.setdefault(
            sample["doc_id"],
            {
                "task": name,
                "doc": sample["doc_id"],
                "prompt": str(arguments[0][0]),
                "target": str(sample["target"]),
            },
        )
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            if isinstance(sample[metric], numbers.Real | np.bool_):
                row[f"{metric}{suffix}"] = float(sample[metric])
        if any(isinstance(resp, str) for resps in sample["resps"] for resp in resps):
            row[f"answers{suffix}"] = [
                str(answer) for answer in np.ravel(np.array(sample["filtered_resps"], object))
            ]
    return list(rows.values())


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    hashes = [[sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]] for sample in samples]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
