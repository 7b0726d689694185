"""Charts of runs: select the metrics, thin out the points, render SVG.

Colours are CSS variables of the page, so that the same SVG serves light and dark mode.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from megatron_align.monitoring.metric_names import METRICS, Metric
from megatron_align.tools.report_runs import Run

MOST_POINTS = 400  # of a line; more would not be visible
MANY = 40  # points from which outliers are clipped
_TREND = 24  # points from which a noisy curve gets a running median
_PARTS = 25  # of a curve: the window of the running median is one part
_NOISY = 3  # a curve is noisy if its total variation is more than this times its range
# Drawn only if some value is not 0.
_QUIET = (
    "skipped_steps",
    "loss_spikes",
    "grad_norm_outliers",
    "tokens_saved",
    "recomputed_samples",
)
WIDTH, HEIGHT = 360, 190
RIGHT, TOP, BOTTOM = 10, 8, 22  # of the plotting area
LETTER = 6.4  # width of a character of a label, at most

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a run."""

    run: int  # index of the run
    points: Sequence[Point]
    validation: bool = False

    @property
    def smooth(self) -> list[Point]:
        """Running median, then running mean, of a noisy curve with enough points; else empty."""
        values = [y for _, y in self.points]
        if len(values) < _TREND:
            return []
        first, last = _without_extremes(values)
        variation = sum(abs(b - a) for a, b in pairwise(values))
        if first == last or variation <= _NOISY * (last - first):
            return []
        reach = max(2, len(values) // (2 * _PARTS))
        for middle in (median, fmean):
            values = [middle(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
        return [(x, y) for (x, _), y in zip(self.points, values, strict=True)]


@dataclass(frozen=True, slots=True)
class Chart:
    """One metric of all runs over their steps."""

    metric: Metric
    lines: list[Line]

    @property
    def values(self) -> list[float]:
        """All values of the chart."""
        return [y for line in self.lines for _, y in line.points]

    @property
    def limits(self) -> tuple[float, float]:
        """Lowest and highest value of the axis; outliers are clipped so that a spike does not flatten the rest."""
        values = self.values
        low, high = min(values), max(values)
        if len(values) < MANY:
            return low, high
        first, last = _without_extremes(values)
        span = last - first
        return (max(low, first - span), min(high, last + span)) if span else (low, high)

    @property
    def beyond(self) -> int:
        """Number of values outside of the limits, which are drawn at the edge."""
        low, high = self.limits
        return sum(not low <= value <= high for value in self.values)


def _without_extremes(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest value without 1% of the values, at least one, on each side."""
    ordered, clipped = sorted(values), max(1, len(values) // 100)
    return ordered[clipped], ordered[-1 - clipped]


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """Return a chart of each metric that some run has, in the order of the table of metrics."""
    charts = []
    for metric in (*METRICS, *_of_tasks(runs)):
        if not metric.curve:
            continue
        lines = [
            Line(i, points, split == "validation")
            for i, run in enumerate(runs)
            for split in ("train", "validation", "timing")
            if (points := run.points(metric.name, split))
        ]
        if lines and not (metric.name in _QUIET and not any(y for line in lines for _, y in line.points)):
            charts.append(Chart(metric, lines))
    return charts


def _of_tasks(runs: Sequence[Run]) -> list[Metric]:
    """Return the metrics of the runs' ``validation.tasks``, which are named TASK/METRIC."""
    rows = [row for run in runs for row in run.rows.get("validation", [])]
    meaning = "metric of a task of validation.tasks"
    names = dict.fromkeys(key for row in rows for key in row if "/" in key)
    return [Metric(name=name, section="Tasks", unit="", meaning=meaning) for name in names]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """Return at most ``most`` points, keeping the lowest and highest of each interval, so that spikes stay visible."""
    if len(points) <= most:
        return points
    edges = [round(i * len(points) / (most // 2)) for i in range(most // 2 + 1)]
    kept = []
    for begin, end in pairwise(edges):
        interval = points[begin:end]
        kept += sorted({min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])})
    return kept


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about ``count`` round numbers from ``low`` to ``high``."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Scale:
    """Map values to coordinates along one axis; values beyond its ends are clipped."""

    def __init__(self, low: float, high: float, begin: float, end: float):
        if low == high:  # one point or a constant: centred
            margin = abs(low) * 0.1 or 1.0
            low, high = low - margin, high + margin
        self.low, self.high, self._begin, self._end = low, high, begin, end

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self._begin + share * (self._end - self._begin)

    def ticks(self) -> list[float]:
        """Return the values of grid lines and labels."""
        return ticks(self.low, self.high)


def to_svg(chart: Chart, names: Sequence[str]) -> str:
    """Return a chart as SVG, with its points as data for the page's cursor; ``names`` are the runs'."""
    steps = [x for line in chart.lines for x, _ in line.points]
    up = Scale(*chart.limits, HEIGHT - BOTTOM, TOP)
    left = 12 + LETTER * max(map(len, tick_texts(up.ticks())))  # labels stand in it
    across = Scale(min(steps), max(steps), left, WIDTH - RIGHT)
    parts = [_axes(across, up, left)]
    data = []
    for line in chart.lines:
        points = thinned(line.points)
        classes = f"run{line.run % 8}" + (" validation" if line.validation else "")
        smooth = thinned(line.smooth)
        parts += [_path(points, across, up, f"{classes} raw" if smooth else classes)]
        if smooth:
            parts.append(_path(smooth, across, up, classes))
        if line.validation or len(points) == 1:
            parts += [
                f'<circle class="{classes}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5"/>'
                for x, y in points
            ]
        label = f"{names[line.run]}, validation" if line.validation else names[line.run]
        data.append(
            {
                "name": label,
                "run": line.run % 8,
                "at": [[x, float(f"{y:.5g}"), round(across(x), 1)] for x, y in points],
            }
        )
    title = html.escape(f"{chart.metric.name} over steps")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" '
        f"data-points='{html.escape(json.dumps(data), quote=True)}'>{''.join(parts)}"
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
    )


def _axes(across: Scale, up: Scale, left: float) -> str:
    parts = []
    for value, text in zip(up.ticks(), tick_texts(up.ticks()), strict=True):
        y = up(value)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    steps = [value for value in across.ticks() if value == int(value)]
    for value, text in zip(steps, tick_texts(steps), strict=True):
        half = LETTER * len(text) / 2
        x = min(max(across(value), half), WIDTH - half)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{text}</text>')
    return "".join(parts)


def tick_texts(values: Sequence[float]) -> list[str]:
    """Return axis labels with as few digits as make them distinct."""
    largest = max(map(abs, values), default=0.0)
    factor, letter = next(
        ((f, c) for f, c in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= f), (1.0, "")
    )
    for digits in range(3, 16):
        texts = [f"{value / factor:.{digits}g}" for value in values]
        if len(set(texts)) == len(values):
            break
    return [text if text == "0" else text.replace("e-0", "e-") + letter for text in texts]


def _path(points: Sequence[Point], across: Scale, up: Scale, classes: str) -> str:
    if len(points) < 2:
        return ""
    coordinates = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    return f'<polyline class="{classes}" points="{coordinates}"/>'
