"""AdamW in megatron-core's distributed optimizer: fp32 masters and moments, sharded over data-parallel ranks.

Needs neither Transformer Engine nor Apex, and takes Apex's update only by ``optimizer.implementation``. megatron-core's
own factory takes no optimizer of the caller, and the class by what is installed, so the parts are assembled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    OptimizerConfig as MegatronOptimizerConfig,
)
from megatron.core.optimizer import (
    _get_param_groups_and_buffers,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.checkpoint.host_optimizer_state import HostOptimizerState
from megatron_align.config import OptimizerConfig, ParallelConfig
from megatron_align.model import cpu
from megatron_align.model.megatron_versions import grads_for_norm
from megatron_align.model.policy import Policy
from megatron_align.training.apex_adamw import ApexAdamW

# Elements per bucket of overlapped gradient reductions; None: megatron-core's choice.
BUCKET_ELEMENTS: int | None = None


class Optimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer over torch's AdamW, which keeps a step count for each parameter.

    ``host_state`` takes masters and moments into host memory for a save.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.host_state, self.updates = HostOptimizerState(self), 0

    def get_parameter_state_dp_zero(
        self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any] | None:
        """Return the host memory that ``host_state`` fills, where megatron-core would gather the state at once."""
        if empty_data or return_on_all_ranks or not use_gloo_comm:
            return super().get_parameter_state_dp_zero(use_gloo_comm, empty_data, return_on_all_ranks)
        return self.host_state.gathered()

    def state_dict(self) -> dict[str, Any]:
        """Return megatron-core's state dict with the step in every group, as needed without Transformer Engine."""
        if self.optimizer.state:
            state = super().state_dict()
        else:  # this rank trains nothing: megatron-core looks for the step in a parameter's state
            options = self.optimizer.state_dict()
            groups = [{k: v for k, v in group.items() if k != "params"} for group in options["param_groups"]]
            state = {"optimizer": {"param_groups": groups}}
        steps = {int(own["step"]) for own in self.optimizer.state.values()}
        for group in state["optimizer"]["param_groups"]:
            group["step"] = max(steps, default=self.updates)
        return state

    @property
    def skips_on_device(self) -> bool:
        """Whether an update is launched before the host knows whether it is made: see :meth:`launch_update`."""
        return torch.cuda.is_available()  # torch's AdamW is then fused, see _options; Apex's update always is

    def grad_norm(self) -> Tensor:
        """Copy the gradients to the optimizer's shards; return their :func:`global_norm` before clipping."""
        self.prepare_grads()
        return global_norm(grads_for_norm(self), self.get_grad_stats_parallel_group())

    def launch_update(self, norm: Tensor, skip: Tensor) -> None:
        """Clip, update, gather the new weights, unless ``skip``; the host reads neither.

        torch's fused AdamW and Apex's divide gradients by ``grad_scale``, and leave all as it is where ``found_inf``
        is 1.

        Args:
            norm: what :meth:`grad_norm` returned.
            skip: bool, a scalar.
        """
        clip = self.config.clip_grad
        self.optimizer.found_inf = skip.float()
        self.optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1).float() if clip > 0 else None
        self.step_with_ready_grads()

    def finish_update(self, norm: float) -> None:
        """Count an update that was launched; where none was, make it. ``norm`` is that of :meth:`grad_norm`."""
        if not self.skips_on_device:
            if self.config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(self.get_parameters(), self.config.clip_grad, norm)
            self.step_with_ready_grads()
        self.updates += 1


def global_norm(grads: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Return the 2-norm of all gradients of all ranks of ``group``, a scalar on the device, summed in fp64.

    megatron-core sums squares in fp32. On CPU that is off by 1e-3 for some ten million elements, by a different
    amount on each layout, and clipping would inherit the error.
    """
    device = cpu.device()
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if grads:  # a rank may own padding only
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        squares += torch.stack(norms).square().sum()
    dist.all_reduce(squares, group=group)
    return squares.sqrt()


def wrap_data_parallel(chunks: list[Policy], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Wrap each chunk with a gradient buffer: fp32, summed (never averaged) over data-parallel ranks.

    Args:
        chunks: this rank's.
        parallel: ``overlap_grad_reduce`` and ``overlap_param_gather`` are read.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=BUCKET_ELEMENTS,
        average_in_collective=False,
    )
    model = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for chunk in model:
        _count_padding(chunk)
    if parallel.overlap_grad_reduce:
        # The schedules then delay the reduction until a chunk's last micro-batch.
        no_sync = [chunk.no_sync for chunk in model]
        model[0].config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    return model


def _count_padding(chunk: DistributedDataParallel) -> None:
    """Count the padding of every bucket among its elements.

    megatron-core saves the optimizer's state of all buckets without their padding, but indexes it by positions that
    include the padding: after the first of several buckets every moment would be saved shifted.
    """
    for buffer in chunk.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def gather_parameters(model: Sequence[DistributedDataParallel]) -> None:
    """Wait until the last update's weights are gathered; call it before anything but the model's forward reads them."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(
    model: list[DistributedDataParallel], config: OptimizerConfig, groups: ProcessGroupCollection
) -> Optimizer:
    """Build the optimizer; the model must have its weights, as the fp32 masters are copied from them here."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=model[0].config.params_dtype == torch.bfloat16,
        params_dtype=model[0].config.params_dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
    )
    param_groups, buffers = _get_param_groups_and_buffers(
        model,
        model_chunk_offset=0,
        config=settings,
        config_overrides=get_standard_config_overrides(settings),  # vectors: wd_mult 0
        filter_fn=lambda group: not group["is_expert_parallel"],
        buffer_name="buffers",
    )
    for group in param_groups:
        group.update(_options(config, group["wd_mult"]))
    adamw = (ApexAdamW if config.implementation == "apex" else torch.optim.AdamW)(param_groups)
    optimizer = Optimizer(
        adamw,
        settings,
        grad_scaler=None,
        init_state_fn=lambda *_: None,
        model_chunks=model,
        per_model_buffers=buffers,
        data_parallel_group=groups.dp_cp,
        # A save gathers the state through this group: in a thread, into one rank's host memory instead of every GPU.
        data_parallel_group_gloo=parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
        data_parallel_group_idx=groups.mp.rank(),
        distributed_optimizer_instance_id=0,
    )
    optimizer.grad_stats_parallel_group = groups.intra_dist_opt
    optimizer.tp_group = groups.tp
    _allocate_state(adamw)
    return optimizer


def _options(config: OptimizerConfig, wd_mult: float) -> dict[str, Any]:
    return {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay * wd_mult,
        "fused": torch.cuda.is_available(),
    }


def _allocate_state(adamw: torch.optim.AdamW) -> None:
    """Allocate the moments: the distributed optimizer's state dict needs them even before the first step."""
    for group in adamw.param_groups:
        for shard in group["params"]:
            adamw.state[shard] = {
                "step": torch.zeros(
                    (), dtype=torch.float32, device=shard.device if group["fused"] else "cpu"
                ),
                "exp_avg": torch.zeros_like(shard, dtype=torch.float32),
                "exp_avg_sq": torch.zeros_like(shard, dtype=torch.float32),
            }


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_updates(optimizer: Optimizer, updates: int) -> None:
    """Set the number of updates made; a checkpoint stores only masters and moments of the optimizer."""
    optimizer.updates = updates
    for state in optimizer.optimizer.state.values():
        state["step"].fill_(updates)
