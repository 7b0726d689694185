"""Evaluations in a report: metrics with intervals, paired differences, sample items; answers given in training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_align.errors import InputError
from megatron_align.evaluation.compare import (
    Difference,
    NotCompared,
    differences,
    read_items,
    read_results,
)
from megatron_align.evaluation.directions import direction
from megatron_align.tools.report_html import escaped, table
from megatron_align.tools.report_runs import short

_MOST_ITEMS = 5  # best, and worst, of each task
_MOST_CHARACTERS = 2000  # of a text
_HIDDEN = ("n", "ci95", "sources", "length_difference")
_WIDTH, _ROW = 720, 30  # of the chart of intervals


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of an evaluation."""

    name: str
    folder: Path
    results: dict[str, Any]


def read_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation.

    Raises:
        InputError: the folder has no results, or another file of that name.
    """
    return Evaluation(folder.resolve().name, folder, read_results(folder))


def evaluation_sections(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the HTML of evaluations: what they are, metrics, differences to the first one, sample items."""
    if not evaluations:
        return []
    return [
        _about(evaluations),
        _chart(evaluations),
        _metrics(evaluations),
        _differences(evaluations),
        _items(evaluations),
    ]


def _cell(value: Any) -> str:
    """Return a value as the HTML of a cell: numbers short, texts with their line ends, lists one below the other."""
    if isinstance(value, bool) or value is None:
        return escaped(value)
    if isinstance(value, int | float):
        return escaped(short(value))
    if isinstance(value, list) and all(isinstance(each, str | int | float) for each in value):
        return "<hr>".join(_cell(each) for each in value)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        value = value["content"] if "role" not in value else f"{value['role']}: {value['content']}"
    elif isinstance(value, list) and all(isinstance(each, dict) and "content" in each for each in value):
        return "<hr>".join(_cell(each) for each in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    more = f" … {len(text) - _MOST_CHARACTERS:,} characters more" if len(text) > _MOST_CHARACTERS else ""
    return f'<div class="text">{escaped(text[:_MOST_CHARACTERS])}{more}</div>'


def _heads(evaluations: Sequence[Evaluation]) -> list[str]:
    return [f'<i class="swatch run{i % 8}"></i>{escaped(each.name)}' for i, each in enumerate(evaluations)]


def _about(evaluations: Sequence[Evaluation]) -> str:
    rows = []
    for head, each in zip(_heads(evaluations), evaluations, strict=True):
        layout = each.results.get("parallel", {})
        sizes = ", ".join(f"{name} {size}" for name, size in layout.items())
        shown = (
            each.results.get("model", "–"),
            each.results.get("precision", "–"),
            sizes,
            each.folder.resolve(),
        )
        rows.append([head, *map(escaped, shown)])
    return f"<h2>Evaluations</h2>{table(rows, ['', 'model', 'precision', 'layout', 'folder'])}"


def _tasks(evaluations: Sequence[Evaluation]) -> list[str]:
    return list(dict.fromkeys(name for each in evaluations for name in each.results["tasks"]))


def _metrics(evaluations: Sequence[Evaluation]) -> str:
    """Return a table with a row for each metric of each task, then those of its sources."""
    rows = []
    for task in _tasks(evaluations):
        entries = [each.results["tasks"].get(task, {}) for each in evaluations]
        primary = next(
            each.results["primary"].get(task) for each in evaluations if task in each.results["tasks"]
        )
        rows += _metric_rows(task, entries, primary)
        for source in dict.fromkeys(name for entry in entries for name in entry.get("sources", {})):
            of_source = [entry.get("sources", {}).get(source, {}) for entry in entries]
            rows += _metric_rows(f"{task} · {Path(source).name}", of_source, primary)
    return f"<h2>Metrics</h2>{table(rows, ['task', 'metric', *_heads(evaluations)])}"


def _metric_rows(name: str, entries: Sequence[dict[str, Any]], primary: str | None) -> list[list[str]]:
    names = dict.fromkeys(key for entry in entries for key in entry if key not in _HIDDEN)
    rows = []
    for n, metric in enumerate(sorted(names, key=lambda key: key != primary)):
        cells = [_with_interval(entry, metric, metric == primary) for entry in entries]
        rows.append([escaped(name) if n == 0 else "", f"<code>{escaped(metric)}</code>", *cells])
    return rows


def _with_interval(entry: dict[str, Any], metric: str, is_primary: bool) -> str:
    value = entry.get(metric)
    if value is None:
        return "–"
    text = (
        f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )
    if not is_primary:
        return escaped(text)
    interval = entry.get("ci95")
    bounds = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return f'<b>{escaped(text)}</b><span class="unit">{bounds}, n {entry.get("n", 0):,}</span>'


def _chart(evaluations: Sequence[Evaluation]) -> str:
    """Return the primary metric of each task as points with their intervals, one panel for each task."""
    panels = []
    for task in _tasks(evaluations):
        points = []
        for i, each in enumerate(evaluations):
            entry = each.results["tasks"].get(task, {})
            value = entry.get(each.results["primary"].get(task))
            if isinstance(value, int | float):
                points.append((i, each.name, float(value), entry.get("ci95") or [value, value]))
        if points:
            metric = next(
                each.results["primary"][task] for each in evaluations if task in each.results["primary"]
            )
            panels.append(_panel(task, metric, points))
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def _panel(task: str, metric: str, points: Sequence[tuple[int, str, float, Sequence[float]]]) -> str:
    low = min(min(interval[0], value) for _, _, value, interval in points)
    high = max(max(interval[1], value) for _, _, value, interval in points)
    room = (high - low or abs(high) or 1.0) * 0.08
    low, high = low - room, high + room

    def x(value: float) -> float:
        return 10 + 340 * (value - low) / (high - low)

    lines = []
    for n, (i, name, value, (start, stop)) in enumerate(points):
        y = 16 + _ROW * n
        lines.append(
            f'<g class="run{i % 8}"><title>{escaped(name)}: {value:.4f} [{start:.4f}, {stop:.4f}]</title>'
            f'<line x1="{x(start):.1f}" x2="{x(stop):.1f}" y1="{y}" y2="{y}" stroke-width="2"/>'
            f'<circle cx="{x(value):.1f}" cy="{y}" r="4.5"/></g>'
        )
    height = 16 + _ROW * len(points)
    marks = "".join(
        f'<text x="{x(value):.1f}" y="{height + 6}" text-anchor="{anchor}">{short(value)}</text>'
        for value, anchor in ((low + room, "start"), (high - room, "end"))
    )
    return (
        f'<figure><figcaption><span><b>{escaped(task)}</b><span class="unit">{escaped(metric)}, 95% interval</span>'
        f'</span></figcaption><svg viewBox="0 0 360 {height + 12}" role="img" aria-label="{escaped(task)}">'
        f"{''.join(lines)}{marks}</svg></figure>"
    )


def _differences(evaluations: Sequence[Evaluation]) -> str:
    """Return the paired differences of the other evaluations to the first, or why they cannot be compared."""
    if len(evaluations) < 2:
        return ""
    first, parts = evaluations[0], []
    for other in evaluations[1:]:
        try:
            found = differences(first.folder, other.folder)
        except InputError as error:
            parts.append(f'<p class="note">{escaped(other.name)} is not compared: {escaped(error)}</p>')
            continue
        compared = [each for each in found if isinstance(each, Difference)]
        parts.append(
            f"<p>{escaped(first.name)} → {escaped(other.name)}</p>{table(map(_difference_row, compared), _HEAD)}"
        )
        left = [each.sentence() for each in found if isinstance(each, NotCompared)]
        parts += [f'<p class="note">{escaped(sentence)}</p>' for sentence in left]
    return f"<h2>Differences on the same items</h2>{''.join(parts)}"


_HEAD = ["task", "metric", "first", "second", "difference, 95% interval", "items", "verdict"]


def _difference_row(difference: Difference) -> list[str]:
    first, second = difference.values
    low, high = difference.interval
    shown = (
        difference.task,
        difference.metric,
        f"{first:.4f}",
        f"{second:.4f}",
        f"{second - first:+.4f} [{low:+.4f}, {high:+.4f}]",
        f"{difference.n:,}",
        difference.verdict(),
    )
    return [escaped(text) for text in shown]


def _items(evaluations: Sequence[Evaluation]) -> str:
    """Return the worst and best items of each task of each evaluation, folded."""
    parts = []
    for each in evaluations:
        for task in each.results["tasks"]:
            metric = each.results["primary"][task]
            rows = [_per_weight(row, metric) for row in read_items(each.folder, task)]
            scored = [row for row in rows if isinstance(row.get(metric), int | float)]
            higher = direction([each.results], task, metric)
            chosen = _extremes(scored, metric, higher is not False) or rows[: 2 * _MOST_ITEMS]
            head = list(dict.fromkeys(key for row in chosen for key in row))
            cells = [[_cell(row.get(key, "")) for key in head] for row in chosen]
            parts.append(
                f"<details><summary>{escaped(each.name)}, {escaped(task)}: {len(cells)} of {len(rows):,} items, worst "
                f"first</summary>{table(cells, [escaped(key) for key in head])}</details>"
            )
    return f"<h2>Items</h2>{''.join(parts)}" if parts else ""


def _per_weight(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return an item whose metric is that of the item itself: a loss per token, where a sum and a weight are stored."""
    if row.get("weight") and isinstance(row.get(metric), int | float):
        return {**row, metric: row[metric] / row["weight"]}
    return row


def _extremes(rows: Sequence[dict[str, Any]], metric: str, higher_is_better: bool) -> list[dict[str, Any]]:
    """Return the worst and the best items by a metric, worst first; all if they are few."""
    ordered = sorted(rows, key=lambda row: row[metric], reverse=not higher_is_better)
    return ordered if len(ordered) <= 2 * _MOST_ITEMS else ordered[:_MOST_ITEMS] + ordered[-_MOST_ITEMS:]
