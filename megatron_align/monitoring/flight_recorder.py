"""NCCL's flight recorder: the last collectives of each rank, dumped when a run hangs. On GPUs only.

``checkpoint.dir/flight_recorder/rank_N`` are read together by ``torchfrtrace`` (torch's own tool), which finds the
first collective that not every rank has joined.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_align.model.parallel import RankInfo

FOLDER = "flight_recorder"
COLLECTIVES = "2000"  # kept by each rank; some hundred bytes each
# torch 2.9 renamed the first two; older names are still read, newer ones are not known before.
SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
ON_TIMEOUT = "TORCH_NCCL_DUMP_ON_TIMEOUT"  # of NCCL's own watchdog: the second net


def enable(run: Path) -> None:
    """Set the variables that NCCL reads when the first group is created; the user's own values stay."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        **dict.fromkeys(SIZE, COLLECTIVES),
        **dict.fromkeys(FILE, str(folder / "rank_")),
        ON_TIMEOUT: "1",
    }
    for name, value in values.items():
        os.environ.setdefault(name, value)


def dump(run: Path, rank_info: RankInfo) -> None:
    """Write this rank's last collectives; called from a thread while the rank hangs."""
    # What NCCL's own watchdog writes; builds of torch without NCCL have no such function.
    trace = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
    (run / FOLDER / f"rank_{rank_info.rank}").write_bytes(trace)
