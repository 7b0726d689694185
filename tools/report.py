"""``megatron-align report DIR...``: draw the metrics of one or several runs. Also ``python tools/report.py``.

Exit code: 0 success, 2 bad input.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = "megatron-align report"
ABOUT = """Draw the metrics of finished or running runs: report.html, a self-contained page, and a PNG of each chart.

Several runs are drawn into the same charts, and the differences of their configurations are listed. The page explains
every metric. Folders of evaluations (with results.json) are drawn with intervals and sample items, and each is compared
with the first on the same items; runs and evaluations may share a page. Needs no GPU and no torchrun; writes only into
--out."""


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``report``; return the exit code."""
    from megatron_align.tools.command import Parser

    parser = Parser(PROGRAM, ABOUT)
    parser.add_argument(
        "runs", nargs="+", metavar="DIR", help="folder of a run, with metrics.jsonl, or of an evaluation"
    )
    parser.add_argument("--out", default="report", metavar="DIR", help="output folder (default: report)")
    parser.add_argument("--title", help="title of the page (default: names of the runs)")
    options = parser.parse(arguments)
    from megatron_align.errors import require
    from megatron_align.storage.atomic_write import require_writable
    from megatron_align.tools.report_about import about
    from megatron_align.tools.report_charts import charts_of
    from megatron_align.tools.report_page import write_page
    from megatron_align.tools.report_png import write_pngs
    from megatron_align.tools.report_runs import read_runs, summary

    out = Path(options.out)
    require(not out.exists() or out.is_dir(), f"--out must be a folder, got a file: {out}")
    require_writable(out / "report.html")
    evaluated = [Path(folder) for folder in options.runs if (Path(folder) / "results.json").is_file()]
    trained = [  # a run's folder may hold the results of an evaluation too
        folder
        for folder in options.runs
        if Path(folder) not in evaluated or (Path(folder) / "metrics.jsonl").is_file()
    ]
    runs = read_runs(trained) if trained else []
    charts = charts_of(runs)
    sections, lines = _evaluations(evaluated)
    out.mkdir(parents=True, exist_ok=True)
    pictures = write_pngs(out, charts, [run.name for run in runs]) if charts else []
    names = dict.fromkeys([*(run.name for run in runs), *(folder.resolve().name for folder in evaluated)])
    page = write_page(out, runs, charts, options.title or " · ".join(names), sections)
    if len(runs) == 1:
        described = [line for line in (*about(runs[0]), *summary(runs[0])) if line[1].strip("– ·")]
        print("\n".join(f"{name:{max(len(n) for n, _ in described)}}  {text}" for name, text in described))
    print("\n".join(lines), end="\n" if lines else "")
    steps = ", ".join(f"{run.name} ({len(run.training)} steps)" for run in runs)
    print(f"{steps}: {len(charts)} charts" if runs else f"{len(evaluated)} evaluation(s)")
    print(f"report: {page}" + (f"\npictures: {len(pictures)} in {out / 'png'}" if runs else ""))
    return 0


def _evaluations(evaluated: list[Path]) -> tuple[list[str], list[str]]:
    """Return sections of evaluations, and lines for the terminal."""
    if not evaluated:
        return [], []
    # They import torch: only if there is something to draw.
    from megatron_align.evaluation.results import table_of
    from megatron_align.tools.report_evaluation import evaluation_sections, read_evaluation

    evaluations = [read_evaluation(folder) for folder in evaluated]
    lines = [f"{each.name}:\n{table_of(each.results['tasks'])}" for each in evaluations]
    return evaluation_sections(evaluations), lines


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its modules would shadow packages
    from megatron_align.tools.main import main

    sys.exit(main(["report", *sys.argv[1:]]))
