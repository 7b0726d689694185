"""Draw the charts of a report as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from megatron_align.tools.report_charts import Chart, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2563c9", "#d2462f", "#2a8f57", "#b3730b", "#7a48c4", "#0e8394", "#bd3f77", "#667085")
_COLUMNS = 3
_TITLE = 58  # characters of a line
_LABEL = 40


def write_pngs(out: Path, charts: Sequence[Chart], names: Sequence[str]) -> list[Path]:
    """Write ``png/METRIC.png`` of each chart and ``png/all.png``; return the files.

    Args:
        out: the report's folder.
        charts: to draw.
        names: of the runs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = out / "png"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{chart.metric.name.replace('/', '.')}.png" for chart in charts]  # TASK/METRIC
    for chart, file in zip(charts, files, strict=True):
        figure = Figure(figsize=(6, 3.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure.subplots(), chart, names)
        figure.savefig(file)
    rows = -(-len(charts) // _COLUMNS)
    figure = Figure(figsize=(5 * _COLUMNS, 3 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for chart, ax in zip(charts, axes, strict=False):
        _draw(ax, chart, names)
    for ax in axes[len(charts) :]:
        ax.set_visible(False)
    figure.savefig(folder / "all.png")
    return [*files, folder / "all.png"]


def _draw(ax: Axes, chart: Chart, names: Sequence[str]) -> None:
    for line in chart.lines:
        colour = COLOURS[line.run % len(COLOURS)]
        name = names[line.run] if len(names[line.run]) <= _LABEL else f"...{names[line.run][-_LABEL:]}"
        label = f"{name}, validation" if line.validation else name
        style = "--" if line.validation else "-"
        marker = "o" if line.validation or len(line.points) == 1 else ""
        smooth = line.smooth
        x, y = zip(*thinned(line.points), strict=True)
        ax.plot(x, y, style, color=colour, alpha=0.25 if smooth else 1, linewidth=1.2, marker=marker, markersize=3,
                label=None if smooth else label)  # fmt: skip
        if smooth:
            ax.plot(*zip(*smooth, strict=True), color=colour, linewidth=1.6, label=label)
    low, high = chart.limits
    if chart.beyond:
        ax.set_ylim(low, high)
    title = "\n".join(wrap(", ".join(filter(None, (chart.metric.name, chart.metric.unit))), _TITLE))
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_xlabel("step", fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(alpha=0.25, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    if len(chart.lines) > 1:
        ax.legend(frameon=False, fontsize=8)
