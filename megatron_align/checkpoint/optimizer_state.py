"""Masters and moments in host memory, as a checkpoint holds them: copied by every rank, then gathered on the first.

megatron-core's own does both at once, through fresh memory, several times over: most of the time of a save.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_KINDS = ("param", "exp_avg", "exp_avg_sq")


class HostedOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer with its state taken into host memory in two stages.

    :meth:`copy_state` needs the state at rest, but no other rank. :meth:`gather_state` needs the other ranks, but no
    longer the state: training may change it. Either may run in another thread than training's. Until both have run,
    what megatron-core's ``sharded_state_dict`` returns for a save refers to memory that holds zeros, or an older state.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._memory: dict[tuple[Any, ...], Tensor] = {}

    def get_parameter_state_dp_zero(
        self, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[Any, Any] | None:
        """Return the host memory of data-parallel rank 0 that :meth:`gather_state` fills; None on other ranks.

        megatron-core asks for it to plan a save. It is the same at each call, and zero until it is filled.
        """
        if empty_data or return_on_all_ranks or not use_gloo_comm:
            return super().get_parameter_state_dp_zero(use_gloo_comm, empty_data, return_on_all_ranks)
        if self.data_parallel_group_gloo.rank() > 0:
            return None
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for number, buffer in enumerate(self.buffers):
            [dtype] = self.gbuf_ranges[number]
            gathered = {kind: self._whole(number, kind) for kind in _KINDS}
            state[number] = {dtype: {**gathered, "numel_unpadded": buffer.numel_unpadded}}
        return state

    def copy_state(self) -> None:
        """Copy this rank's shards."""
        for number, index, kind in self._stretches():
            [of_buckets] = self.gbuf_ranges[number].values()
            own = self._own(number, index, kind)
            for parameter, places in of_buckets[index]["param_map"].items():
                shard = self._get_main_param_and_optimizer_states(parameter)[kind]
                own[places["gbuf_local"].start : places["gbuf_local"].end].copy_(shard.detach())

    def gather_state(self) -> None:
        """Gather what all data-parallel ranks have copied on the first; each calls this."""
        group = self.data_parallel_group_gloo
        if group.size() == 1:
            return  # it was copied to its place
        for number, index, kind in self._stretches():
            own = self._own(number, index, kind)
            parts = None
            if group.rank() == 0:
                parts = list(self._of_bucket(number, index, kind).split(len(own)))
            dist.gather(own, parts, dist.get_global_rank(group, 0), group)

    def _stretches(self) -> Iterator[tuple[int, int, str]]:
        """Yield number of buffer, index of bucket and kind of state, in one order on all ranks."""
        for number, buffer in enumerate(self.buffers):
            for index in range(len(buffer.buckets)):
                for kind in _KINDS:
                    yield number, index, kind

    def _whole(self, number: int, kind: str) -> Tensor:
        """Return the memory of a whole buffer, on data-parallel rank 0."""
        buffer = self.buffers[number]
        assert buffer.numel_unpadded == buffer.numel, "padding must count: see training.optimizer"
        return self._host((number, kind), buffer.numel)

    def _of_bucket(self, number: int, index: int, kind: str) -> Tensor:
        buckets = self.buffers[number].buckets
        start = sum(bucket.grad_data.numel() for bucket in buckets[:index])
        return self._whole(number, kind)[start : start + buckets[index].grad_data.numel()]

    def _own(self, number: int, index: int, kind: str) -> Tensor:
        """Return the memory of this rank's shard of a bucket."""
        ranks = self.data_parallel_group_gloo.size()
        if ranks == 1:
            return self._of_bucket(number, index, kind)
        return self._host(
            (number, kind, index), self.buffers[number].buckets[index].grad_data.numel() // ranks
        )

    def _host(self, name: tuple[Any, ...], length: int) -> Tensor:
        """Return host memory, zero at first and the same at each call: what is not written stays zero."""
        if name not in self._memory:
            self._memory[name] = torch.zeros(length)
        return self._memory[name]
