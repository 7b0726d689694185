"""The runner of ``benchmarks/dpo.py`` and its sisters: makes the data, starts each contestant, compares, records."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.rows import append, stamp
from benchmarks.steps.counts import parts
from benchmarks.steps.data import make
from benchmarks.steps.task import MODELS, Task

# glibc returns every large block to the kernel otherwise, and the page faults are counted as training.
KEEPS_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
AS_ON_A_GPU = {**KEEPS_BLOCKS, "TRL_SCORES_COMPLETIONS": "1"}
AS_IT_COMES = "trl as it comes"
ALONE = "trl packed"  # its samples see each other on a CPU, so its losses are others
TOLERANCE = 1e-4


def compare(objective: str, description: str, ways: Sequence[str]) -> None:
    """Run the comparisons that the command line names, print tables and append rows to ``results/steps.csv``.

    Args:
        objective: dpo, sft, kto, reward or grpo.
        description: of ``--help``.
        ways: contestants, ours first.
    """
    options = parser(objective, description).parse_args()
    if options.batch % (options.micro_batch or 1):
        raise SystemExit(f"--micro-batch must divide --batch {options.batch}, got {options.micro_batch}")
    threads = options.threads
    ways = [*ways, AS_IT_COMES] if options.as_it_comes else list(ways)
    for completions in options.completions:
        for prompt in [1.0] if options.data else options.prompt:
            task = Task(
                objective,
                options.model,
                options.batch,
                options.micro_batch or options.batch,
                options.steps,
                completions,
                options.answer,
                prompt,
                options.adapter,
                options.data and str(options.data),
                options.longest,
                options.seed,
            )
            with tempfile.TemporaryDirectory() as folder:
                placed = replace(task, folder=folder)
                make(placed)
                measured: dict[str, dict[str, Any]] = {}
                for way in ways:
                    measured[way] = contest(placed, way, threads)
                    require_equal(measured, way)
                report(placed, measured, threads)


def parser(objective: str, description: str) -> argparse.ArgumentParser:
    """Return the options of a comparison."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.set_defaults(completions=[1], data=None)  # where the objective has no such option
    made.add_argument(
        "--model", choices=MODELS, default="honest", help="honest: the head is 18%% of the operations"
    )
    made.add_argument("--steps", type=int, default=4, help="the first and the last are not timed")
    made.add_argument("--batch", type=int, default=8, help="samples of one step")
    made.add_argument(
        "--micro-batch", type=int, help="samples of TRL's micro-batch, a divisor; default: all of a step"
    )
    made.add_argument("--answer", type=int, default=128, help="tokens of a drawn answer, about")
    made.add_argument(
        "--prompt", type=float, nargs="+", default=[4.0], help="times as long is a drawn prompt"
    )
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--as-it-comes", action="store_true", help=f"a further contestant, {AS_IT_COMES!r}")
    if objective == "grpo":
        made.add_argument("--completions", type=int, nargs="+", default=[3, 8], help="of a prompt")
    else:
        made.add_argument("--data", type=Path, metavar="FILE", help="real records instead of drawn ones")
    made.add_argument("--longest", type=int, default=1200, help="bytes of a real prompt with its answer")
    made.add_argument(
        "--adapter", type=int, default=0, metavar="RANK", help="train a LoRA adapter of this rank"
    )
    return made


def contest(task: Task, way: str, threads: int) -> dict[str, Any]:
    """Run a contestant in a process of its own and return its figures."""
    file = Path(task.folder) / "task.json"
    task.write(file)
    command = [sys.executable, "-m", "benchmarks.steps.contestant", str(file), way]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {} if way == AS_IT_COMES else AS_ON_A_GPU
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def require_equal(measured: dict[str, dict[str, Any]], way: str) -> None:
    """Check that a contestant's losses and gradient norms are ours.

    Raises:
        SystemExit: they are not.
    """
    own, one = measured["ours"], measured[way]
    if way != ALONE and difference(own, one) > TOLERANCE:
        raise SystemExit(
            f"losses or gradient norms of {way} differ from ours by {difference(own, one):.1e}: "
            f"{one['losses']}, {one['grad_norms']}; ours {own['losses']}, {own['grad_norms']}"
        )


def report(task: Task, measured: dict[str, dict[str, Any]], threads: int) -> None:
    """Print the table and append it to the results."""
    own = measured["ours"]
    factors = parts(task, task.read_records()[-task.batch :])
    rows = [row(task, way, measured, factors, threads) for way in measured]
    print(f"\n{task.objective}, {task.model} model, {rows[0]['data']}, prompt {rows[0]['prompt']} x answer")
    print(
        f"{'':16} {'s/step':>8} {'ratio':>7} {'peak MB':>8} {'ours / its':>10} {'counted':>8} {'before, s':>10}"
    )
    for one in rows:
        print(
            f"{one['way']:16} {one['seconds_per_step']:8.2f} {one['times_ours']:6.2f}x {one['peak_mb']:8,}"
            f" {one['ours_over_its_peak']:10.2f} {one['counted_times_ours']:7.2f}x {one['seconds_before']:10.1f}"
        )
    shown = ", ".join(f"{name} {factor:.2f}x" for name, factor in factors.items())
    print(f"by arithmetic, of the last step: {shown}")
    if task.rank:
        held = f"{own['base_gradient_bytes']} bytes of gradients, {own['base_optimizer_bytes']} of optimizer state"
        print(f"the base holds, ours: {held}")
    append("steps", rows)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the greatest relative difference of losses and gradient norms; of values near 0 that to 0.01."""
    pairs = [pair for name in ("losses", "grad_norms") for pair in zip(ours[name], theirs[name], strict=True)]
    return max(abs(a - b) / max(abs(a), 1e-2) for a, b in pairs)


def row(
    task: Task, way: str, measured: dict[str, dict[str, Any]], factors: dict[str, float], threads: int
) -> dict[str, object]:
    """Return a contestant's row. Seconds are the median over the steps that are timed."""
    own, one = measured["ours"], measured[way]
    seconds, first = (statistics.median(each["seconds"][1:]) for each in (one, own))
    return {
        **stamp(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": version("torch"),
        "trl": version("trl"),
        "threads": threads,
        "objective": task.objective,
        "model": task.model,
        "data": Path(task.data).name if task.data else "drawn",
        "longest": task.longest if task.data else "",
        "seed": task.seed,
        "prompt": "" if task.data else task.prompt,
        "batch": task.batch,
        "their_micro_batch": task.micro_batch,
        "steps": task.steps,
        "completions": task.completions if task.objective == "grpo" else "",
        "rank": task.rank,
        "way": way,
        "seconds_per_step": round(seconds, 3),
        "times_ours": round(seconds / first, 2),
        "peak_mb": round(one["peak_mb"]),
        "ours_over_its_peak": round(own["peak_mb"] / one["peak_mb"], 3),
        "seconds_before": round(one["before"], 1),
        "teraflop_per_step": round(one["operations"] / 1e12, 4),
        "counted_times_ours": round(one["operations"] / own["operations"], 2),
        **{f"from_{name}": round(factor, 2) for name, factor in factors.items()},
        "difference": f"{difference(own, one):.1e}",
        "base_gradient_bytes": one["base_gradient_bytes"],
        "base_optimizer_bytes": one["base_optimizer_bytes"],
    }
