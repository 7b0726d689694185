"""Memory: what was used at most, and what to say and keep when it was not enough."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_align.config import RunConfig

SNAPSHOTS = "memory"  # folder in checkpoint.dir


class OutOfMemory(RuntimeError):
    """This rank's GPU has no memory left; one line says where, and what would need less."""


def peak_memory_gb() -> float:
    """Return the most memory this process has held so far, in GB: of its GPU's tensors, or on CPU of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def explaining_out_of_memory(
    config: RunConfig, folder: Path, rank: int, doing: Callable[[], str]
) -> Iterator[None]:
    """Turn a full GPU into one line with advice, and keep a picture of what filled it.

    Args:
        config: of the run.
        folder: of the run; a GPU's snapshot goes into ``memory/rank_NNNNN.pickle``, for PyTorch's memory viewer.
        rank: of this process.
        doing: what this rank does at the moment.

    Raises:
        OutOfMemory: in place of ``torch.OutOfMemoryError``.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        kept = ""
        if torch.cuda.is_available():
            file = folder / SNAPSHOTS / f"rank_{rank:05d}.pickle"
            file.parent.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))
            kept = f"; what filled it is in {file}"
        reason = " ".join(str(error).split()).removeprefix("CUDA out of memory. ").split(" If reserved")[0]
        advice = "; or ".join(needs_less(config))
        raise OutOfMemory(
            f"rank {rank} is out of memory in '{doing()}': {reason} Less is needed with {advice}{kept}"
        ) from error


def needs_less(config: RunConfig) -> list[str]:
    """Return the changes to a run that need less memory, cheapest first, as far as it does not have them yet."""
    layout, advice = config.parallel, []
    if config.reference.mode == "live":
        advice.append("reference.mode: cached (one model instead of two)")
    if layout.tensor > 1 and not layout.sequence:
        advice.append("parallel.sequence: true")
    if config.train.recompute_layers == 0:
        advice.append("train.recompute_layers: 1 (activations are computed again, about a third more time)")
    advice.append(f"data.sequence_length below {config.data.sequence_length:,} (the length of a pack)")
    advice.append(f"parallel.tensor above {layout.tensor} or parallel.pipeline above {layout.pipeline}")
    if config.train.precision == "fp32":
        advice.append("train.precision: bf16")
    return advice
