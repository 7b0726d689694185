"""Results of tasks: metrics with a confidence interval, of each source too, and one row per item.

Shapes: N items of a task, C completions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_align.evaluation.statistics import ratio_interval
from megatron_align.storage.atomic_write import write_file

RESULTS, ITEMS = "results.json", "items"


class TaskResult(Protocol):
    """The result of a task, on every rank."""

    @property
    def primary(self) -> str:
        """The metric that the interval is of."""
        ...

    @property
    def data(self) -> list[str] | None:
        """Hashes of the data where they are not files; None: they are the files of the task's sources."""
        ...

    def result(self, sources: Sequence[str]) -> dict[str, Any]:
        """Return the task's entry of results.json; ``sources``: their names, in order."""
        ...

    def write(self, file: Path) -> None:
        """Write a row of JSON for each item."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """The numbers of each item of a task.

    Args:
        primary: the metric that the interval is of.
        values: by metric, ``[N]``; a metric is ``sum(values) / sum(weights)``.
        weights_N: None: 1 each.
        sources_N: index of each item's source.
        rows: further fields of each item's row, such as an answer; empty: none.
        extra: further metrics from the values of some items; None: none.
    """

    primary: str
    values: Mapping[str, np.ndarray]
    sources_N: np.ndarray
    weights_N: np.ndarray | None = None
    rows: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    extra: Callable[[Mapping[str, np.ndarray]], dict[str, Any]] | None = None

    @property
    def data(self) -> None:
        """None: the data are the files of the task's sources."""

    def __len__(self) -> int:
        return len(self.sources_N)

    def result(self, sources: Sequence[str]) -> dict[str, Any]:
        """Return the task's entry of results.json; ``sources``: their names, in order."""
        result = self._metrics(np.ones(len(self), bool))
        if len(sources) > 1:
            result["sources"] = {
                name: self._metrics(self.sources_N == i)
                for i, name in enumerate(sources)
                if (self.sources_N == i).any()
            }
        return result

    def write(self, file: Path) -> None:
        """Write a row of JSON for each item: its numbers and its further fields."""
        lines = []
        for i in range(len(self)):
            numbers = {name: float(values_N[i]) for name, values_N in self.values.items()}
            if self.weights_N is not None:
                numbers["weight"] = float(self.weights_N[i])
            more = self.rows[i] if self.rows else {}
            lines.append(json.dumps({"item": i, **numbers, **more}, ensure_ascii=False) + "\n")
        write_file(file, "".join(lines))

    def _metrics(self, own_N: np.ndarray) -> dict[str, Any]:
        weights_N = np.ones(len(self)) if self.weights_N is None else self.weights_N
        total = weights_N[own_N].sum()
        metrics: dict[str, Any] = {
            name: float(values_N[own_N].sum() / total) for name, values_N in self.values.items()
        }
        if self.primary == "loss":
            metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
            metrics["tokens"] = int(total)
        if self.extra is not None:
            metrics |= self.extra({name: values_N[own_N] for name, values_N in self.values.items()})
        interval = ratio_interval(self.values[self.primary][own_N], weights_N[own_N])
        return {**metrics, "n": int(own_N.sum()), "ci95": interval}


def write_results(out: Path, items: Mapping[str, TaskResult], results: Mapping[str, Any]) -> None:
    """Write the items of each task, then results.json, which says that they are complete."""
    folder = out / ITEMS
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_task in items.items():
        of_task.write(folder / f"{name}.jsonl")
    write_file(out / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def table_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return results as a text table: a line for each metric of each task."""
    lines = []
    for task, result in results.items():
        of_sources = result.get("sources", {})
        for name, numbers in (
            (task, result),
            *((f"  {source}", each) for source, each in of_sources.items()),
        ):
            metrics = {k: v for k, v in numbers.items() if isinstance(v, float)}
            low, high = numbers["ci95"] or (math.nan, math.nan)  # lm-eval has metrics without one
            shown = "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
            lines.append(f"{name:24}  {shown}  [{low:.4f}, {high:.4f}]  n {numbers['n']:,}")
    return "\n".join(lines)
