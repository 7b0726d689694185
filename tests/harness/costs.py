"""Measure what ranks hold, compute and send, to verify the counts of ``megatron_align.cost``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.saved_bytes import SavedBytes
from megatron_align.config import OptimizerConfig, ParallelConfig
from megatron_align.cost.activations import FP32, Sizes
from megatron_align.cost.placement import Placement
from megatron_align.cost.work import Work, flops_of
from megatron_align.data.batching.collate import pack
from megatron_align.data.batching.context_parts import ContextRank, take_part
from megatron_align.model import parallel
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.families.adapter import Adapter
from megatron_align.model.policy import Policy, build_policy, transformer_config
from megatron_align.objectives.configuration import parse
from megatron_align.objectives.sft import SFT, SFTOptions
from megatron_align.records import PackedBatch, Sample
from megatron_align.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_align.training.setup import DTYPES
from megatron_align.training.trainer import Trainer
from megatron_align.training.watchdog import join_watched


def _shape(model: Path, reward: bool) -> ModelShape:
    shape = read_shape(model)
    return shape.as_reward() if reward else shape


def state(
    rank_info: parallel.RankInfo,
    model: Path,
    config: ParallelConfig,
    precision: str,
    reward: bool = False,
    trained: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state on this rank, and its pipeline stage."""
    with join_watched(rank_info, config).watching():
        groups, shape = parallel.groups(), _shape(model, reward)
        megatron = transformer_config(shape, config, DTYPES[precision])
        chunks = build_policy(megatron, shape, groups, **(trained or {}))
        plain = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
        ddp = wrap_data_parallel(chunks, config)
        optimizer = build_optimizer(ddp, OptimizerConfig(), groups)
        buffers = [buffer for chunk in ddp for buffer in chunk.buffers]
        weights = {buffer.param_data.untyped_storage().data_ptr() for buffer in buffers}
        kept = 0
        for group in optimizer.optimizer.param_groups:
            for shard in group["params"]:
                own = [shard] if shard.untyped_storage().data_ptr() not in weights else []
                moments = optimizer.optimizer.state[shard]
                kept += sum(_bytes(x) for x in (*own, moments["exp_avg"], moments["exp_avg_sq"]))
        answer = {
            "stage": groups.pp.rank(),
            "plain": plain,
            "trained": sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad),
            "parameters": sum(_bytes(buffer.param_data) for buffer in buffers)
            + sum(_bytes(p) for chunk in chunks for p in chunk.parameters() if not p.requires_grad),
            "gradients": sum(_bytes(buffer.grad_data) for buffer in buffers),
            "optimizer": kept,
        }
    parallel.leave()
    return answer


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def one_pack(lengths: list[int], tokens: int, prompts: list[int] | None = None) -> PackedBatch:
    """Create a pack of documents; the first ``prompts[i]`` tokens of document i are not scored."""
    samples = []
    for i, length in enumerate(lengths):
        scored = np.ones(length, bool)
        scored[: (prompts or [0] * len(lengths))[i] or 1] = False
        samples.append(Sample(np.arange(length, dtype=np.int32) % 250, scored))
    return pack(samples, [1.0] * len(samples), tokens)


def saved(
    rank_info: parallel.RankInfo,
    model: Path,
    config: ParallelConfig,
    precision: str,
    recompute: int | tuple[str, ...],
    batch: PackedBatch,
    adapter: Adapter | None = None,
) -> int:
    """Return the bytes that layers and final norm save for backward on this rank, without pipeline parallelism."""
    with join_watched(rank_info, config).watching():
        [policy] = _policy(model, config, precision, recompute, adapter)
        batch = take_part(batch, _context_rank(policy.shape, config))
        with SavedBytes(policy.parameters()).watching() as seen:
            hidden = policy._hidden(batch)
            held = seen.held
        hidden.sum().backward()
    parallel.leave()
    return held


def more_on_cpu(placement: Placement, tokens: int) -> int:
    """Return the bytes that norms save on a CPU beyond what is counted, without context parallelism.

    PyTorch's operations keep the input in fp32, the normalised rows and a factor of each; our kernels the input alone.
    """
    x, head_dim = Sizes.of(placement, tokens), placement.shape.head_dim
    layers = 0 if placement.recompute_layers else placement.shape.num_layers
    of_rows = FP32 * x.s * (x.h + 1)
    of_heads = 0
    if placement.shape.qk_norm:
        columns = x.q + x.kv
        of_heads = x.b * x.t * columns + FP32 * x.t * columns // head_dim
        if placement.precision == "bf16":
            of_heads += FP32 * x.t * columns - x.b * x.t * x.q
    kept = 0 if "norms" in placement.recompute_modules else 2 * of_rows
    return layers * (kept + of_heads) + of_rows


def _context_rank(shape: ModelShape, config: ParallelConfig) -> ContextRank | None:
    kind, ranks = context_kind_of(shape, config), parallel.groups().cp
    return kind and ContextRank(ranks=ranks.size(), rank=ranks.rank(), kind=kind)


def _policy(
    model: Path,
    config: ParallelConfig,
    precision: str,
    recompute: int | tuple[str, ...],
    adapter: Adapter | None = None,
) -> list[Policy]:
    groups, shape = parallel.groups(), read_shape(model)
    again = (recompute, ()) if isinstance(recompute, int) else (0, recompute)
    chunks = build_policy(
        transformer_config(shape, config, DTYPES[precision], *again), shape, groups, adapter
    )
    with torch.no_grad():
        for chunk in chunks:
            chunk.train()
            for parameter in chunk.parameters():
                parameter.fill_(0.01)
    return chunks


def counted_flops(
    rank_info: parallel.RankInfo,
    model: Path,
    config: ParallelConfig,
    recompute: int | tuple[str, ...],
    batch: PackedBatch,
) -> tuple[int, int]:
    """Return the FLOPs of matrix products of a pack on this rank: of forward, and of forward plus backward.

    Attention on CPU is dense within a document: its products count as squares, not triangles.
    """
    with join_watched(rank_info, config).watching():
        [policy] = _policy(model, config, "fp32", recompute)
        counts = []
        for train in (False, True):
            counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH)
            with counter, torch.set_grad_enabled(train):
                loss = policy(batch, SFT(SFTOptions()) if train else None)
                if train:
                    loss.loss.backward()
            counts.append(counter.get_total_flops())
    parallel.leave()
    return counts[0], counts[1]


def _sum_of_products(total: Any, a: Any, b: Any, *, out_val: Any = None, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _attention_products(products: int) -> Any:
    def count(*shapes: Any, out_val: Any = None, **_: Any) -> int:
        q, k = [shape for shape in shapes if isinstance(shape, torch.Size) and len(shape) == 4][-3:-1]
        return products * 2 * q[0] * q[1] * q[2] * k[2] * q[3]

    return count


_aten = torch.ops.aten
_UNKNOWN_TO_TORCH = {
    _aten.addmm_: _sum_of_products,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_products(2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_products(5),
}


def sent_bytes(
    rank_info: parallel.RankInfo,
    model: Path,
    config: ParallelConfig,
    recompute: int | tuple[str, ...],
    batch: PackedBatch,
) -> int:
    """Return the bytes this rank sends in tensor-parallel collectives in a forward and backward of all layers."""
    from megatron.core.tensor_parallel import layers, mappings

    shares = {"dist_all_gather_func": 1, "dist_reduce_scatter_func": 1}
    sent = 0

    def counting(function: Any, times: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal sent
            group = options.get("group")
            whole = max(_bytes(x) for x in args if isinstance(x, torch.Tensor))
            sent += times * whole * (group.size() - 1) // group.size()
            return function(*args, **options)

        return call

    with join_watched(rank_info, config).watching(), ExitStack() as stack:
        [policy] = _policy(model, config, "fp32", recompute)
        for module in (layers, mappings):
            for name, times in shares.items():
                changed = counting(getattr(module, name), times)
                stack.enter_context(mock.patch.object(module, name, changed))
        changed = counting(torch.distributed.all_reduce, 2)
        stack.enter_context(mock.patch.object(torch.distributed, "all_reduce", changed))
        policy._hidden(batch).sum().backward()
    parallel.leave()
    return sent


def sent_in_a_step(rank_info: parallel.RankInfo, arguments: list[str]) -> tuple[int, int, list[int]]:
    """Train one step; return the bytes this rank sends to other stages, those for gradients and weights, its packs.

    A pack is given by its tokens. Bytes of collectives are counted as :mod:`megatron_align.cost.traffic` counts them.
    """
    from megatron.core.distributed import param_and_grad_buffer as buffers

    sent = {"stages": 0, "data": 0}

    def counting(kind: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]
            size, ranks = max(_bytes(x) for x in tensors), 0
            if kind == "data":
                ranks = options["group"].size()
            sent[kind] += size * (ranks - 1) // ranks if ranks else size
            return function(*args, **options)

        return call

    with Trainer.open(parse(arguments)) as trainer, ExitStack() as stack:
        data = trainer.train_batches.step(0)
        for module, name, kind in (
            (torch.distributed, "isend", "stages"),
            (buffers, "dist_reduce_scatter_func", "data"),
            (buffers, "dist_all_gather_func", "data"),
        ):
            changed = counting(kind, getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, changed))
        trainer.train_step(data)
    return sent["stages"], sent["data"], [len(batch.tokens_T) for batch in data.batches]


def step_passes(rank_info: parallel.RankInfo, arguments: list[str]) -> dict[str, int]:
    """Train two steps; return the FLOPs of the second one's matrix products, and the bytes that everything else moves.

    The bytes are those of the tensors that an operation reads and writes, without views. The least FLOPs are those that
    ``megatron_align.cost`` counts for the same packs.
    """
    config = parse(arguments)
    with Trainer.open(config) as trainer:
        trainer.train_step(trainer.train_batches.step(0))
        data = trainer.train_batches.step(1)
        counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH)
        with _MovedBytes() as moved, counter:
            trainer.train_step(data)
        placement = Placement.of_run(config, trainer.setup.shape, rank_info.world_size)
        least = flops_of(config, placement, Work.of_counts(data.counts, 1, reward=placement.shape.is_reward))
    return {"products": counter.get_total_flops(), "least": round(least.model), "bytes": moved.bytes}


class _MovedBytes(TorchDispatchMode):
    """Sums the bytes of all operations' tensors, except for views and matrix products."""

    bytes = 0
    _PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        aliases = [one.alias_info for one in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and name not in self._PRODUCTS and "attention" not in name:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(_bytes(x) for x in {id(x): x for x in tensors}.values())
        return result
