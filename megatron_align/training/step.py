"""One training step: every micro-batch forward and backward, gradients summed, one update.

Losses arrive normalised over the step's global batch (see ``data``), so everything here is a plain sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.kernels import RECOMPUTED
from megatron_align.model import cpu
from megatron_align.model.head import PackLoss
from megatron_align.model.parallel import all_reduce_sum
from megatron_align.records import PackedBatch
from megatron_align.training.objective import Objective
from megatron_align.training.optimizer import Optimizer


@dataclass(frozen=True, slots=True)
class StepResult:
    """Global numbers of one step: reduced over every rank and micro-batch."""

    metrics: dict[
        str, float
    ]  # sums of the objective, ``loss`` first; ``Objective.finish`` turns them into metrics
    grad_norm: float | None  # before clipping; None where no backward ran


class Stepper:
    """Runs steps over this rank's micro-batches through megatron-core's pipeline schedules."""

    def __init__(
        self,
        model: Sequence[DistributedDataParallel],
        objective: Objective,
        groups: ProcessGroupCollection,
        optimizer: Optimizer | None = None,
        detail: Callable[[str], None] = lambda _: None,
    ):
        self.model = list(model)
        self.objective = objective
        self.groups = groups
        self.optimizer = optimizer
        self._detail = detail  # is told how far a step is
        config = self.model[0].config
        # The loss is already divided by the global batch's tokens: finalize must not divide by anything.
        config.finalize_model_grads_func = lambda chunks, _tokens, **kwargs: finalize_model_grads(
            chunks, None, **kwargs
        )
        config.grad_scale_func = None

    def train(self, batches: Sequence[PackedBatch]) -> StepResult:
        """Do one update. ``batches`` are this data-parallel rank's packs, all of one length."""
        if self.optimizer is None:
            raise RuntimeError("Stepper.train needs an optimizer; this Stepper was built for evaluation")
        self.optimizer.zero_grad()
        metrics = self.gradients(batches)
        self._detail("update")
        grad_norm = self.optimizer.update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the time of the update would count into the next step
        return StepResult(metrics, grad_norm)

    def gradients(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Leave the gradient, summed over ranks, in the buffers; return the sums of the objective."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        return self._schedule(batches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> StepResult:
        """Return the same numbers without an update."""
        for chunk in self.model:
            chunk.eval()
        return StepResult(self._schedule(batches, forward_only=True), None)

    def _schedule(self, batches: Sequence[PackedBatch], forward_only: bool) -> dict[str, float]:
        numbered = [(f"micro-batch {i + 1} of {len(batches)}", batch) for i, batch in enumerate(batches)]
        iterators = [iter(numbered) for _ in self.model]
        partial_sums = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens_T.shape[0],
            micro_batch_size=1,
            forward_only=forward_only,
        )
        self._detail("sums over ranks")
        return self._reduce(partial_sums)

    def _forward(
        self, batches: Iterator[tuple[str, PackedBatch]], model: torch.nn.Module, *_: Any
    ) -> tuple[Tensor, Any]:
        """Return a stage's output and what megatron-core asks for the numbers that go with a loss."""
        name, batch = next(batches)
        self._detail(f"{name} on pipeline stage {self.groups.pp.rank()}")
        batch = batch.to(cpu.device())
        output = model(batch, self.objective)
        if not isinstance(output, PackLoss):
            return output, None
        return output.loss, partial(self._report, batch, output.sums)

    def _report(
        self, batch: PackedBatch, sums: dict[str, Tensor], loss: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = torch.tensor(batch.rows.row_N.shape[0], dtype=torch.int, device=loss.device)
        return loss, tokens, {"loss": loss.detach().clone(), **sums}

    def _reduce(self, partial_sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """Sum over micro-batches and ranks; only one tensor-parallel rank of the last stage counts."""
        names = ("loss", *self.objective.metrics, *((RECOMPUTED,) if self.objective.whole_samples else ()))
        totals = [0.0] * len(names)
        if partial_sums and self.groups.tp.rank() == 0:
            totals = [
                torch.stack([sums[name].double() for sums in partial_sums]).sum().item() for name in names
            ]
        return dict(zip(names, all_reduce_sum(totals), strict=True))
