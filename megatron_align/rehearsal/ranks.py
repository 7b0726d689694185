"""One rank of many, alone: process groups whose collectives do nothing, and host objects that all ranks agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_align.config import ParallelConfig
from megatron_align.model import parallel
from megatron_align.model.parallel import RankInfo
from megatron_align.rehearsal.device import Current


@contextmanager
def alone(rank_info: RankInfo, config: ParallelConfig) -> Iterator[None]:
    """Hold the process groups of one rank of a run inside a with-block."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank_info.rank, world_size=rank_info.world_size)
    try:
        parallel.build_groups(config)
        yield
    finally:
        parallel.leave()


def install() -> None:
    """Make new groups without ranks, and collectives of host objects that return this rank's, permanently."""
    new_group = dist.new_group

    def without_ranks(ranks: Any = None, *args: Any, **options: Any) -> Any:
        named = {k: options[k] for k in ("use_local_synchronization", "group_desc") if k in options}
        return new_group(ranks, backend="fake", **named)

    def gather_everywhere(gathered: list[Any], own: Any, group: Any = None) -> None:
        gathered[:] = [own] * len(gathered)

    def gather(own: Any, gathered: list[Any] | None = None, *args: Any, **options: Any) -> None:
        if gathered is not None:
            gathered[:] = [own] * len(gathered)

    dist.new_group = distributed_c10d.new_group = without_ranks
    dist.all_gather_object = gather_everywhere  # type: ignore[assignment]
    dist.gather_object = gather  # type: ignore[assignment]
    dist.broadcast_object_list = lambda *args, **options: None
    dist.barrier = lambda *args, **options: Current.ledger.collective("barrier")
