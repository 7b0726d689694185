"""Model FLOPs utilisation (MFU): operations that a step needs over the peak of its GPUs in the same time.

On CPUs, whose peaks are not listed, the peak is the speed of matrix products that each rank measures at start.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megatron_align.config import RunConfig
from megatron_align.cost.chips import chip_of_device
from megatron_align.cost.placement import Placement, SecondShapes
from megatron_align.cost.work import Work, flops_of
from megatron_align.data.batching.step_batches import StepCounts
from megatron_align.model.families import ModelShape


class Utilisation:
    """Computes the MFU of each step of a run, on GPUs whose peak is known and on CPUs in fp32.

    On CPUs every rank must create it, as the peak is summed over what they measure at the same time.

    Operations are counted exactly for each step: attention by the keys that each token sees, the head by the scored
    rows; padding and recomputation do not count.

    Args:
        config: of the run.
        shape: of the model that it trains.
        world_size: ranks, one GPU each.
        second: shapes of reference and critic where they are not the policy's.
        peak: operations per second of one rank; None: the bf16 peak of this rank's GPU, if it is known, or measured.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        world_size: int,
        second: SecondShapes = SecondShapes(),  # noqa: B008  # a tuple
        *,
        peak: float | None = None,
    ):
        self._placement = Placement.of_run(config, shape, world_size, second)
        self._config = config
        self._peak = _peak_of_all_ranks(config, world_size) if peak is None else world_size * peak

    def of_step(self, counts: StepCounts, seconds: float) -> float | None:
        """Return a step's MFU in [0, 1]; None: the peak is unknown."""
        if not self._peak:
            return None
        placement = self._placement
        work = Work.of_counts(counts, placement.data, reward=placement.shape.is_reward)
        return flops_of(self._config, placement, work).model / (seconds * self._peak)


def _peak_of_all_ranks(config: RunConfig, world_size: int) -> float:
    """Return the operations per second of all ranks; 0 if unknown: an unlisted GPU or fp32 on one, bf16 on a CPU."""
    if torch.cuda.is_available():
        found = chip_of_device(torch.cuda.get_device_name()) if config.train.precision == "bf16" else None
        return world_size * found.bf16 if found else 0.0
    if config.train.precision != "fp32":
        return 0.0
    if world_size == 1:
        return matrix_product_speed()
    dist.barrier()  # all ranks measure at the same time, as they share the machine's cores
    total = torch.tensor(matrix_product_speed(), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def matrix_product_speed(size: int = 512, seconds: float = 0.02) -> float:
    """Return the FLOPs per second of this process in fp32: the fastest of several products of ``[size, size]``."""
    a, b = torch.ones(2, size, size)
    fastest, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or fastest == float("inf"):
        torch.mm(a, b)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest
