"""PyTorch's profiler over a few steps: one trace per rank, for any viewer of Chrome traces."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

TRACES = "profile"  # folder in checkpoint.dir


class Tracer:
    """Traces steps ``first`` to ``last`` of this rank into ``checkpoint.dir/profile/rank_NNNNN.json.gz``.

    Args:
        steps: first and last traced step; None: nothing is traced.
        folder: of the run.
        rank: of this process.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, rank: int):
        self._first, self._last = steps or (1, 0)
        self._file = folder / TRACES / f"rank_{rank:05d}.json.gz"
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Start tracing, if ``step`` is the first step of the trace."""
        if self._first <= step <= self._last and self._profile is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def end(self, step: int) -> None:
        """Write the trace, if ``step`` is its last step."""
        if step == self._last and self._profile is not None:
            self._profile.stop()
            self._file.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(self._file))
            self._profile = None
