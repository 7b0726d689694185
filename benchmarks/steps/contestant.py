"""One contestant in its own process: ``python -m benchmarks.steps.contestant TASK.json WAY`` prints its figures."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.steps.task import Task

if TYPE_CHECKING:
    import torch
    from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counted(enabled: bool) -> Iterator[FlopCounterMode | None]:
    """Count the operations of a with-block, if enabled."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) if enabled else nullcontext() as counter:
        yield counter


def of_base(base: Iterable[torch.nn.Parameter], optimizer: object) -> dict[str, int]:
    """Return the bytes of gradients and of optimizer state that belong to the parameters of an adapter's base.

    Args:
        base: these parameters.
        optimizer: megatron-core's distributed optimizer, or torch's.
    """
    held = {id(p): p for p in base}
    gradients = [getattr(p, name, None) for p in held.values() for name in ("grad", "main_grad")]
    if hasattr(optimizer, "model_param_gbuf_map"):  # megatron-core's: the parameters that have a buffer
        states = [
            optimizer._get_main_param_and_optimizer_states(p)
            for p in optimizer.model_param_gbuf_map
            if id(p) in held
        ]
    else:
        states = [state for p, state in optimizer.state.items() if id(p) in held]
    tensors = [tensor for state in states for tensor in state.values() if hasattr(tensor, "nbytes")]
    return {
        "base_gradient_bytes": sum(tensor.nbytes for tensor in gradients if tensor is not None),
        "base_optimizer_bytes": sum(tensor.nbytes for tensor in tensors),
    }


def main() -> None:
    """Train as one contestant and print its figures as the last line."""
    import torch

    from benchmarks.steps import ours, trl

    task, way = Task.read(Path(sys.argv[1])), sys.argv[2]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    started = time.perf_counter()
    measured = ours.train(task) if way == "ours" else trl.train(task, way)
    measured["before"] = time.perf_counter() - started - sum(measured["seconds"])
    measured["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
