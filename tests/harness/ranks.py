"""What the pool's processes are asked to do: functions of ``(rank_info, ...)``, importable by name."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.context_parts import ContextRank, take_part
from megatron_align.errors import InputError
from megatron_align.hf.load import load_weights
from megatron_align.model import parallel
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.objectives.configuration import parse
from megatron_align.records import PackedBatch
from megatron_align.training.loop import run
from megatron_align.training.watchdog import join_watched


def train(rank_info: parallel.RankInfo, arguments: list[str]) -> None:
    run(parse(arguments), rank_info)


def logits(
    rank_info: parallel.RankInfo, model: Path, config: ParallelConfig, batch: PackedBatch
) -> torch.Tensor:
    """Return the packed logits of an HF folder on this layout."""
    with join_watched(rank_info, config).watching():
        groups, shape = parallel.groups(), read_shape(model)
        [policy] = build_policy(transformer_config(shape, config, torch.float32), shape, groups)
        load_weights(model, shape, policy.global_parameters(), groups.tp.rank(), groups.tp.size())
        answer = policy.logits(_dealt(batch, shape, config))
    parallel.leave()
    return answer


def _dealt(batch: PackedBatch, shape: ModelShape, config: ParallelConfig) -> PackedBatch:
    """Return the pack as this rank computes it."""
    kind, group = context_kind_of(shape, config), parallel.groups().cp
    return take_part(batch, kind and ContextRank(ranks=group.size(), rank=group.rank(), kind=kind))


def logprobs(
    rank_info: parallel.RankInfo,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
):
    """Return log-probs and both gradients, the vocabulary split over all ranks."""
    from megatron_align.kernels import token_logprobs

    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        group = parallel.groups().tp
        mine = weight.chunk(rank_info.world_size)[rank_info.rank].clone().requires_grad_()
        hidden = hidden.clone().requires_grad_()
        values = token_logprobs(hidden, mine, targets, group=group, vocab_size=vocab_size)
        (values * torch.arange(1, len(targets) + 1)).sum().backward()
    parallel.leave()
    return values.detach(), hidden.grad, mine.grad


def pack_logprobs(
    rank_info: parallel.RankInfo, model: Path, config: ParallelConfig, batches: list[PackedBatch]
):
    """Return the policy's log-probs of the scored rows of each batch."""
    with join_watched(rank_info, config).watching():
        groups, shape = parallel.groups(), read_shape(model)
        [policy] = build_policy(transformer_config(shape, config, torch.float32), shape, groups)
        load_weights(model, shape, policy.global_parameters(), groups.tp.rank(), groups.tp.size())
        with torch.no_grad():
            answers = [policy(_dealt(batch, shape, config)) for batch in batches]
    parallel.leave()
    return answers


def decay_groups(rank_info: parallel.RankInfo, model: Path) -> tuple[list[str], list[str], bool]:
    """Return the parameters with and without decay, and whether the fp32 masters of bf16 weights equal them."""
    from megatron_align.config import OptimizerConfig
    from megatron_align.training.optimizer import build_optimizer, wrap_data_parallel

    with join_watched(rank_info, ParallelConfig()).watching():
        groups, shape = parallel.groups(), read_shape(model)
        chunks = build_policy(transformer_config(shape, ParallelConfig(), torch.bfloat16), shape, groups)
        load_weights(model, shape, chunks[0].global_parameters(), 0, 1)
        ddp = wrap_data_parallel(chunks, ParallelConfig())
        optimizer = build_optimizer(ddp, OptimizerConfig(weight_decay=0.5), groups)
        decays: dict[float, list[str]] = {0.5: [], 0.0: []}
        equal = True
        for name, parameter in chunks[0].named_parameters():
            group, order = optimizer.model_param_group_index_map[parameter]
            decays[optimizer.param_groups[group]["weight_decay"]].append(name)
            master = optimizer.param_groups[group]["params"][order]
            equal &= master.dtype == torch.float32 and torch.equal(
                master, parameter.detach().float().flatten()
            )
    parallel.leave()
    return decays[0.5], decays[0.0], equal


def train_with_extras(rank_info: parallel.RankInfo, arguments: list[str]) -> None:
    """Train with megatron-core believing that Transformer Engine is installed: it then keeps the step elsewhere."""
    from megatron.core.optimizer import distrib_optimizer

    before = distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_TE_OPTIMIZER
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    try:
        train(rank_info, arguments)
    finally:
        distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_TE_OPTIMIZER = before


def disagree(rank_info: parallel.RankInfo) -> str:
    """Return what a rank is told when one of them found something else."""
    with join_watched(rank_info, ParallelConfig()).watching():
        try:
            parallel.require_agreement({"step": 5 if rank_info.rank == 1 else 2}, "one folder")
            answer = "agreed"
        except InputError as error:
            answer = str(error)
        parallel.require_agreement({"step": 5}, "one folder")
    parallel.leave()
    return answer


def norm_of(rank_info: parallel.RankInfo, grads: list[torch.Tensor]) -> float:
    """Return the global norm of gradients dealt out over the ranks."""
    from megatron_align.training.optimizer import global_norm

    with join_watched(rank_info, ParallelConfig()).watching():
        norm = global_norm(grads[rank_info.rank :: rank_info.world_size], parallel.groups().dp)
    parallel.leave()
    return norm


def stall(rank_info: parallel.RankInfo, late: int, timeout: float) -> None:
    """Rank ``late`` sleeps while the others wait for it in an all-reduce: the watchdog must end them."""
    with join_watched(rank_info, ParallelConfig(timeout_seconds=timeout)).watching() as watchdog:
        watchdog.report("step 1")
        if rank_info.rank == late:
            time.sleep(600)
        watchdog.report("step 2")
        parallel.all_reduce_sum([1.0])


def slab_loss_grads(
    rank_info: parallel.RankInfo,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    slabs: list[tuple[int, int]],
    options: dict[str, float],
):
    """Return loss, whole and own hidden gradient, own weight gradient and sums, the vocabulary split over all ranks."""
    from megatron_align.kernels import slab_loss
    from tests.harness.logprobs import StatisticsLoss, gradients

    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        options = {"group": parallel.groups().tp, "vocab_size": vocab_size, "statistics": True, **options}
        mine = weight.chunk(rank_info.world_size)[rank_info.rank].clone().requires_grad_()
        tensors = (hidden.clone().requires_grad_(), mine, targets)
        (loss, whole, own_weight), sums = gradients(
            slab_loss, tensors, slabs, StatisticsLoss(slabs), **options
        )
        (_, share, _), _ = gradients(
            slab_loss, tensors, slabs, StatisticsLoss(slabs), sum_hidden_grad=False, **options
        )
    parallel.leave()
    return loss, whole, share, own_weight, sums


def scores(
    rank_info: parallel.RankInfo,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
):
    """Return token_scores with the whole vocabulary as top k, split over all ranks."""
    from megatron_align.kernels import token_scores

    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        group, mine = parallel.groups().tp, weight.chunk(rank_info.world_size)[rank_info.rank]
        answer = token_scores(hidden, mine, targets, top_k=vocab_size, group=group, vocab_size=vocab_size)
    parallel.leave()
    return answer


def checked_logprobs(rank_info: parallel.RankInfo, rows: list[int]) -> str:
    """Return what token_logprobs says to this many vocabulary rows on each rank, values checked."""
    from megatron_align.kernels import token_logprobs

    with join_watched(rank_info, ParallelConfig(tensor=rank_info.world_size)).watching():
        weight, targets = torch.zeros(rows[rank_info.rank], 4), torch.zeros(2, dtype=torch.int64)
        os.environ["MEGATRON_ALIGN_CHECKS"] = "1"
        try:
            token_logprobs(torch.zeros(2, 4), weight, targets, group=parallel.groups().tp)
            answer = "agreed"
        except ValueError as error:
            answer = str(error)
        finally:
            del os.environ["MEGATRON_ALIGN_CHECKS"]
    parallel.leave()
    return answer


def head_gradients(
    rank_info: parallel.RankInfo,
    model: Path,
    config: ParallelConfig,
    batches: list[PackedBatch],
    options: dict,
):
    """Return the loss of each pack and every parameter's whole main_grad after all of them.

    ``options``: ``through: logprobs`` makes the loss outside the engine; ``freeze`` the head; others are DDP's.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megatron_align.objectives.registry import build_objective
    from megatron_align.objectives.sft import SFTOptions

    overlap = {name: True for name in options if name.startswith("overlap")}
    with join_watched(rank_info, config).watching():
        groups, shape = parallel.groups(), read_shape(model)
        megatron = transformer_config(shape, config, torch.float32)
        [policy] = build_policy(megatron, shape, groups)
        load_weights(model, shape, policy.global_parameters(), groups.tp.rank(), groups.tp.size())
        if "freeze" in options:
            policy.output_layer.requires_grad_(False)
            policy.embedding.requires_grad_(False)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, average_in_collective=False, **overlap
        )
        ddp = DistributedDataParallel(megatron, settings, policy)
        ddp.zero_grad_buffer()
        objective = build_objective(SFTOptions(), None)
        losses = []
        for i, batch in enumerate(batches):
            if "overlap_param_gather" in options:
                ddp.start_param_sync()
            with ddp.no_sync() if overlap and i + 1 < len(batches) else nullcontext():
                if options.get("through") == "logprobs":
                    loss, _ = objective.loss(ddp(batch), batch.rows, {})
                else:
                    loss, _ = ddp(batch, objective)
                loss.backward()
            losses.append(loss.detach())
        finalize_model_grads([ddp], None, pg_collection=groups, force_all_reduce=True)
        grads = {
            name: _whole(p.main_grad, p, groups.tp)[: shape.vocab_size]
            for name, p in policy.named_parameters()
            # Fused weights lie in another order on each layout; what flows through them reaches the embedding.
            if p.requires_grad and ("norm" in name or "decoder" not in name)
        }
    parallel.leave()
    return torch.stack(losses), grads


def _whole(grad: torch.Tensor, parameter: torch.nn.Parameter, group) -> torch.Tensor:
    """Return the gradient over all tensor-parallel ranks, as if nothing was split."""
    if group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return grad.clone()
    parts = [torch.empty_like(grad) for _ in range(group.size())]
    torch.distributed.all_gather(parts, grad.contiguous(), group=group)
    return torch.cat(parts, parameter.partition_dim)


class _GradientsAsWeights:
    """An optimizer whose update puts each parameter's whole gradient in its place."""

    def __init__(self, model: list):
        self.model = model

    def zero_grad(self) -> None:
        pass

    def grad_norm(self) -> float:
        return 0.0

    def update(self, norm: float) -> None:
        with torch.no_grad():
            for chunk in self.model:
                for parameter in chunk.parameters():
                    parameter.copy_(parameter.main_grad)


def gradients(rank_info: parallel.RankInfo, arguments: list[str], folder: Path) -> None:
    """Write the first step's gradients as a Hugging Face folder: whole, fused weights in HF's order."""
    from megatron_align.hf.export import export_model
    from megatron_align.training.run_context import joined_ranks
    from megatron_align.training.setup import prepare_run
    from megatron_align.training.trainer import Trainer

    setup = prepare_run(parse(arguments), rank_info)
    with joined_ranks(setup) as watchdog:
        trainer = Trainer.build(setup, watchdog)
        trainer.stepper.optimizer = _GradientsAsWeights(trainer.model)
        with trainer.stepper.full_gradients():
            trainer.train_step(trainer.train_batches.step(0))
        export_model(trainer.chunks, folder, setup.assets)


def train_in_slabs(rank_info: parallel.RankInfo, arguments: list[str], rows: int | None) -> None:
    """Train with slabs of at most ``rows`` rows of logits."""
    from megatron_align.kernels.token_logprobs import slab

    before = slab.SLAB_BYTES["cpu"]
    if rows is not None:
        # 259 tokens, padded to a multiple of 128 on each rank
        columns = 128 * (3 if parse(arguments).parallel.tensor == 1 else 2)
        slab.SLAB_BYTES["cpu"] = rows * columns * 4
    try:
        train(rank_info, arguments)
    finally:
        slab.SLAB_BYTES["cpu"] = before


def train_in_buckets(rank_info: parallel.RankInfo, arguments: list[str], elements: int) -> None:
    """Train with gradients reduced and weights gathered in buckets of about so many elements."""
    from megatron_align.training import optimizer

    before, optimizer.BUCKET_ELEMENTS = optimizer.BUCKET_ELEMENTS, elements
    try:
        train(rank_info, arguments)
    finally:
        optimizer.BUCKET_ELEMENTS = before
