"""``megatron-align report DIR...``: one page about one run, or several side by side. Also ``python tools/report.py``.

Exit code: 0 done, 2 bad input.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = "megatron-align report"
ABOUT = """Draw the metrics of finished or running runs: report.html, which needs no other file and no network,
and a PNG of each chart.

Several runs are laid over each other, and what differs in their configurations is listed. What every metric means
is on the page. Needs no GPU and no torchrun; nothing is written into the runs unless --out says so."""


def run(arguments: list[str]) -> int:
    """Run with the arguments after ``report``; return the exit code."""
    from megatron_align.tools.command import Parser

    parser = Parser(PROGRAM, ABOUT)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folder of a run, with its metrics.jsonl")
    parser.add_argument("--out", default="report", metavar="DIR", help="folder to write (default: report)")
    parser.add_argument("--title", help="of the page (default: names of the runs)")
    options = parser.parse(arguments)
    from megatron_align.errors import require
    from megatron_align.storage.atomic_write import require_writable
    from megatron_align.tools.report_charts import charts_of
    from megatron_align.tools.report_page import write_page
    from megatron_align.tools.report_png import write_pngs
    from megatron_align.tools.report_runs import read_runs

    out = Path(options.out)
    require(not out.exists() or out.is_dir(), f"--out must be a folder, found a file at {out}")
    require_writable(out / "report.html")
    runs = read_runs(options.runs)
    charts = charts_of(runs)
    out.mkdir(parents=True, exist_ok=True)
    pictures = write_pngs(out, charts, [run.name for run in runs])
    page = write_page(out, runs, charts, options.title)
    steps = ", ".join(f"{run.name} ({len(run.training)} steps)" for run in runs)
    print(f"{steps}: {len(charts)} charts\nreport: {page}\npictures: {len(pictures)} in {out / 'png'}")
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not tools/: its files would hide packages
    from megatron_align.tools.main import main

    sys.exit(main(["report", *sys.argv[1:]]))
