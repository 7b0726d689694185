"""Model FLOPs utilisation (MFU): operations that a step needs over the peak of its GPUs in the same time."""

from __future__ import annotations

import torch

from megatron_align.config import RunConfig
from megatron_align.cost.chips import chip_of_device
from megatron_align.cost.placement import Placement
from megatron_align.cost.work import Work, flops_of
from megatron_align.data.batching.step_batches import StepCounts
from megatron_align.model.families import ModelShape


class Utilisation:
    """Computes the MFU of each step of a run, on GPUs whose peak is known.

    Operations are counted exactly for each step: attention by the keys that each token sees, the head by the scored
    rows; padding and recomputation do not count.

    Args:
        config: of the run.
        shape: of the model that it trains.
        world_size: ranks, one GPU each.
        peak: operations per second of one GPU; None: the bf16 peak of this rank's GPU, if it is known.
    """

    def __init__(self, config: RunConfig, shape: ModelShape, world_size: int, peak: float | None = None):
        self._placement = Placement.of_run(config, shape, world_size)
        self._config = config
        self._peak = world_size * (_peak_of_this_gpu(config) if peak is None else peak)

    def of_step(self, counts: StepCounts, seconds: float) -> float | None:
        """Return a step's MFU in [0, 1]; None: the peak is unknown."""
        if not self._peak:
            return None
        placement = self._placement
        work = Work.of_counts(counts, placement.data, reward=placement.shape.is_reward)
        return flops_of(self._config, placement, work).model / (seconds * self._peak)


def _peak_of_this_gpu(config: RunConfig) -> float:
    """Return the bf16 peak of this GPU; 0 if unknown: no GPU, an unlisted one, or precision fp32."""
    if config.train.precision != "bf16" or not torch.cuda.is_available():
        return 0.0
    found = chip_of_device(torch.cuda.get_device_name())
    return found.bf16 if found else 0.0
