"""Where the time of a step goes, on every rank, and which rank the others wait for.

Shapes: R ranks, P phases.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_align.model import cpu
from megatron_align.monitoring.memory import peak_memory_gb

# data: until the step's packs are there. forward_backward: all micro-batches, and what is scored ahead of them; with
# pipeline stages their idle time too. wait: for the slowest rank, before gradients are summed. optimizer: sums of
# gradients, clipping, update, new weights gathered.
PHASES = ("data", "forward_backward", "wait", "optimizer")


class StepClock:
    """Measures the phases of a step on this rank; costs nothing on steps that are not measured."""

    def __init__(self) -> None:
        self.running = False
        self.seconds: dict[str, float] = {}

    def start(self, measuring: bool) -> None:
        """Begin a step; ``measuring`` must be the same on every rank.

        A measured step begins on all ranks together: what one of them did before it (rank 0 writes rows, say) is not
        waited for in it.
        """
        self.running = measuring
        self.seconds = dict.fromkeys(PHASES, 0.0)
        if measuring:
            dist.barrier()
            self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """Say that a phase has ended: the time since the last mark was its."""
        if not self.running:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now

    def leave_out(self) -> None:
        """Count the time since the last mark nowhere."""
        if self.running:
            self._last = time.perf_counter()


def timing_row(step: int, clock: StepClock, mfu: float | None) -> dict[str, Any]:
    """Return the row of a measured step, from all ranks: mean and largest seconds of each phase, and the straggler.

    Args:
        step: of the row.
        clock: of this rank.
        mfu: share of the chips' peak that the step used; None: not known.
    """
    own = [*(clock.seconds[phase] for phase in PHASES), peak_memory_gb()]
    own_P = torch.tensor(own, dtype=torch.float64, device=cpu.device())
    of_ranks = [torch.empty_like(own_P) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, own_P)
    seconds_RP = torch.stack(of_ranks).cpu()
    row: dict[str, Any] = {"step": step, "split": "timing"}
    for phase, seconds_R in zip(PHASES, seconds_RP.T, strict=False):
        row[f"{phase}_seconds"] = seconds_R.mean().item()
        row[f"{phase}_seconds_max"] = seconds_R.max().item()
    if len(of_ranks) > 1:
        wait_R = seconds_RP[:, PHASES.index("wait")]
        straggler = int(wait_R.argmin())  # who comes last waits least
        row["straggler_rank"] = straggler
        row["straggler_seconds"] = ((wait_R.sum() - wait_R[straggler]) / (len(of_ranks) - 1)).item()
    row["peak_memory_gb"] = seconds_RP[:, -1].max().item()
    return row if mfu is None else {**row, "mfu": mfu}
