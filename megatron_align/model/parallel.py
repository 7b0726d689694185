"""Ranks and process groups: join the other ranks, build the groups of the layout, leave."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError, listed, one_line
from megatron_align.model import cpu

PATIENCE = 12  # times the timeout: the limit for reading or writing a complete model


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Rank, local rank and world size of this process, as the launcher sets them; without a launcher one rank."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> RankInfo:
        """Read RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        missing = sorted(name for name in names if name not in os.environ)
        if missing and len(missing) < len(names):
            raise InputError(
                f"a launcher must set all of {', '.join(names)}; the environment lacks {', '.join(missing)}"
            )
        texts = [os.environ.get(name, default) for name, default in zip(names, ("0", "0", "1"), strict=True)]
        if not all(text.isdecimal() for text in texts):
            raise InputError(f"{', '.join(names)} must be whole numbers, got {', '.join(texts)}")
        return cls(*map(int, texts))


def join(rank_info: RankInfo, config: ParallelConfig) -> dist.Store:
    """Meet the other ranks and build the process groups: nccl on GPUs, gloo on CPU.

    Returns:
        The key-value store that all ranks share (the watchdog of ``training`` publishes progress in it).

    Raises:
        InputError: if the world size does not fit the layout.
        TimeoutError: naming the ranks that did not join within ``config.timeout_seconds``.
    """
    config.data_parallel(rank_info.world_size)
    on_cpu = cpu.install()
    if not on_cpu:
        if rank_info.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"each rank of a node needs one GPU, local rank {rank_info.local_rank} finds "
                f"{torch.cuda.device_count()} visible"
            )
        torch.cuda.set_device(rank_info.local_rank)
    timeout = timedelta(seconds=config.timeout_seconds)
    store = _meet(rank_info, timeout)
    # The watchdog acts first, as it can name the rank. The backend's timeout is the fallback, and must be longer than
    # the time in which one rank writes while the others wait.
    fallback = (PATIENCE + 1) * timeout
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=dist.PrefixStore("group", store),
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        timeout=fallback,
    )
    build_groups(config, minutes=fallback.total_seconds() / 60)
    return store


def build_groups(config: ParallelConfig, minutes: float = 30.0) -> None:
    """Build megatron-core's process groups of a layout, once the ranks have met; ``minutes``: their time limit."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context,
        distributed_timeout_minutes=minutes,
    )
    # Nothing draws random numbers (dropout is 0), but megatron-core's layers require its generators.
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)


def leave() -> None:
    """Destroy the process groups, if there are any."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def groups() -> ProcessGroupCollection:
    """Return the process groups of the current layout."""
    return ProcessGroupCollection.use_mpu_process_groups()


def is_metric_rank(groups: ProcessGroupCollection) -> bool:
    """Return whether this rank reports metrics: tensor rank 0 and context rank 0 of those that share a pack."""
    return groups.tp.rank() == 0 and groups.cp.rank() == 0


def _meet(rank_info: RankInfo, timeout: timedelta) -> dist.Store:
    """Connect to the store of all ranks and wait until each has joined; an absent rank is named."""
    if rank_info.world_size == 1:
        return dist.HashStore()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        raise InputError(f"a launcher must set MASTER_ADDR and MASTER_PORT, got {address} and {port}")
    # torchrun's agent hosts the store, which then outlives any rank; without torchrun rank 0 hosts it.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = rank_info.rank == 0 and not hosted
    store: dist.Store
    try:
        store = dist.TCPStore(
            address, int(port), rank_info.world_size, is_host, timeout, wait_for_workers=False
        )
    except dist.DistError as error:
        raise TimeoutError(
            f"rank {rank_info.rank} cannot reach the store at {address}:{port}: {one_line(error)}"
        ) from error
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"joined/{rank_info.rank}", "")
    deadline = time.monotonic() + timeout.total_seconds()
    absent = list(range(rank_info.world_size))
    while absent := [rank for rank in absent if not store.check([f"joined/{rank}"])]:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{rank_info.world_size} ranks must join within {timeout.total_seconds():g} s, "
                f"missing: rank {list_ranks(absent)}"
            )
        time.sleep(0.05)
    return store


def list_ranks(ranks: list[int]) -> str:
    """Return the ranks as text for an error line, the first eight by number: ``1, 3`` or ``0, ..., 7 and 56 more``."""
    return listed(ranks, most=8)


def require_agreement(values: dict[str, Any], why: str) -> None:
    """Require that ``values`` are equal on all ranks. Collective.

    Raises:
        InputError: on every rank, naming the first value and rank that differ from rank 0.
    """
    gathered: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    for rank, others in enumerate(gathered):
        for name, value in gathered[0].items():
            if others[name] != value:
                raise InputError(f"{why}: {name} is {value} on rank 0 and {others[name]} on rank {rank}")


def first_fault(fault: str | None) -> str | None:
    """Return the fault of the lowest rank that has one; None: no rank has. Collective.

    Args:
        fault: of this rank.
    """
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((each for each in faults if each), None)


@contextmanager
def failing_together() -> Iterator[None]:
    """Run a with-block that is not collective; an error of one rank is raised on every rank, so that none waits.

    Raises:
        InputError: on every rank, with the error of the lowest rank that has one.
    """
    error: InputError | OSError | RuntimeError | None = None
    try:
        yield
    except (InputError, OSError, RuntimeError) as caught:  # torch.OutOfMemoryError is a RuntimeError
        error = caught
    if first := first_fault(None if error is None else one_line(error)):
        raise InputError(first) from error


def all_reduce_sum(values: list[float], group: Any = None) -> list[float]:
    """Sum host numbers over ``group`` in fp64 (fp32 would lose counts above 2**24)."""
    total = torch.tensor(values, dtype=torch.float64, device=cpu.device())
    dist.all_reduce(total, group=group)
    return total.tolist()


def all_reduce_max(values: list[float], group: Any = None) -> list[float]:
    """Return the largest of each of some host numbers over ``group``."""
    largest = torch.tensor(values, dtype=torch.float64, device=cpu.device())
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.tolist()
