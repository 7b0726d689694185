"""``megatron-align plan --rehearse``: a step of the configuration's layout, rehearsed without a GPU, as text."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from megatron_align.cost.memory import CONTEXT, FRAGMENTATION, GIB
from megatron_align.cost.text import columns
from megatron_align.errors import InputError

HOLDERS = 5  # lines of code shown for a stage that does not fit
HEADER = ("", "peak GiB", "planned", "with CUDA", "host waits", "other ops GB", "products TFLOP")


def rehearsal(arguments: list[str], stages: int, gpus: int, gpu_bytes: int) -> tuple[str, bool]:
    """Rehearse a step on the first rank of each pipeline stage; return it as text, and whether all is well.

    All is well if every stage fits into its GPU and nothing would fail there.

    Args:
        arguments: of the run, as for train.
        stages: pipeline stages.
        gpus: ranks of the run.
        gpu_bytes: memory of each GPU.

    Raises:
        InputError: the run cannot be rehearsed, or this machine cannot.
    """
    requests = [{"arguments": arguments, "world_size": gpus, "stage": stage} for stage in range(stages)]
    reports = list(_reports(requests))
    rows = [HEADER, *map(_row, reports)]
    notes: list[str] = []
    for report in reports:
        notes += _notes(report, gpu_bytes)
    first = reports[0]
    about = (
        f"\nrehearsed without a GPU: a step of {first['micro_batches']} micro-batches, full packs of "
        f"{first['tokens']:,} tokens, on the first rank of each stage"
    )
    fits = all(not report["faults"] and _needed(report) <= gpu_bytes for report in reports)
    return "\n".join((about, columns(rows), *notes)), fits


def _reports(requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the report of each request, made in a process of its own, which makes torch believe in a GPU."""
    command = [sys.executable, "-m", "megatron_align.rehearsal"]
    done = subprocess.run(command, input=json.dumps(requests), stdout=subprocess.PIPE, text=True, check=False)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    for report in reports:
        if "error" in report:
            raise InputError(report["error"])
        yield report
    if len(reports) < len(requests):
        raise InputError(
            f"the rehearsal of stage {len(reports)} ended with exit code {done.returncode}: the lines above say why"
        )


def _needed(report: dict[str, Any]) -> int:
    """Return the GPU memory that a stage needs, with the same assumptions as plan."""
    return CONTEXT + round(report["peak"] * (1 + FRAGMENTATION))


def _row(report: dict[str, Any]) -> tuple[str, ...]:
    waits = sum(count for _, _, count in report["waits"])
    return (
        f"stage {report['stage']}",
        f"{report['peak'] / GIB:.2f}",
        f"{report['planned'] / GIB:.2f}",
        f"{_needed(report) / GIB:.2f}",
        str(waits),
        f"{report['bytes_outside'] / 1e9:,.1f}",
        f"{report['product_flops'] / 1e12:,.1f}",
    )


def _notes(report: dict[str, Any], gpu_bytes: int) -> list[str]:
    """Return what is wrong on a stage, and where its host waits."""
    stage = report["stage"]
    lines = [f"stage {stage} would fail on a GPU: {fault}" for fault in report["faults"]]
    if _needed(report) > gpu_bytes:
        lines.append(
            f"stage {stage} is out of memory: it needs {_needed(report) / GIB:.2f} of {gpu_bytes / GIB:g} GiB; "
            "at the peak most is held by"
        )
        held = list(report["holders"].items())[:HOLDERS]
        lines += [f"  {size / GIB:8.2f} GiB  {where}" for where, size in held]
    lines += [
        f"stage {stage} waits {count} time{'s' if count > 1 else ''} a step: {kind}, {where}"
        for kind, where, count in report["waits"]
    ]
    return lines
