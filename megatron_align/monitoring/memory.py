"""Peak memory, and the error message and snapshot of an out-of-memory failure."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_align.config import RunConfig

SNAPSHOTS = "memory"  # folder in checkpoint.dir


class OutOfMemory(RuntimeError):
    """This rank's GPU is out of memory; one line says where, and which options need less."""


def peak_memory_gb() -> float:
    """Return the peak memory of this process so far, in GB: of its GPU's tensors, or on CPU its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def explaining_out_of_memory(
    config: RunConfig, folder: Path, rank: int, doing: Callable[[], str]
) -> Iterator[None]:
    """Turn an out-of-memory error into one line with advice, and save a memory snapshot.

    Args:
        config: of the run.
        folder: of the run; a GPU's snapshot goes into ``memory/rank_NNNNN.pickle``, for PyTorch's memory viewer.
        rank: of this process.
        doing: returns what this rank is doing.

    Raises:
        OutOfMemory: in place of ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        snapshot = ""
        if torch.cuda.is_available():
            file = folder / SNAPSHOTS / f"rank_{rank:05d}.pickle"
            file.parent.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))
            snapshot = f"; the memory snapshot is {file}"
        reason = " ".join(str(error).split()).removeprefix("CUDA out of memory. ").split(" If reserved")[0]
        advice = "; or ".join(needs_less(config))
        raise OutOfMemory(
            f"rank {rank} is out of memory in '{doing()}': {reason} To use less memory: {advice}{snapshot}"
        ) from error


def needs_less(config: RunConfig) -> list[str]:
    """Return the changes to a run's options that would save memory and that it does not have yet, cheapest first."""
    layout, advice = config.parallel, []
    if config.reference.mode == "live":
        advice.append("reference.mode: cached (one model instead of two)")
    if layout.tensor > 1 and not layout.sequence:
        advice.append("parallel.sequence: true")
    if config.train.recompute_layers == 0:
        advice.append("train.recompute_layers: 1 (activations are recomputed, about a third more time)")
    advice.append(f"data.sequence_length below {config.data.sequence_length:,} (the length of a pack)")
    advice.append(f"parallel.tensor above {layout.tensor} or parallel.pipeline above {layout.pipeline}")
    if config.train.precision == "fp32":
        advice.append("train.precision: bf16")
    return advice
