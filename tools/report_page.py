"""The HTML page of a report: one self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from megatron_align.tools.report_about import about
from megatron_align.tools.report_charts import Chart, to_svg
from megatron_align.tools.report_html import escaped, table
from megatron_align.tools.report_runs import (
    Run,
    as_prompt,
    as_text,
    differences,
    duration,
    read_samples,
    short,
    summary,
)
from megatron_align.tools.report_style import SCRIPT, STYLE

PAGE = "report.html"
_MOST_SUSPECTS = 20  # rows shown of each run
_MOST_ANSWERED = 10  # steps whose answers are shown of each run
_PHASES = {
    "data": "data",
    "forward_backward": "forward and backward",
    "wait": "wait",
    "optimizer": "optimizer",
}


def write_page(
    out: Path, runs: Sequence[Run], charts: Sequence[Chart], title: str | None, sections: Sequence[str] = ()
) -> Path:
    """Write ``report.html`` into a folder; return the file. Arguments as of :func:`to_html`."""
    file = out / PAGE
    file.write_text(to_html(runs, charts, title, sections), encoding="utf-8")
    return file


def to_html(
    runs: Sequence[Run], charts: Sequence[Chart], title: str | None = None, sections: Sequence[str] = ()
) -> str:
    """Return the HTML of the page.

    Args:
        runs: perhaps none.
        charts: of these runs.
        title: None: the runs' names.
        sections: HTML that follows the runs.
    """
    title = title or " · ".join(run.name for run in runs)
    parts = [f"<h1>{escaped(title)}</h1>", *(_of_runs(runs, charts) if runs else ()), *sections]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _of_runs(runs: Sequence[Run], charts: Sequence[Chart]) -> list[str]:
    """Return the sections of at least one run."""
    return [
        f'<p class="note">{_when(runs)}</p>',
        _legend(runs) if len(runs) > 1 else "",
        _summary(runs),
        _about(runs),
        _differences(runs),
        *_sections(charts, [run.name for run in runs]),
        _histogram(runs),
        _timing(runs),
        _anomalies(runs),
        _answers(runs),
        _meanings(charts),
        _configuration(runs),
    ]


def _when(runs: Sequence[Run]) -> str:
    newest = max((run.folder / "metrics.jsonl").stat().st_mtime for run in runs)
    moment = datetime.fromtimestamp(newest, timezone.utc)
    return f"{len(runs)} run{'s' * (len(runs) > 1)}, newest row of {moment:%Y-%m-%d %H:%M} UTC"


def _swatch(number: int) -> str:
    return f'<i class="swatch run{number % 8}"></i>'


def _legend(runs: Sequence[Run]) -> str:
    entries = "".join(f"<li>{_swatch(i)}{escaped(run.name)}</li>" for i, run in enumerate(runs))
    return f'<ul class="legend">{entries}</ul>'


def _heads(runs: Sequence[Run]) -> list[str]:
    return ["", *(f"{_swatch(i)}{escaped(run.name)}" for i, run in enumerate(runs))]


def _summary(runs: Sequence[Run]) -> str:
    """Return key figures: as cards for one run, as a table for several."""
    summaries = [summary(run) for run in runs]
    if len(runs) == 1:
        shown = [(name, text) for name, text in summaries[0] if text.strip("– ·")]
        cards = "".join(
            f"<div><dt>{escaped(name)}</dt><dd>{escaped(text)}</dd></div>" for name, text in shown
        )
        return f'<dl class="figures">{cards}</dl>'
    rows = [
        [escaped(name), *(escaped(of[i][1]) for of in summaries)] for i, (name, _) in enumerate(summaries[0])
    ]
    filled = [row for row in rows if any(cell.strip("– ·") for cell in row[1:])]
    return f"<h2>Summary</h2>{table(filled, _heads(runs))}"


def _about(runs: Sequence[Run]) -> str:
    """Return what each run is: model, data, objective, layout, versions."""
    texts = [about(run) for run in runs]
    rows = [[escaped(name), *(escaped(of[i][1]) for of in texts)] for i, (name, _) in enumerate(texts[0])]
    filled = [row for row in rows if any(cell != "–" for cell in row[1:])]
    return f"<h2>Run{'s' * (len(runs) > 1)}</h2>{table(filled, _heads(runs) if len(runs) > 1 else ())}"


def _configuration(runs: Sequence[Run]) -> str:
    """Return the complete configuration of a single run, folded; of several the differences are shown."""
    if len(runs) > 1 or not runs[0].config:
        return ""
    rows = [
        [f"<code>{escaped(key)}</code>", f"<code>{escaped(as_text(value))}</code>"]
        for key, value in runs[0].config.items()
    ]
    return f"<h2>Configuration</h2><details><summary>{len(rows)} options</summary>{table(rows)}</details>"


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    different = differences(runs)
    if bare := [run.name for run in runs if not run.config]:
        note = f'<p class="note">without a config.yaml: {escaped(", ".join(bare))}</p>'
    else:
        note = "" if different else '<p class="note">None: the configurations are the same.</p>'
    rows = [
        [f"<code>{escaped(key)}</code>", *(f"<code>{escaped(v)}</code>" for v in of)]
        for key, of in different.items()
    ]
    return f"<h2>Configuration differences</h2>{note}{table(rows, _heads(runs)) if rows else ''}"


def _sections(charts: Sequence[Chart], names: Sequence[str]) -> list[str]:
    """Return the charts of each section."""
    parts = []
    for section in dict.fromkeys(chart.metric.section for chart in charts):
        panels = "".join(_panel(chart, names) for chart in charts if chart.metric.section == section)
        parts.append(f'<h2>{section}</h2><div class="panels">{panels}</div>')
    return parts


def _panel(chart: Chart, names: Sequence[str]) -> str:
    metric = chart.metric
    shown = [line for line in chart.lines if not line.validation] or chart.lines
    last = "".join(
        f'<span class="run{line.run % 8}" title="{escaped(names[line.run])}">{short(line.points[-1][1])}</span>'
        for line in shown
    )
    unit = metric.unit + (f", {chart.beyond} outside" if chart.beyond else "")
    return (
        f'<figure title="{escaped(metric.meaning)}"><figcaption><span><b>{escaped(metric.name)}</b>'
        f'<span class="unit">{escaped(unit)}</span></span><output>last{last}</output></figcaption>'
        f"{to_svg(chart, names)}</figure>"
    )


def _histogram(runs: Sequence[Run]) -> str:
    """Return the newest reward histogram of each reward model as bars."""
    panels = []
    for i, run in enumerate(runs):
        rows = [row for row in run.rows.get("validation", run.training) if row.get("reward_histogram")]
        if not rows:
            continue
        edges, counts = rows[-1]["reward_histogram"]["edges"], rows[-1]["reward_histogram"]["counts"]
        most, width = max(max(counts), 1), 340 / len(counts)
        bars = "".join(
            f'<rect class="column run{i % 8}" x="{10 + n * width:.1f}" width="{width - 2:.1f}" '
            f'y="{150 - 140 * count / most:.1f}" height="{140 * count / most:.1f}"/>'
            for n, count in enumerate(counts)
        )
        marks = "".join(
            f'<text x="{10 + (n + 1) * width:.1f}" y="166" text-anchor="middle">{edge:g}</text>'
            for n, edge in enumerate(edges)
            if edge % 4 == 0
        )
        panels.append(
            f"<figure><figcaption><b>{escaped(run.name)}</b><output>step {rows[-1]['step']:,}</output></figcaption>"
            f'<svg viewBox="0 0 360 170" role="img" aria-label="rewards">{bars}{marks}</svg></figure>'
        )
    return f'<h2>Rewards, newest</h2><div class="panels">{"".join(panels)}</div>' if panels else ""


def _timing(runs: Sequence[Run]) -> str:
    """Return the share of each phase in the measured steps of each run, and the slowest rank."""
    bars = []
    for run in runs:
        rows = run.rows.get("timing", [])
        if not rows:
            continue
        means = {phase: sum(row[f"{phase}_seconds"] for row in rows) / len(rows) for phase in _PHASES}
        total = sum(means.values()) or 1.0
        spans = "".join(
            f'<span class="{phase}" style="width:{100 * seconds / total:.2f}%" title="{seconds:.4g} s">'
            f"{f'{seconds / total:.0%}' if seconds > 0.06 * total else ''}</span>"
            for phase, seconds in means.items()
        )
        late = [row["straggler_rank"] for row in rows if "straggler_rank" in row]
        often = max(set(late), key=late.count) if late else None
        note = f"{duration(total)} a step" + (
            f"; slowest: rank {often} in {late.count(often)} of {len(late)}" if late else ""
        )
        bars.append(
            f'<div>{escaped(run.name)}<br><span class="note">{note}</span></div><div class="bar">{spans}</div>'
        )
    if not bars:
        return ""
    keys = "".join(f'<span><i class="{phase}"></i>{text}</span>' for phase, text in _PHASES.items())
    return (
        '<h2>Where the time goes</h2><div class="scroll">'
        f'<div class="bars">{"".join(bars)}</div><div class="keys">{keys}</div></div>'
    )


def _anomalies(runs: Sequence[Run]) -> str:
    rows = []
    for i, run in enumerate(runs):
        for row in [row for row in run.training if "suspects" in row][-_MOST_SUSPECTS:]:
            samples = ", ".join(map(str, row["suspects"][:8])) or "none alone"
            more = " …" if len(row["suspects"]) > 8 else ""
            rows.append(
                [f"{_swatch(i)}{escaped(run.name)}", f"{row['step']:,}", short(row.get("loss")),
                 short(row.get("grad_norm")), f"{samples}{more}"]
            )  # fmt: skip
    if not rows:
        return ""
    note = '<p class="note">The newest of each run; sample numbers are those of the token store.</p>'
    return f"<h2>Anomalous steps</h2>{note}{table(rows, ['run', 'step', 'loss', 'grad_norm', 'samples'])}"


def _answers(runs: Sequence[Run]) -> str:
    """Return the newest answers of validation.generate of each run, folded by step."""
    parts = []
    for i, run in enumerate(runs):
        rows = read_samples(run.folder)
        steps = sorted({row["step"] for row in rows}, reverse=True)[:_MOST_ANSWERED]
        for n, step in enumerate(steps):
            cells = [
                [escaped(as_prompt(row["prompt"])), escaped(row["completion"]), escaped(row["finish_reason"])]
                for row in rows
                if row["step"] == step
            ]
            parts.append(
                f"<details{' open' * (n == 0)}><summary>{_swatch(i)}{escaped(run.name)}, step {step:,}</summary>"
                f"{table(cells, ['prompt', 'answer', 'ended by'])}</details>"
            )
    return f"<h2>Answers during training</h2>{''.join(parts)}" if parts else ""


def _meanings(charts: Sequence[Chart]) -> str:
    metrics = {chart.metric.name: chart.metric for chart in charts}
    rows = [
        [f"<code>{escaped(name)}</code>", escaped(metric.unit), escaped(metric.meaning)]
        for name, metric in metrics.items()
    ]
    return f"<h2>Metrics</h2>{table(rows, ['metric', 'unit', 'meaning'])}"
