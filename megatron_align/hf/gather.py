"""Gather the Hugging Face tensors of the model that all ranks hold, one row of the weight table at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.model.families import Row, rows, to_hf
from megatron_align.model.lora import merged
from megatron_align.model.policy import Policy


@torch.no_grad()
def gathered_rows(
    chunks: Sequence[Policy], *, everywhere: bool = False, base: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield the HF tensors of each row of the weight table, an adapter merged. Collective over a model's ranks.

    Each data- and context-parallel rank gathers by itself, and a rank holds one row at a time. Every rank must take all
    rows, in step with the others. Training may change the weights only before the first and after the last row.

    Args:
        chunks: this rank's chunks.
        everywhere: give the tensors to every rank; otherwise only the first tensor rank of the first stage has them.
        base: without the adapter, as it is held: one that starts with a part of the base is trained without that.
    """
    local: dict[str, Tensor] = {
        name: parameter for chunk in chunks for name, parameter in chunk.base_parameters().items()
    }
    trained = [] if base else chunks
    adapters = {
        name: adapter
        for chunk in trained
        for name, adapter in (chunk.layer_adapters() | chunk.trained_copies()).items()
    }
    owners = owning_stages(set(local), chunks[0].pg_collection.pp)

    def shard_of(name: str) -> Tensor | None:
        return merged(local[name], adapters.get(name)) if name in local else None

    for row in rows(chunks[0].shape):  # no variable here keeps a row's tensors while the next is gathered
        yield collect(row, shard_of(row.megatron), owners[row.megatron], chunks[0], everywhere=everywhere)


def owning_stages(names: set[str], pipeline: dist.ProcessGroup) -> dict[str, int]:
    """Return the first pipeline stage that holds each tensor."""
    held: list[set[str]] = [set()] * pipeline.size()
    dist.all_gather_object(held, names, group=pipeline)
    return {name: stage for stage in reversed(range(pipeline.size())) for name in held[stage]}


def collect(
    row: Row, shard: Tensor | None, owner: int, chunk: Policy, *, everywhere: bool = False
) -> dict[str, Tensor]:
    """Return the row's HF tensors; other ranks than the first send their shards and return nothing of use.

    Args:
        row: of the weight table.
        shard: this rank's; None: its stage has none.
        owner: the pipeline stage that sends.
        chunk: one of this rank's chunks.
        everywhere: every rank returns the tensors.
    """
    tensor, pipeline = chunk.pg_collection.tp, chunk.pg_collection.pp
    tensors: dict[str, Tensor] = {}
    if pipeline.rank() == owner:
        assert shard is not None
        shard = shard.detach().contiguous()
        shards = [torch.empty_like(shard) for _ in range(tensor.size())]
        dist.all_gather(shards, shard, group=tensor)
        if tensor.rank() == 0 or everywhere:
            tensors = to_hf(row, shards, chunk.shape)
    sends = everywhere or (owner != 0 and tensor.rank() == 0)
    if pipeline.size() == 1 or not sends:
        return tensors
    stages = dist.get_process_group_ranks(pipeline)
    if pipeline.rank() != owner and (everywhere or pipeline.rank() == 0):
        like = next(chunk.parameters())
        for name, size in zip(row.hf, row.hf_shapes(chunk.shape), strict=True):
            tensors[name] = torch.empty(size, dtype=like.dtype, device=like.device)
    for exchanged in tensors.values():
        if everywhere:
            dist.broadcast(exchanged, stages[owner], group=pipeline)
        elif pipeline.rank() == owner:
            dist.send(exchanged, stages[0], group=pipeline)
        else:
            dist.recv(exchanged, stages[owner], group=pipeline)
    return tensors
