"""One training step: every micro-batch forward and backward, gradients summed, one update.

Losses arrive normalised over the step's global batch (see ``data``), so everything here is a plain sum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.kernels import MAXIMUM, RECOMPUTED
from megatron_align.model import cpu
from megatron_align.model.head import PackLoss
from megatron_align.model.parallel import is_metric_rank
from megatron_align.model.transfer import HostRead
from megatron_align.monitoring.timing import StepClock
from megatron_align.objectives.base import Objective
from megatron_align.records import PackedBatch
from megatron_align.training.optimizer import Optimizer
from megatron_align.training.pipeline import run_schedule


@dataclass(frozen=True, slots=True)
class ExtraLoss:
    """A further term of a step's loss, on packs of its own: its gradients are added to those of the step's packs."""

    objective: Objective
    batches: Sequence[PackedBatch]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Global numbers of one step, reduced over all ranks and micro-batches.

    Args:
        sums: the objective's sums, ``loss`` first; ``Objective.finish`` turns them into metrics.
        grad_norm: before clipping; None where no backward ran.
        pack_losses: loss share of each of this rank's packs; empty except on the last pipeline stage.
        updated: whether weights and optimizer were updated: only if loss and gradient norm are finite.
        paused_seconds: time that ``before_update`` took.
        critic: of the critic's update in the same step; None: there is no critic.
    """

    sums: dict[str, float]
    grad_norm: float | None
    pack_losses: list[float]
    updated: bool = False
    paused_seconds: float = 0.0
    critic: StepResult | None = None

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.sums["loss"]) and math.isfinite(self.grad_norm or 0.0)


@dataclass(frozen=True, slots=True)
class DeviceSums:
    """Sums of a step that are still on the device.

    Args:
        names: of the sums, ``loss`` first.
        values: fp64, reduced over all ranks.
        losses: fp64, loss share of each of this rank's packs; empty except on the last pipeline stage.
        statistics: numbers of the step's pre-pass.
    """

    names: tuple[str, ...]
    values: Tensor
    losses: Tensor
    statistics: Mapping[str, float]

    def packed(self, norm: Tensor | None) -> Tensor:
        """Return all numbers in one tensor, to be read together; ``norm``: of the gradients, None: there are none."""
        return torch.cat([self.values, self.losses, *([] if norm is None else [norm[None]])])

    def with_extra(self, more: DeviceSums) -> DeviceSums:
        """Return these sums with those of a further term, whose loss is added."""
        values = torch.cat([self.values, more.values[1:]])
        values[0] += more.values[0]
        return DeviceSums(
            (*self.names, *more.names[1:]), values, self.losses, {**self.statistics, **more.statistics}
        )

    def result(self, numbers: list[float]) -> StepResult:
        """Return the result of a step, given its :meth:`packed` numbers on the host."""
        count, losses = len(self.names), len(self.losses)
        sums = dict(zip(self.names, numbers[:count], strict=True))
        norm = next(iter(numbers[count + losses :]), None)
        return StepResult({**sums, **self.statistics}, norm, numbers[count : count + losses])


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
        self._detail = detail
        self.clock = StepClock()
        self._reduces_gradients, self._full_gradients = True, False
        self.model[0].config.grad_scale_func = None

    def train(
        self,
        batches: Sequence[PackedBatch],
        before_update: Callable[[], None] = lambda: None,
        extra: ExtraLoss | None = None,
        critic: Stepper | None = None,
    ) -> StepResult:
        """Make one update; if its loss or gradient norm is not finite, skip it and leave all state bit-identical.

        A critic is updated on the same packs: both are, or neither.

        Whether the run then stops (``train.on_nonfinite``) is decided by ``monitoring.health``.

        Loss and gradient norm are reduced over all ranks, so every rank decides identically.

        Args:
            batches: this data-parallel rank's packs, all of one length.
            before_update: called once gradients are computed, before anything is updated.
            extra: a further term of the loss.
            critic: of the critic.
        """
        steppers = [self] if critic is None else [self, critic]
        sums = [self._backward(batches, extra)]
        if critic is not None:
            sums.append(critic._backward(batches))
        started = time.perf_counter()
        before_update()
        paused = time.perf_counter() - started
        self.clock.discard()
        self._detail("update")
        optimizers = [stepper._own_optimizer() for stepper in steppers]
        norms = [optimizer.grad_norm() for optimizer in optimizers]
        reads = [HostRead(own.packed(norm)) for own, norm in zip(sums, norms, strict=True)]
        if self._own_optimizer().skips_on_device:  # the update is launched before the host has the numbers
            numbers = torch.stack([*norms, *(own.values[0] for own in sums)])
            skip = numbers.isfinite().logical_not().any()
            for optimizer, norm in zip(optimizers, norms, strict=True):
                optimizer.launch_update(norm, skip)
        results = [own.result(read.read()) for own, read in zip(sums, reads, strict=True)]
        if updated := all(own.is_finite for own in results):
            for optimizer, own in zip(optimizers, results, strict=True):
                assert own.grad_norm is not None, "a backward pass ran"
                optimizer.finish_update(own.grad_norm)
        self.clock.mark("optimizer")
        of_critic = results[1] if critic is not None else None
        return replace(results[0], updated=updated, paused_seconds=paused, critic=of_critic)

    def _own_optimizer(self) -> Optimizer:
        if self.optimizer is None:
            raise RuntimeError("Stepper.train needs an optimizer; this Stepper was built for evaluation")
        return self.optimizer

    def _backward(self, batches: Sequence[PackedBatch], extra: ExtraLoss | None = None) -> DeviceSums:
        """Compute the gradients of a step; nothing is updated."""
        self._own_optimizer().zero_grad()
        sums = self.gradients(batches, extra)
        self.clock.mark("optimizer")
        return sums

    def gradients(self, batches: Sequence[PackedBatch], extra: ExtraLoss | None = None) -> DeviceSums:
        """Compute gradients, reduced over ranks, into the buffers; return the step's sums and this rank's losses."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        if extra is None:
            return self._schedule(batches, self.objective, forward_only=False)
        with (
            self._local_gradients()
        ):  # they stay in the buffers, and are reduced with those of the further term
            sums = self._schedule(batches, self.objective, forward_only=False)
        return sums.with_extra(self._schedule(extra.batches, extra.objective, forward_only=False))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> StepResult:
        """Compute the same numbers without gradients."""
        for chunk in self.model:
            chunk.eval()
        sums = self._schedule(batches, self.objective, forward_only=True)
        return sums.result(HostRead(sums.packed(None)).read())

    def finite_alone(self, batches: Sequence[PackedBatch]) -> list[bool]:
        """Return for each pack whether its gradients alone are finite on all model-parallel ranks.

        Updates nothing; the gradient buffers are left dirty, as :meth:`train` clears them.
        """
        interleaved = len(self.model) > 1  # its schedule needs a micro-batch for each stage
        rounds = self.groups.pp.size() if interleaved else 1
        bad = torch.zeros(len(batches), device=cpu.device())
        for i, batch in enumerate(batches):
            with self._local_gradients():
                self.gradients([batch] * rounds)
            grads = [buffer.grad_data for chunk in self.model for buffer in chunk.buffers]
            bad[i] = any(not grad.isfinite().all() for grad in grads)
        for group in (self.groups.mp, self.groups.cp):
            dist.all_reduce(bad, group=group)
        return (bad == 0).tolist()

    @contextmanager
    def _local_gradients(self) -> Iterator[None]:
        """Compute gradients without reducing them over ranks inside a with-block, overlapped or not."""
        config = self.model[0].config
        no_sync = config.no_sync_func
        self._reduces_gradients, config.no_sync_func = False, nullcontext
        with ExitStack() as stack:
            for chunk in self.model:
                stack.enter_context(chunk.no_sync())
            yield
        self._reduces_gradients, config.no_sync_func = True, no_sync

    @contextmanager
    def full_gradients(self) -> Iterator[None]:
        """Give every rank the complete reduced gradient instead of its shard inside a with-block."""
        overlaps = [chunk.ddp_config.overlap_grad_reduce for chunk in self.model]
        self._full_gradients = True
        for chunk in self.model:
            chunk.ddp_config.overlap_grad_reduce = False  # it would reduce shards during backward
        yield
        self._full_gradients = False
        for chunk, overlap in zip(self.model, overlaps, strict=True):
            chunk.ddp_config.overlap_grad_reduce = overlap

    def _finalize(self, chunks: list[DistributedDataParallel], _tokens: Tensor, **options: Any) -> None:
        """Sum the gradients over ranks without dividing: the loss already holds the global normaliser."""
        self.clock.mark("forward_backward")
        if self.clock.running:
            dist.barrier()
        self.clock.mark("wait")
        finalize_model_grads(chunks, None, **{**options, "force_all_reduce": self._full_gradients})

    def _schedule(
        self, batches: Sequence[PackedBatch], objective: Objective, forward_only: bool
    ) -> DeviceSums:
        """Return sums over all packs of all ranks with the step's statistics, and the loss of each own pack."""
        config = self.model[0].config
        config.finalize_model_grads_func = self._finalize if self._reduces_gradients else None
        partial_sums = run_schedule(
            self.model,
            batches,
            partial(self._forward, objective, len(batches)),
            forward_only=forward_only,
        )
        # megatron-core keeps the config of every model alive: it must not keep the model and its process groups too.
        config.finalize_model_grads_func = None
        self._detail("sums over ranks")
        names, values = self._reduce(partial_sums, objective)
        losses = [sums["loss"].double() for sums in partial_sums]
        statistics = batches[0].rows.step_statistics
        return DeviceSums(names, values, torch.stack(losses) if losses else values[:0], statistics)

    def _forward(
        self,
        objective: Objective,
        count: int,
        batches: Iterator[tuple[int, PackedBatch]],
        model: torch.nn.Module,
        *_: Any,
    ) -> tuple[Tensor, Any]:
        """Run a stage; return its output and the function from which megatron-core gets the loss and its sums."""
        number, batch = next(batches)
        self._detail(f"micro-batch {number + 1} of {count} on pipeline stage {self.groups.pp.rank()}")
        output = model(batch, objective)
        if not isinstance(output, PackLoss):
            return output, None
        return output.loss, partial(self._report, batch, output.sums)

    def _report(
        self, batch: PackedBatch, sums: dict[str, Tensor], loss: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = torch.tensor(batch.rows.row_N.shape[0], dtype=torch.int)  # on the host: never copied
        return loss, tokens, {"loss": loss.detach().clone(), **sums}

    def _reduce(
        self, partial_sums: list[dict[str, Tensor]], objective: Objective
    ) -> tuple[tuple[str, ...], Tensor]:
        """Sum over micro-batches and ranks; of ranks that computed the same packs, one on the last stage counts.

        Returns the names and on the device their sums, fp64; the first is the loss.
        """
        names = ("loss", *objective.sum_names, *((RECOMPUTED,) if objective.whole_samples else ()))
        summed = [name for name in names if not name.endswith(MAXIMUM)]
        largest = [name for name in names if name.endswith(MAXIMUM)]
        totals = torch.zeros(len(names), dtype=torch.float64, device=cpu.device())
        if partial_sums and is_metric_rank(self.groups):
            columns = {name: torch.stack([sums[name].double() for sums in partial_sums]) for name in names}
            of_packs = [columns[name].sum() for name in summed] + [columns[name].max() for name in largest]
            totals = torch.stack(of_packs)
        dist.all_reduce(totals[: len(summed)])
        if largest:
            dist.all_reduce(totals[len(summed) :], dist.ReduceOp.MAX)
        return (*summed, *largest), totals
