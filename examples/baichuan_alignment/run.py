"""The recipe of the Baichuan Alignment report with a tiny model, on a CPU, in minutes.

    python -m examples.baichuan_alignment.run --out runs/baichuan_alignment

PAS -> SFT of three fields -> merge -> reward model -> GRPO with PTX-KL -> evaluation -> report.html. The same command
continues after a kill. --cluster prints the Slurm commands of the full-size recipes. Exit codes: 0 done, 1 a stage
failed, 2 bad input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.status import Status

from examples.baichuan_alignment import cluster, page
from examples.baichuan_alignment.plan import Stage, stages
from examples.baichuan_alignment.runner import Finished, Runner, StageFailed
from megatron_align.errors import InputError, require


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments; return the exit code."""
    options = _options(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        if options.cluster is not None:
            print("\n".join(cluster.commands(options.cluster or cluster.RECIPES)))
            return 0
        require(0 < options.scale <= 1, f"--scale must be in (0, 1], got {options.scale}")
        require(options.held_out >= 2, f"--held-out must be at least 2, got {options.held_out}")
        require(options.jobs >= 1, f"--jobs must be at least 1, got {options.jobs}")
        out = options.out.resolve()
        planned = stages(out, options.seed, options.held_out, options.scale)
        if options.commands:
            print("\n".join(f"{stage.command}" for stage in planned))
            return 0
        if not options.page:
            _run(out, planned, options.jobs, console)
        file = page.write(out)
        print("\n".join(page.lines(out)))
        print(f"report: {file}")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except StageFailed as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr, flush=True)
        return 130
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.baichuan_alignment.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/baichuan_alignment"), help="folder (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the questions and of the untrained model (default: 0)")
    add(
        "--held-out",
        type=int,
        default=128,
        metavar="N",
        help="held-out questions of each field (default: 128)",
    )
    about = "share of all steps and data, to try it out: a small share teaches nothing (default: 1)"
    add("--scale", type=float, default=1.0, metavar="S", help=about)
    add(
        "--jobs",
        type=int,
        default=2,
        metavar="N",
        help="stages that run at once, a process each (default: 2)",
    )
    add("--page", action="store_true", help="only write the page again, from metrics.jsonl and results.json")
    add("--commands", action="store_true", help="only print the command of each stage")
    about = "only print the Slurm commands of the full-size recipes, or of those named"
    add(
        "--cluster",
        nargs="*",
        choices=cluster.RECIPES,
        metavar="RECIPE",
        help=f"{about}: {', '.join(cluster.RECIPES)}",
    )
    return parser.parse_args(arguments)


def _run(out: Path, planned: Sequence[Stage], jobs: int, console: Console) -> None:
    """Run the stages, with a line for each that is complete and, on a terminal, one for those that run."""
    started = time.monotonic()
    status = console.status("starting") if console.is_terminal else None
    with status or nullcontext():
        for number, finished in enumerate(
            Runner(out, planned, jobs).run(lambda names: _show(status, out, names)), 1
        ):
            console.print(f"[{number:2}/{len(planned)}] {_line(finished)}", markup=False)
    console.print(f"total: {time.monotonic() - started:.0f} s\n")


def _show(status: Status | None, out: Path, names: Sequence[str]) -> None:
    if status is not None:
        status.update(
            "running: " + ", ".join(f"{name}{_step(out / name / 'metrics.jsonl')}" for name in names)
        )


def _step(metrics: Path) -> str:
    rows = _rows(metrics)
    return f" (step {rows[-1]['step']})" if rows else ""


def _rows(metrics: Path) -> list[dict[str, float]]:
    """Return the complete rows of the training steps; none where there is no file."""
    if not metrics.is_file():
        return []
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").split("\n")[:-1]]
    return [row for row in rows if row.get("split", "train") == "train"]


def _line(finished: Finished) -> str:
    """Return what is said of a complete stage: its duration, and the first and last loss or reward, or the scores."""
    stage = finished.stage
    duration = "before" if finished.seconds is None else f"{finished.seconds:4.0f} s"
    said = ""
    if rows := _rows(stage.output.parent / "metrics.jsonl"):
        name = "reward" if "reward" in rows[0] else "loss"
        said = f"{name} {rows[0][name]:.3f} -> {rows[-1][name]:.3f}"
    elif stage.output.name == "results.json":
        tasks = json.loads(stage.output.read_text(encoding="utf-8"))["tasks"]
        shares = {field: task.get("exact_match", task.get("accuracy")) for field, task in tasks.items()}
        said = "  ".join(f"{field} {share:.0%}" for field, share in shares.items())
    return f"{stage.name:32} {duration:>7}  {said}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
