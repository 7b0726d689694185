"""Copy a distributed optimizer's masters and moments into host memory for a save, then gather them on one rank.

megatron-core does both at once, through new memory, several times: most of the time of a save. :mod:`.load` reads the
state back on any layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_KINDS = ("param", "exp_avg", "exp_avg_sq")


class SaveableOptimizer(Protocol):
    """An optimizer that can be saved: with megatron-core's state dicts, and its state in host memory."""

    host_state: HostOptimizerState

    def state_dict(self) -> dict[str, Any]:
        """Return steps, learning rate and other options, without masters and moments."""

    def sharded_state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Return megatron-core's sharded state dict; masters and moments refer to ``host_state``'s memory."""


class HostOptimizerState:
    """Masters and moments of a distributed optimizer in host memory, taken in two stages.

    :meth:`copy` needs the state unchanged, but no other rank. :meth:`gather` needs the other ranks, but no longer the
    state: training may change it. Either may run on another thread than training's. Memory is allocated once; until
    both have run it holds zeros or the state of the last save.
    """

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        self._memory: dict[tuple[Any, ...], Tensor] = {}

    @property
    def _group(self) -> dist.ProcessGroup:
        return self._optimizer.data_parallel_group_gloo

    def gathered(self) -> dict[Any, Any] | None:
        """Return the memory of data-parallel rank 0 that :meth:`gather` fills; None on other ranks.

        In the format of megatron-core's ``get_parameter_state_dp_zero``, which is called to plan a save. The memory
        is the same at each call.
        """
        if self._group.rank() > 0:
            return None
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for number, buffer in enumerate(self._optimizer.buffers):
            [dtype] = self._optimizer.gbuf_ranges[number]
            tensors = {kind: self._of_buffer(number, kind) for kind in _KINDS}
            state[number] = {dtype: {**tensors, "numel_unpadded": buffer.numel_unpadded}}
        return state

    def copy(self) -> None:
        """Copy this rank's shards."""
        for number, index, kind in self._bucket_kinds():
            [of_buckets] = self._optimizer.gbuf_ranges[number].values()
            own = self._own_shard(number, index, kind)
            for parameter, ranges in of_buckets[index]["param_map"].items():
                shard = self._optimizer._get_main_param_and_optimizer_states(parameter)[kind]
                own[ranges["gbuf_local"].start : ranges["gbuf_local"].end].copy_(shard.detach())

    def gather(self) -> None:
        """Gather the copies of all data-parallel ranks on the first; each rank calls this."""
        group = self._group
        if group.size() == 1:
            return  # copied to its final memory
        for number, index, kind in self._bucket_kinds():
            own = self._own_shard(number, index, kind)
            shards = None
            if group.rank() == 0:
                shards = list(self._of_bucket(number, index, kind).split(len(own)))
            dist.gather(own, shards, dist.get_global_rank(group, 0), group)

    def _bucket_kinds(self) -> Iterator[tuple[int, int, str]]:
        """Yield number of buffer, index of bucket and kind of state, in the same order on all ranks."""
        for number, buffer in enumerate(self._optimizer.buffers):
            for index in range(len(buffer.buckets)):
                for kind in _KINDS:
                    yield number, index, kind

    def _of_buffer(self, number: int, kind: str) -> Tensor:
        """Return the memory of an entire buffer, on data-parallel rank 0."""
        buffer = self._optimizer.buffers[number]
        assert buffer.numel_unpadded == buffer.numel, "padding must count: see training.optimizer"
        return self._allocated((number, kind), buffer.numel)

    def _of_bucket(self, number: int, index: int, kind: str) -> Tensor:
        buckets = self._optimizer.buffers[number].buckets
        start = sum(bucket.grad_data.numel() for bucket in buckets[:index])
        return self._of_buffer(number, kind)[start : start + buckets[index].grad_data.numel()]

    def _own_shard(self, number: int, index: int, kind: str) -> Tensor:
        """Return the memory of this rank's shard of a bucket."""
        ranks = self._group.size()
        if ranks == 1:
            return self._of_bucket(number, index, kind)
        elements = self._optimizer.buffers[number].buckets[index].grad_data.numel() // ranks
        return self._allocated((number, kind, index), elements)

    def _allocated(self, name: tuple[Any, ...], length: int) -> Tensor:
        """Return host memory by name, zero when it is allocated: padding that is never written stays zero."""
        if name not in self._memory:
            self._memory[name] = torch.zeros(length)
        return self._memory[name]
