"""Functions for the pool: logits, log-probs and gradients of a model on any layout, and agreement of the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.context_parts import ContextRank, take_part
from megatron_align.errors import InputError
from megatron_align.hf.load import load_weights
from megatron_align.model import layer, parallel
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.policy import Policy, build_policy, transformer_config
from megatron_align.records import PackedBatch
from megatron_align.training.watchdog import join_watched


def logits(
    rank_info: parallel.RankInfo, model: Path, config: ParallelConfig, batch: PackedBatch
) -> torch.Tensor:
    """Return the packed logits of an HF folder on this layout."""
    with join_watched(rank_info, config).watching():
        policy = _loaded_policy(model, config)
        answer = policy.logits(_rank_batch(batch, policy.shape, config))
    parallel.leave()
    return answer


def _loaded_policy(model: Path, config: ParallelConfig, *recompute: Any) -> Policy:
    """Build the fp32 model of an HF folder on this layout, without pipeline parallelism, and load its weights."""
    groups, shape = parallel.groups(), read_shape(model)
    [policy] = build_policy(transformer_config(shape, config, torch.float32, *recompute), shape, groups)
    load_weights(model, shape, policy.global_parameters(), groups.tp.rank(), groups.tp.size())
    return policy


def _rank_batch(batch: PackedBatch, shape: ModelShape, config: ParallelConfig) -> PackedBatch:
    """Return this context-parallel rank's part of a pack."""
    kind, group = context_kind_of(shape, config), parallel.groups().cp
    return take_part(batch, kind and ContextRank(ranks=group.size(), rank=group.rank(), kind=kind))


def pack_logprobs(
    rank_info: parallel.RankInfo, model: Path, config: ParallelConfig, batches: list[PackedBatch]
):
    """Return the policy's log-probs of the scored rows of each batch."""
    with join_watched(rank_info, config).watching():
        policy = _loaded_policy(model, config)
        with torch.no_grad():
            answers = [policy(_rank_batch(batch, policy.shape, config)) for batch in batches]
    parallel.leave()
    return answers


def sums_by_norms(
    rank_info: parallel.RankInfo, model: Path, recompute: tuple[int, tuple[str, ...]], batch: PackedBatch
) -> list[tuple[dict[str, torch.Tensor], int, int]]:
    """Compute a pack with residual adds of megatron-core's, then with those that norms compute, as on a GPU.

    Returns, for each: the hidden states and all gradients by name, the calls that add and normalise, and those that
    only normalise. ``recompute``: as the options of ``train``, layers and modules.
    """
    answers = []
    with join_watched(rank_info, ParallelConfig()).watching():
        for by_norms in (False, True):
            policy = _loaded_policy(model, ParallelConfig(), *recompute).train()
            calls: Counter[str] = Counter()
            with ExitStack() as stack:
                stack.enter_context(mock.patch.object(layer, "takes_triton", return_value=by_norms))
                for name in ("add_rms_norm", "rms_norm"):
                    counted = _counting(calls, name, getattr(layer, name))
                    stack.enter_context(mock.patch.object(layer, name, counted))
                hidden = policy._hidden(batch)
                hidden.square().sum().backward()
            found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
            answers.append(({"hidden": hidden.detach(), **found}, calls["add_rms_norm"], calls["rms_norm"]))
    parallel.leave()
    return answers


def _counting(calls: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls[name] += 1
        return function(*args)

    return call


def disagree(rank_info: parallel.RankInfo) -> str:
    """Return the error that a rank gets when another one has a different value."""
    with join_watched(rank_info, ParallelConfig()).watching():
        try:
            parallel.require_agreement({"step": 5 if rank_info.rank == 1 else 2}, "one folder")
            answer = "agreed"
        except InputError as error:
            answer = str(error)
        parallel.require_agreement({"step": 5}, "one folder")
    parallel.leave()
    return answer


def head_gradients(
    rank_info: parallel.RankInfo,
    model: Path,
    config: ParallelConfig,
    batches: list[PackedBatch],
    options: dict,
):
    """Return the loss of each pack, and every parameter's full main_grad after all of them.

    ``options``: ``through: logprobs`` computes the loss outside the engine; ``freeze``: a frozen head; others: DDP.
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
        groups, policy = parallel.groups(), _loaded_policy(model, config)
        if "freeze" in options:
            policy.output_layer.requires_grad_(False)
            policy.embedding.requires_grad_(False)
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, average_in_collective=False, **overlap
        )
        ddp = DistributedDataParallel(policy.config, settings, policy)
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
            name: _gathered(p.main_grad, p, groups.tp)[: policy.shape.vocab_size]
            for name, p in policy.named_parameters()
            # Fused weights have another order on each layout; their gradients are covered by the embedding's.
            if p.requires_grad and ("norm" in name or "decoder" not in name)
        }
    parallel.leave()
    return torch.stack(losses), grads


def _gathered(grad: torch.Tensor, parameter: torch.nn.Parameter, group) -> torch.Tensor:
    """Return the gradient gathered over all tensor-parallel ranks."""
    if group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return grad.clone()
    parts = [torch.empty_like(grad) for _ in range(group.size())]
    torch.distributed.all_gather(parts, grad.contiguous(), group=group)
    return torch.cat(parts, parameter.partition_dim)
