"""Phases of a step timed on every rank, and the straggler that the others wait for.

Shapes: R ranks, P phases.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_align.model import cpu
from megatron_align.monitoring.memory import peak_memory_gb

# data: waiting for the step's packs. forward_backward: the pre-pass and all micro-batches, pipeline bubbles included.
# wait: for the slowest rank, before gradients are reduced. optimizer: gradient reduction, clipping, update, weight
# gathering.
PHASES = ("data", "forward_backward", "wait", "optimizer")


class StepClock:
    """Times the phases of a step on this rank; steps that are not timed cost nothing."""

    def __init__(self) -> None:
        self.running = False
        self.seconds: dict[str, float] = {}

    def start(self, measuring: bool) -> None:
        """Begin a step; ``measuring`` must be the same on every rank.

        A timed step starts with a barrier, so that work of one rank before it (rank 0 writing rows, for example) does
        not count as waiting.
        """
        self.running = measuring
        self.seconds = dict.fromkeys(PHASES, 0.0)
        if measuring:
            dist.barrier()
            self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """End a phase: it gets the time since the last mark."""
        if not self.running:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def discard(self) -> None:
        """Discard the time since the last mark."""
        if self.running:
            self._last = time.perf_counter()


def timing_row(step: int, clock: StepClock, mfu: float | None) -> dict[str, Any]:
    """Return the row of a timed step over all ranks: mean and maximum seconds of each phase, and the straggler.

    Args:
        step: of the row.
        clock: of this rank.
        mfu: model FLOPs utilisation of the step; None: unknown.
    """
    local = [*(clock.seconds[phase] for phase in PHASES), peak_memory_gb()]
    local_P = torch.tensor(local, dtype=torch.float64, device=cpu.device())
    gathered = [torch.empty_like(local_P) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local_P)
    seconds_RP = torch.stack(gathered).cpu()
    row: dict[str, Any] = {"step": step, "split": "timing"}
    for phase, seconds_R in zip(PHASES, seconds_RP.T, strict=False):
        row[f"{phase}_seconds"] = seconds_R.mean().item()
        row[f"{phase}_seconds_max"] = seconds_R.max().item()
    if len(gathered) > 1:
        wait_R = seconds_RP[:, PHASES.index("wait")]
        straggler = int(wait_R.argmin())  # the last rank to arrive waits least
        row["straggler_rank"] = straggler
        row["straggler_seconds"] = ((wait_R.sum() - wait_R[straggler]) / (len(gathered) - 1)).item()
    row["peak_memory_gb"] = seconds_RP[:, -1].max().item()
    return row if mfu is None else {**row, "mfu": mfu}
