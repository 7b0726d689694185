"""One training step: every micro-batch forward and backward, gradients summed, one update.

Losses arrive normalised over the step's global batch (see ``data``), so everything here is a plain sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.kernels import RECOMPUTED
from megatron_align.model import cpu
from megatron_align.model.head import PackLoss
from megatron_align.model.parallel import all_reduce_sum, is_metric_rank
from megatron_align.monitoring.timing import StepClock
from megatron_align.objectives.base import Objective
from megatron_align.records import PackedBatch
from megatron_align.training.optimizer import Optimizer


@dataclass(frozen=True, slots=True)
class StepResult:
    """Global numbers of one step: reduced over every rank and micro-batch."""

    metrics: dict[
        str, float
    ]  # sums of the objective, ``loss`` first; ``Objective.finish`` turns them into metrics
    grad_norm: float | None  # before clipping; None where no backward ran
    pack_losses: list[float]  # this rank's packs' shares of the loss; none but on the last stage
    updated: bool = False  # weights and optimizer have moved: only if loss and gradient norm are finite
    paused_seconds: float = 0.0  # that the step waited for a save


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
        # Is called when there are gradients and nothing has moved; waits, and returns for how many seconds.
        self.before_update: Callable[[], float] = lambda: 0.0
        self.clock = StepClock()
        self._sums_over_ranks, self._whole_sums = True, False
        self.model[0].config.grad_scale_func = None

    def train(self, batches: Sequence[PackedBatch]) -> StepResult:
        """Do one update, unless its numbers are not finite: then weights and optimizer stay as they are, bit by bit.

        ``batches`` are this data-parallel rank's packs, all of one length. Loss and gradient norm are reduced over
        all ranks, so every rank decides alike.
        """
        if self.optimizer is None:
            raise RuntimeError("Stepper.train needs an optimizer; this Stepper was built for evaluation")
        self.optimizer.zero_grad()
        metrics, pack_losses = self.gradients(batches)
        self.clock.mark("optimizer")
        paused = self.before_update()
        self.clock.leave_out()
        self._detail("update")
        grad_norm = self.optimizer.grad_norm()
        finite = math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)
        if finite:
            self.optimizer.update(grad_norm)
        self.clock.mark("optimizer")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # else the time of the update would count into the next step
        return StepResult(metrics, grad_norm, pack_losses, updated=finite, paused_seconds=paused)

    def gradients(self, batches: Sequence[PackedBatch]) -> tuple[dict[str, float], list[float]]:
        """Leave the gradient, summed over ranks, in the buffers; return what :meth:`_schedule` does."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        return self._schedule(batches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> StepResult:
        """Return the same numbers without an update."""
        for chunk in self.model:
            chunk.eval()
        metrics, pack_losses = self._schedule(batches, forward_only=True)
        return StepResult(metrics, None, pack_losses)

    def finite_alone(self, batches: Sequence[PackedBatch]) -> list[bool]:
        """Say of each pack whether the gradients that it makes, alone, are finite on all ranks of its model.

        Updates nothing; the gradient buffers are left dirty, as :meth:`train` clears them.
        """
        interleaved = len(self.model) > 1  # its schedule wants a micro-batch for each stage
        rounds = self.groups.pp.size() if interleaved else 1
        bad = torch.zeros(len(batches), device=cpu.device())
        for i, batch in enumerate(batches):
            with self._ranks_not_mixed():
                self.gradients([batch] * rounds)
            grads = [buffer.grad_data for chunk in self.model for buffer in chunk.buffers]
            bad[i] = any(not grad.isfinite().all() for grad in grads)
        for group in (self.groups.mp, self.groups.cp):
            dist.all_reduce(bad, group=group)
        return (bad == 0).tolist()

    @contextmanager
    def _ranks_not_mixed(self) -> Iterator[None]:
        """Keep each rank's gradients to itself for the length of a with-block, overlapped or not."""
        config = self.model[0].config
        no_sync = config.no_sync_func
        self._sums_over_ranks, config.no_sync_func = False, nullcontext
        with ExitStack() as stack:
            for chunk in self.model:
                stack.enter_context(chunk.no_sync())
            yield
        self._sums_over_ranks, config.no_sync_func = True, no_sync

    @contextmanager
    def whole_gradients(self) -> Iterator[None]:
        """Give every rank all of the summed gradient, not its shard alone, for the length of a with-block."""
        overlaps = [chunk.ddp_config.overlap_grad_reduce for chunk in self.model]
        self._whole_sums = True
        for chunk in self.model:
            chunk.ddp_config.overlap_grad_reduce = False  # its sums begin in backward, and are of shards
        yield
        self._whole_sums = False
        for chunk, overlap in zip(self.model, overlaps, strict=True):
            chunk.ddp_config.overlap_grad_reduce = overlap

    def _finalize(self, chunks: list[DistributedDataParallel], _tokens: Tensor, **options: Any) -> None:
        """Sum the gradients over ranks; the loss is already divided by what it must be, so nothing is divided here."""
        self.clock.mark("forward_backward")
        if self.clock.running:
            dist.barrier()
        self.clock.mark("wait")
        finalize_model_grads(chunks, None, **{**options, "force_all_reduce": self._whole_sums})

    def _schedule(
        self, batches: Sequence[PackedBatch], forward_only: bool
    ) -> tuple[dict[str, float], list[float]]:
        """Return the sums over all packs of all ranks, and the loss of each of this rank's."""
        config = self.model[0].config
        config.finalize_model_grads_func = self._finalize if self._sums_over_ranks else None
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
        # megatron-core keeps the configuration of every model: it must not keep the model, and its process groups.
        config.finalize_model_grads_func = None
        self._detail("sums over ranks")
        losses = torch.stack([sums["loss"] for sums in partial_sums]).tolist() if partial_sums else []
        return self._reduce(partial_sums), losses

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
        """Sum over micro-batches and ranks; of those that computed the same packs one counts, on the last stage."""
        names = ("loss", *self.objective.metrics, *((RECOMPUTED,) if self.objective.whole_samples else ()))
        totals = [0.0] * len(names)
        if partial_sums and is_metric_rank(self.groups):
            totals = [
                torch.stack([sums[name].double() for sums in partial_sums]).sum().item() for name in names
            ]
        return dict(zip(names, all_reduce_sum(totals), strict=True))
