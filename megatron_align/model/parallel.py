"""Ranks and process groups: joining, leaving, and a watchdog that names the rank the others wait for."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError, TrainingFault
from megatron_align.model import cpu

PATIENCE = 12  # times the timeout: what reading and writing a whole model may take
SILENCE = 10  # beats of the watchdog that a rank must miss to count as stopped

# How gloo and nccl word it; their exceptions are plain RuntimeErrors.
_CONNECTION_LOST = re.compile(
    r"[Cc]onnection (closed|reset) by (remote )?peer|[Bb]roken pipe|remote process exited"
)


@dataclass(frozen=True, slots=True)
class Place:
    """This process among the others, as the launcher's environment tells it (alone without a launcher)."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Place:
        """Read RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        found = [name for name in names if name in os.environ]
        if found and len(found) < len(names):
            missing = sorted(set(names) - set(found))
            raise InputError(
                f"a launcher must set all of {', '.join(names)}; the environment lacks {', '.join(missing)}"
            )
        texts = [os.environ.get(name, default) for name, default in zip(names, ("0", "0", "1"), strict=True)]
        if not all(text.isdecimal() for text in texts):
            raise InputError(f"{', '.join(names)} must be whole numbers, got {', '.join(texts)}")
        return cls(*map(int, texts))


def join(place: Place, config: ParallelConfig) -> Watchdog:
    """Meet the other ranks and build the process groups: nccl on GPUs, gloo on CPU.

    Raises:
        InputError: if the world size does not fit the layout.
        TimeoutError: naming the ranks that did not come within ``config.timeout_seconds``.
    """
    config.data_parallel(place.world_size)
    on_cpu = cpu.install()
    if not on_cpu:
        if place.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"each rank of a node needs a GPU of its own, local rank {place.local_rank} finds "
                f"{torch.cuda.device_count()} visible"
            )
        torch.cuda.set_device(place.local_rank)
    timeout = timedelta(seconds=config.timeout_seconds)
    store = _meet(place, timeout)
    # The watchdog speaks first, as it can name the rank; the backend's own timeout is the second net, and has
    # to outlast the time that one rank writes alone while the others wait.
    last_net = (PATIENCE + 1) * timeout
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        store=dist.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=last_net,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context,
        distributed_timeout_minutes=last_net.total_seconds() / 60,
    )
    # Nothing here draws random numbers (dropout is 0), but megatron-core's layers ask for its generators.
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    return Watchdog(store, place, config.timeout_seconds)


def leave() -> None:
    """Tear down the process groups."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def groups() -> ProcessGroupCollection:
    """Return the process groups of the current layout."""
    return ProcessGroupCollection.use_mpu_process_groups()


def is_metric_rank(groups: ProcessGroupCollection) -> bool:
    """Return whether this rank is the one to count, of a stage's ranks that computed the same packs."""
    return groups.tp.rank() == 0 and groups.cp.rank() == 0


def _meet(place: Place, timeout: timedelta) -> dist.Store:
    """Connect to the ranks' common store and call the roll, so that an absent rank is named."""
    if place.world_size == 1:
        return dist.HashStore()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        raise InputError(f"a launcher must set MASTER_ADDR and MASTER_PORT, got {address} and {port}")
    # torchrun's agent keeps the store, so it outlives any rank; without it rank 0 does.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = place.rank == 0 and not hosted
    try:
        store = dist.TCPStore(address, int(port), place.world_size, is_host, timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise TimeoutError(
            f"rank {place.rank} needs the store at {address}:{port}: {' '.join(str(error).split())}"
        ) from error
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"joined/{place.rank}", "")
    deadline = time.monotonic() + timeout.total_seconds()
    absent = list(range(place.world_size))
    while absent := [rank for rank in absent if not store.check([f"joined/{rank}"])]:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{place.world_size} ranks must join within {timeout.total_seconds():g} s, "
                f"missing: rank {_ranks(absent)}"
            )
        time.sleep(0.05)
    return store


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


class RankLost(RuntimeError):
    """Another rank died: its connection closed in the middle of a collective."""


class AlreadyReported(RuntimeError):
    """Another rank failed first and said why; this rank's error only follows from it."""


class Watchdog:
    """Ends the run when no progress is made for too long, and says which rank the others wait for.

    Each rank reports what it is about to do; a thread of each rank looks after its own last report, publishes how
    far it got within it, and beats: a rank whose thread beats no more was stopped or killed. Works the same for gloo
    and nccl, whose own errors name a socket or a collective, not a rank.
    """

    def __init__(self, store: dist.Store, place: Place, timeout_seconds: float):
        self._store = dist.PrefixStore("watchdog", store)
        self._place = place
        self._timeout = timeout_seconds
        self._pause = min(1.0, timeout_seconds / 10)
        self._number = self._details = 0
        self._last = time.monotonic()
        self._limit = timeout_seconds
        self._stop = threading.Event()
        self.before_end: Callable[[], None] = lambda: None  # the last thing this rank does when the run hangs
        self.report("start")
        self._beat()

    def report(self, doing: str) -> None:
        """Say what this rank does next, for example ``step 17``: every rank reports the same, in the same order."""
        self._number, self._details = self._number + 1, 0
        self._doing = self._within = doing
        self._last = time.monotonic()
        self._publish()

    def detail(self, within: str) -> None:
        """Say how far this rank is within its report, for example ``micro-batch 3 of 8``; costs nothing."""
        self._details += 1
        self._within = f"{self._doing}, {within}"
        self._last = time.monotonic()

    def _publish(self) -> None:
        self._store.set(f"rank/{self._place.rank}", f"{self._number}:{self._details}:{self._within}")

    def _beat(self) -> None:
        self._store.add(f"beat/{self._place.rank}", 1)
        self._publish()

    @property
    def doing(self) -> str:
        """What this rank reported last."""
        return self._doing

    @contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Report, and allow PATIENCE times as long: a large model is read or written slower than any step.

        A rank that is done early waits for the others under its own next report, and names them if need be.
        """
        self.report(doing)
        self._limit = PATIENCE * self._timeout
        try:
            yield
        finally:
            self._last, self._limit = time.monotonic(), self._timeout

    @contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch for the length of a with-block, and let only the first rank that fails speak.

        Raises:
            RankLost: in place of a broken connection.
            AlreadyReported: in place of an error that follows from another rank's.
        """
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        except (InputError, TrainingFault):
            raise  # found by every rank alike; rank 0 says it
        except Exception as error:  # whatever it is, it goes on: here it is only decided who prints it
            if not self._first_to_speak():
                raise AlreadyReported(str(error)) from error
            if _CONNECTION_LOST.search(str(error)):
                raise RankLost(
                    f"another rank died while rank {self._place.rank} was in '{self._within}': its connection "
                    "closed; the launcher's report names it"
                ) from error
            raise
        finally:
            self._stop.set()
            thread.join()

    def _first_to_speak(self) -> bool:
        try:
            return self._store.add("spoken", 1) == 1
        except dist.DistError:  # the store went down with the rank that kept it, and that rank spoke
            return False

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            if time.monotonic() - self._last > self._limit:
                self._end()
            with suppress(dist.DistError):  # the store is gone: whoever is in a collective will hear of it
                self._beat()

    def _end(self) -> None:
        try:
            line = self.diagnosis()
            if self._first_to_speak():
                print(f"error: {line}", file=sys.stderr, flush=True)
            self.before_end()
        except dist.DistError:
            pass  # the store went down with the rank that kept it, and that rank spoke
        finally:
            os._exit(1)

    def diagnosis(self) -> str:
        """Return one line naming the ranks that do not answer, or are furthest behind, and where they were."""
        silent = self._silent()
        reports: dict[int, tuple[int, int, str]] = {}
        for rank in range(self._place.world_size):
            number, details, within = self._store.get(f"rank/{rank}").decode().split(":", 2)
            reports[rank] = (int(number), int(details), within)
        wait = f"no progress for {self._limit:g} s"
        if silent:
            others = max((report for rank, report in reports.items() if rank not in silent), default=None)
            line = f"{wait}: rank {_ranks(silent)} does not answer (stopped, killed, or its machine is gone), last in "
            line += f"'{reports[silent[0]][2]}'"
            return line if others is None else f"{line}, while others wait in '{others[2]}'"
        ahead, behind = max(reports.values()), min(reports.values())
        late = [rank for rank, report in reports.items() if report[:2] == behind[:2]]
        if ahead[:2] == behind[:2]:
            return f"{wait}: every rank is in '{ahead[2]}' and none gets on"
        return f"{wait}: rank {_ranks(late)} is still in '{behind[2]}' while others wait in '{ahead[2]}'"

    def _silent(self) -> list[int]:
        """Return the ranks whose threads do not beat any more; at once if all do."""
        names = {rank: f"beat/{rank}" for rank in range(self._place.world_size) if rank != self._place.rank}
        before = {rank: self._store.add(name, 0) for rank, name in names.items()}
        deadline = time.monotonic() + min(30.0, max(SILENCE * self._pause, 8.0))
        silent = list(names)
        while silent and time.monotonic() < deadline:
            self._beat()  # the others may be asking, too
            time.sleep(self._pause / 2)
            silent = [rank for rank in silent if self._store.add(names[rank], 0) == before[rank]]
        return silent


def require_agreement(facts: dict[str, Any], why: str) -> None:
    """Check that every rank found the same; each calls this.

    Raises:
        InputError: on every rank, naming the first rank and the fact that differs from rank 0's.
    """
    found: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, facts)
    for rank, theirs in enumerate(found):
        for name, fact in found[0].items():
            if theirs[name] != fact:
                raise InputError(f"{why}: {name} is {fact} on rank 0 and {theirs[name]} on rank {rank}")


def all_reduce_sum(values: list[float], group: Any = None) -> list[float]:
    """Sum a few host numbers over ``group`` in fp64 (fp32 would lose counts above 2**24)."""
    total = torch.tensor(values, dtype=torch.float64, device=cpu.device())
    dist.all_reduce(total, group=group)
    return total.tolist()
