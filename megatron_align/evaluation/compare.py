"""Compare two evaluations on the same items: paired differences, their intervals, and a sentence on each.

Shapes: N items of a task.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_align.errors import InputError, listed, require, shown
from megatron_align.evaluation.config import FILES
from megatron_align.evaluation.directions import direction
from megatron_align.evaluation.results import ITEMS, RESULTS
from megatron_align.evaluation.statistics import difference_interval
from megatron_align.model.families import read_json
from megatron_align.storage.atomic_write import write_file
from megatron_align.storage.resumable_lines import read_rows

COMPARISON = "comparison.json"
# Options that do not define a task: its data are compared by their content, the others only say how it is run.
_FREE = {"data", "workers", "failures"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The primary metric of a task under two models.

    Args:
        task: its name.
        metric: its primary metric.
        values: under the first and the second model.
        interval: 95%, of the second minus the first, paired by item.
        n: items.
        higher_is_better: None: nothing says which is better.
    """

    task: str
    metric: str
    values: tuple[float, float]
    interval: tuple[float, float]
    n: int
    higher_is_better: bool | None = True

    def sentence(self) -> str:
        """Return one sentence that says whether the difference is real."""
        first, second = self.values
        low, high = self.interval
        shown = f"{self.metric} {first:.4f} -> {second:.4f}, difference {second - first:+.4f} [{low:+.4f}, {high:+.4f}]"
        return f"{self.task}: {self.verdict()} ({shown}, {self.n:,} items)"

    def verdict(self) -> str:
        """Return which model is better, if the difference is real."""
        low, high = self.interval
        if low <= 0 <= high:
            return "no real difference: its 95% interval holds 0"
        if self.higher_is_better is None:
            return f"a real difference, but nothing says whether more or less {self.metric} is better"
        return f"the {'second' if (low > 0) == self.higher_is_better else 'first'} model is better"


@dataclass(frozen=True, slots=True)
class NotCompared:
    """A task that two evaluations share, whose primary metric its items do not have: it is no mean over them."""

    task: str
    metric: str

    def sentence(self) -> str:
        """Return one sentence that says so."""
        return f"{self.task}: not compared, its items have no {self.metric} of their own"


def compare(first: str | Path, second: str | Path) -> list[Difference | NotCompared]:
    """Return the differences of the tasks that two evaluations share, and write ``comparison.json`` into the second.

    Args:
        first: folder of the results of the model that is compared with.
        second: folder of the results of the other.

    Raises:
        InputError: a folder has no results, no task is shared, a shared one has other items or is defined otherwise, or
            none can be compared.
    """
    found = differences(first, second)
    one, other = (read_results(folder) for folder in (first, second))
    content = {
        "first": one["model"],
        "second": other["model"],
        "tasks": {
            each.task: {"metric": each.metric, "sentence": each.sentence()}
            if isinstance(each, NotCompared)
            else {
                "metric": each.metric,
                "higher_is_better": each.higher_is_better,
                "first": each.values[0],
                "second": each.values[1],
                "ci95": list(each.interval),
                "n": each.n,
                "sentence": each.sentence(),
            }
            for each in found
        },
    }
    write_file(Path(second) / COMPARISON, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return found


def differences(first: str | Path, second: str | Path) -> list[Difference | NotCompared]:
    """Return the differences of the tasks that two evaluations share; arguments and errors as of :func:`compare`."""
    folders = (Path(first), Path(second))
    one, other = (read_results(folder) for folder in folders)
    shared = [name for name in one["tasks"] if name in other["tasks"]]
    require(
        bool(shared),
        f"two evaluations must share a task to be compared, got {_names(one)} and {_names(other)}",
    )
    found = [_difference(name, folders, (one, other)) for name in shared]
    none = all(isinstance(each, NotCompared) for each in found)
    require(not none, f"no task can be compared: {'; '.join(each.sentence() for each in found)}")
    return found


def _difference(
    name: str, folders: Sequence[Path], results: Sequence[dict[str, Any]]
) -> Difference | NotCompared:
    if differing := _other_definition(name, results):
        raise InputError(
            f"task {name} must be defined identically to be compared, got {differing} in "
            f"{' and '.join(map(str, folders))}"
        )
    data = [result["data"].get(name) for result in results]
    counts = [result["tasks"][name]["n"] for result in results]
    metrics = [result["primary"].get(name) for result in results]
    found = [f"{n} items with {metric} in {f}" for n, metric, f in zip(counts, metrics, folders, strict=True)]
    require(
        data[0] == data[1] and counts[0] == counts[1] and metrics[0] == metrics[1],
        f"task {name} must have the same data and metric to be compared, got {' and '.join(found)}"
        f"{', of other files' if data[0] != data[1] else ''}",
    )
    metric = metrics[0]
    columns = [column for folder in folders if (column := _column(folder, name, metric)) is not None]
    if len(columns) < len(folders):
        return NotCompared(name, metric)
    (values_N, weights_N), (others_N, other_weights_N) = columns
    low, high = difference_interval(columns[0], columns[1])
    return Difference(
        task=name,
        metric=metric,
        values=(
            float(values_N.sum() / weights_N.sum()),
            float(others_N.sum() / other_weights_N.sum()),
        ),
        interval=(low, high),
        n=counts[0],
        higher_is_better=direction(results, name, metric),
    )


def _other_definition(name: str, results: Sequence[dict[str, Any]]) -> str:
    """Return the options of a task in which two evaluations differ, and what its templates read; empty: none."""
    one, other = (_definition(result.get("configuration", {}).get(name, {})) for result in results)
    names = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    found = [f"{key} {shown(one.get(key))} and {shown(other.get(key))}" for key in names]
    hashes = [result.get("files", {}).get(name, {}) for result in results]
    found += [
        f"{key} files of different content"
        for key in FILES
        if all(key in of for of in hashes) and hashes[0][key] != hashes[1][key]
    ]
    clocks = [result.get("clock", {}).get(name) for result in results]
    if None not in clocks and clocks[0] != clocks[1]:
        dates = " and ".join(str(result.get("template_date")) for result in results)
        found.append(f"template_date {dates} (set it to evaluate as of one day)")
    return listed(found)


def _definition(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that define a task; of files only whether there are any."""
    given = {name: value for name, value in options.items() if name not in _FREE}
    return given | {name: "a file" for name in FILES if given.get(name)}


def _column(folder: Path, task: str, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a metric of each item and its weight, ``[N]`` each; None: an item has none."""
    rows = read_items(folder, task)
    if not all(metric in row for row in rows):
        return None
    values_N = np.array([row[metric] for row in rows], np.float64)
    return values_N, np.array([row.get("weight", 1.0) for row in rows], np.float64)


def read_results(folder: str | Path) -> dict[str, Any]:
    """Return what the ``results.json`` of a folder holds.

    Raises:
        InputError: it has none, or another file of that name.
    """
    file = Path(folder) / RESULTS
    require(file.is_file(), f"no results of an evaluation in {folder}: it has no {RESULTS}")
    results = read_json(file)
    if not all(isinstance(results.get(key), dict) for key in ("tasks", "data", "primary")):
        raise InputError(f"results must have tasks, data and primary: {file}")
    return results


def read_items(folder: str | Path, task: str) -> list[dict[str, Any]]:
    """Return the rows of a task's items.

    Raises:
        InputError: there is no file of items.
    """
    file = Path(folder) / ITEMS / f"{task}.jsonl"
    require(file.is_file(), f"results must have the items of each task, found no file {file}")
    return read_rows(file)


def _names(results: dict[str, Any]) -> str:
    return ", ".join(results["tasks"])
