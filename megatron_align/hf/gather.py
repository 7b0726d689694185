"""Gather the Hugging Face tensors of the model that all ranks hold, one row of the weight table at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.model.families import Row, rows, to_hf, views_of_hf
from megatron_align.model.lora import merged
from megatron_align.model.policy import Policy

_ALIGNMENT = 256  # bytes


@torch.no_grad()
def gathered_rows(
    chunks: Sequence[Policy], *, everywhere: bool = False, base: bool = False, reuse: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield the HF tensors of each row of the weight table, an adapter merged. Collective over a model's ranks.

    Each data- and context-parallel rank gathers by itself, and a rank holds one row at a time. Every rank must take all
    rows, in step with the others. Training may change the weights only before the first and after the last row.

    Args:
        chunks: this rank's chunks.
        everywhere: give the tensors to every rank; otherwise only the first tensor rank of the first stage has them.
        base: without the adapter, as it is held: one that starts with a part of the base is trained without that.
        reuse: a row's tensors are read only, and only until the next row is taken: its memory is used again, and
            what one rank holds in full is not copied.
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

    memory = _Memory() if reuse else None
    for row in rows(chunks[0].shape):  # no variable here keeps a row's tensors while the next is gathered
        shard, owner = shard_of(row.megatron), owners[row.megatron]
        yield collect(row, shard, owner, chunks[0], everywhere=everywhere, memory=memory)
        del shard


def owning_stages(names: set[str], pipeline: dist.ProcessGroup) -> dict[str, int]:
    """Return the first pipeline stage that holds each tensor."""
    held: list[set[str]] = [set()] * pipeline.size()
    dist.all_gather_object(held, names, group=pipeline)
    return {name: stage for stage in reversed(range(pipeline.size())) for name in held[stage]}


class _Memory:
    """One block of memory for the tensors of a row, used again for the next; it grows to the largest row.

    New memory costs more than a copy where the kernel has to clear every page of it first.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = self._needed = 0

    def clear(self) -> None:
        """Give up the tensors of the last row."""
        self._used = 0

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a tensor as ``torch.empty`` does, valid until :meth:`clear`."""
        count = math.prod(size) * dtype.itemsize
        start, self._used = self._used, self._used + count + -count % _ALIGNMENT
        self._needed = max(self._needed, self._used)
        if not start and (self._block.device != device or self._needed > len(self._block)):
            self._block = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is taken
            self._block = torch.empty(self._needed, dtype=torch.uint8, device=device)
        if self._used > len(self._block):  # until the next row, whose first tensor takes a larger block
            return torch.empty(size, dtype=dtype, device=device)
        return self._block[start : start + count].view(dtype).view(size)


def collect(
    row: Row,
    shard: Tensor | None,
    owner: int,
    chunk: Policy,
    *,
    everywhere: bool = False,
    memory: _Memory | None = None,
) -> dict[str, Tensor]:
    """Return the row's HF tensors; other ranks than the first send their shards and return nothing of use.

    Args:
        row: of the weight table.
        shard: this rank's; None: its stage has none.
        owner: the pipeline stage that sends.
        chunk: one of this rank's chunks.
        everywhere: every rank returns the tensors.
        memory: of the tensors of all rows, which are valid until the next row; None: each has its own.
    """
    empty: Callable[..., Tensor] = torch.empty
    if memory is not None:
        memory.clear()
        empty = memory.empty
    tensor, pipeline = chunk.pg_collection.tp, chunk.pg_collection.pp
    tensors: dict[str, Tensor] = {}
    if pipeline.rank() == owner:
        assert shard is not None
        shard = shard.detach().contiguous()
        if tensor.size() == 1:
            views = None if memory is None else views_of_hf(row, shard, chunk.shape)
            tensors = to_hf(row, [shard], chunk.shape, empty) if views is None else views
        else:
            shards = [
                empty(shard.shape, dtype=shard.dtype, device=shard.device) for _ in range(tensor.size())
            ]
            dist.all_gather(shards, shard, group=tensor)
            if tensor.rank() == 0 or everywhere:
                tensors = to_hf(row, shards, chunk.shape, empty)
    sends = everywhere or (owner != 0 and tensor.rank() == 0)
    if pipeline.size() == 1 or not sends:
        return tensors
    stages = dist.get_process_group_ranks(pipeline)
    if pipeline.rank() != owner and (everywhere or pipeline.rank() == 0):
        like = next(chunk.parameters())
        for name, size in zip(row.hf, row.hf_shapes(chunk.shape), strict=True):
            tensors[name] = empty(size, dtype=like.dtype, device=like.device)
    for exchanged in tensors.values():
        if everywhere:
            dist.broadcast(exchanged, stages[owner], group=pipeline)
        elif pipeline.rank() == owner:
            dist.send(exchanged, stages[0], group=pipeline)
        else:
            dist.recv(exchanged, stages[owner], group=pipeline)
    return tensors
