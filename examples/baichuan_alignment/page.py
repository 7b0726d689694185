"""The recipe's report page and table, from ``metrics.jsonl`` and ``results.json`` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from examples.baichuan_alignment.plan import TRAINED
from examples.baichuan_alignment.questions import FIELDS
from examples.baichuan_alignment.results import Model, not_improved, read_models, verdicts
from megatron_align.tools.report_charts import Chart, charts_of, to_svg
from megatron_align.tools.report_html import escaped, table
from megatron_align.tools.report_page import to_html
from megatron_align.tools.report_runs import Run, read_runs, short

PAGE = "report.html"
TITLE = "The Baichuan Alignment recipe with a tiny model"
SIGNS = {"gain": "+", "loss": "-", "no clear change": "="}
HEADINGS = {
    "answers": "Right answers to held-out questions",
    "complements": "Right complementary information of held-out prompts",
    "preferences": "Held-out pairs whose right answer scores higher",
}
DRAWN = ("loss", "accuracy", "reward", "kl", "ptx_loss", "reward_margin")  # of each training


def write(out: Path) -> Path:
    """Write the page into the recipe's folder; return the file.

    Raises:
        InputError: a ``metrics.jsonl`` or ``results.json`` is missing or corrupt.
    """
    models = read_models(out)
    runs = [read_runs([str(out / name)])[0] for name in TRAINED]
    file = out / PAGE
    partial = file.with_name(f".{file.name}.partial")
    sections = [*_tables(models), *_gains(models), *(section for run in runs for section in _curves(run))]
    partial.write_text(to_html([], [], TITLE, sections), encoding="utf-8")
    partial.replace(file)
    return file


def lines(out: Path) -> list[str]:
    """Return the tables and what did not improve, as lines of text."""
    models = read_models(out)
    compared = {model.name: found for model, found in verdicts(models)}
    found: list[str] = []
    for what, heading in HEADINGS.items():
        rows = [model for model in models if model.what == what]
        width = max(len(model.name) for model in rows)
        found += [
            f"{heading} ({_count(rows)} of each field)",
            f"{'':{width}}  " + "".join(f"{f:>10}" for f in FIELDS),
        ]
        for model in rows:
            signs = compared.get(model.name, {})
            cells = [f"{model.scores[f].share:.1%}{SIGNS[signs[f]] if signs else ' '}" for f in FIELDS]
            against = f"   against {model.before}" if model.before else ""
            found.append(f"{model.name:{width}}  " + "".join(f"{cell:>10}" for cell in cells) + against)
        found.append("")
    missing = not_improved(models)
    found += ["+ gain, - loss, = no clear change (1.96 standard errors)", "What did not improve:"]
    return [*found, *(f"  {line}" for line in missing or ["nothing"])]


def _count(rows: Sequence[Model]) -> str:
    counts = sorted({score.n for model in rows for score in model.scores.values()})
    return " or ".join(map(str, counts))


def _tables(models: Sequence[Model]) -> list[str]:
    """Return a table of each kind of score."""
    compared = {model.name: found for model, found in verdicts(models)}
    parts = []
    for what, heading in HEADINGS.items():
        rows = [model for model in models if model.what == what]
        cells = []
        for model in rows:
            signs = compared.get(model.name, {})
            shares = [f"{model.scores[f].share:.1%} {SIGNS[signs[f]] if signs else ''}" for f in FIELDS]
            cells.append([escaped(model.name), *shares, escaped(model.before)])
        parts.append(f"<h2>{heading}</h2>{table(cells, ['', *FIELDS, 'against'])}")
        parts.append(f'<p class="note">{_count(rows)} of each field</p>')
    note = "+ gain, - loss, = no clear change: 1.96 standard errors of the difference, both taken as independent."
    return [*parts, f'<p class="note">{note}</p>']


def _gains(models: Sequence[Model]) -> list[str]:
    missing = "".join(f"<li>{escaped(line)}</li>" for line in not_improved(models) or ["nothing"])
    return [f"<h2>What did not improve</h2><ul>{missing}</ul>"]


def _curves(run: Run) -> list[str]:
    """Return the charts of one training."""
    charts = [chart for chart in charts_of([run]) if chart.metric.name in DRAWN]
    panels = "".join(_panel(chart, run.name) for chart in charts)
    steps = len(run.training)
    seconds = run.total("step_seconds")
    heading = f"<h2>{escaped(run.name)}</h2>"
    return [f'{heading}<p class="note">{steps} steps, {seconds:.0f} s</p><div class="panels">{panels}</div>']


def _panel(chart: Chart, name: str) -> str:
    last = short(chart.lines[0].points[-1][1])
    return (
        f'<figure title="{escaped(chart.metric.meaning)}"><figcaption><span><b>{escaped(chart.metric.name)}</b>'
        f'<span class="unit">{escaped(chart.metric.unit)}</span></span><output>last {last}</output></figcaption>'
        f"{to_svg(chart, [name])}</figure>"
    )
