"""Trace non-finite numbers or an outlier loss back to samples. Runs only after such a step; collective.

Shapes: N scored rows and C completions of one pack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.data.batching.step_batches import Step
from megatron_align.data.sample_table import TrainingData
from megatron_align.records import LossRows, PackedBatch
from megatron_align.training.scoring import Scorer
from megatron_align.training.step import Stepper, StepResult

SHOWN = 8  # samples named in a message


class Suspects:
    """Finds the samples that cause a step's problem.

    Args:
        stepper: which ran the step.
        store: training data; samples are numbered as in it.
    """

    def __init__(self, stepper: Stepper, store: TrainingData):
        self.stepper, self.store = stepper, store

    # Scores and losses are known on the last pipeline stage only: the lists are empty on the others.

    def of_nonfinite(self, step: Step, batches: Sequence[PackedBatch], result: StepResult) -> list[int]:
        """Return the samples that make the loss or gradients of a step NaN or infinite, in ascending order.

        From the narrowest cause to the widest: samples whose own scores are not finite; else the samples of packs
        whose loss is not; else those of packs whose gradients alone are not. Empty: only all packs together overflow.

        Args:
            step: the step.
            batches: its micro-batches, as they were trained on.
            result: of the step.
        """
        samples = self._samples_of_packs(step)
        unscorable = self._unscorable(batches)
        if found := _everywhere([pack[at] for pack, at in zip(samples, unscorable, strict=False)]):
            return found
        losses = zip(samples, result.pack_losses, strict=False)
        if found := _everywhere([pack for pack, loss in losses if not math.isfinite(loss)]):
            return found
        finite = self.stepper.finite_alone(batches)
        return _everywhere([pack for pack, good in zip(samples, finite, strict=True) if not good])

    def of_outlier(self, step: Step, batches: Sequence[PackedBatch], result: StepResult) -> list[int]:
        """Return the samples of the pack with the largest mean loss of a step, in ascending order."""
        known = zip(batches, result.pack_losses, self._samples_of_packs(step), strict=False)
        weighed = [(batch.rows.weight_N.sum().item(), loss, pack.tolist()) for batch, loss, pack in known]
        own = [(loss / weight, pack) for weight, loss, pack in weighed if weight > 0]
        found: list[list[tuple[float, list[int]]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, own)
        return max(((mean, pack) for of_rank in found for mean, pack in of_rank), default=(0.0, []))[1]

    def named(self, samples: Sequence[int]) -> str:
        """Return the samples as text: their numbers in the store and the source files they came from."""
        if not len(samples):
            return "no single sample or pack (only all of them together)"
        paths = [source["path"] for source in self.store.manifest["sources"]]
        by_source: dict[str, list[int]] = {}
        for sample in samples[:SHOWN]:
            by_source.setdefault(paths[self.store.sources[sample]], []).append(sample)
        parts = [f"{', '.join(map(str, of_source))} ({path})" for path, of_source in by_source.items()]
        more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
        return f"sample{'s' * (len(samples) > 1)} {', '.join(parts)}{more}"

    def _samples_of_packs(self, step: Step) -> list[np.ndarray]:
        """Return the store's samples in each pack of this data-parallel rank."""
        ends = self.store.completion_offsets[1:]
        return [
            np.unique(np.searchsorted(ends, step.stored_C[at], side="right")) for at in step.packs.completions
        ]

    def _unscorable(self, batches: Sequence[PackedBatch]) -> list[np.ndarray]:
        """Return which samples of each pack have a non-finite score; an empty list except on the last stage."""
        flags = Scorer(self.stepper.model, self.stepper.objective).collect(batches, _bad_samples)
        return [np.flatnonzero(bad.cpu().numpy()) for bad in flags]


def _bad_samples(values: Tensor, rows: LossRows) -> Tensor:
    """Return for each sample of a pack whether any of its ``[N]`` log-probs or ``[C]`` rewards is not finite."""
    known = rows.completions
    sample = known.sample_C if len(values) == len(known.sample_C) else known.sample_C[rows.sequence_N]
    bad = torch.zeros(len(rows.ends), dtype=torch.int64, device=values.device)
    return bad.index_add_(0, sample, (~values.isfinite()).long()) > 0


def _everywhere(of_packs: Sequence[np.ndarray]) -> list[int]:
    """Return the samples that any rank found, in ascending order."""
    found: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, [int(sample) for pack in of_packs for sample in pack])
    return sorted({sample for of_rank in found for sample in of_rank})
