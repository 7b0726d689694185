"""A pool of worker processes for all multi-rank tests, started once; each case joins a new layout.

torchrun costs about 10 s a case, mostly imports; here a case costs about a second. Processes are forked from a server
that has done nothing but import, so that neither four of them nor the next ones after a failure import anything. Only
processes that the pool started are ever stopped.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock

import torch.distributed as dist

START_SECONDS = 400
_PRELOAD = [
    *("megatron_align.train", "megatron_align.training.loop", "pytest"),
    *(f"tests.harness.{name}" for name in ("crash", "kernel_ranks", "model_ranks", "training_ranks")),
]


def forking() -> ForkServerContext:
    """Return the context of the server from which ranks are forked, one for all tests of a process.

    It sees no GPU, which several ranks could not share: what it imports may look for one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        forkserver.ensure_running()
    return context


def free_port() -> int:
    """Return a free port below the ephemeral range, from which the system assigns ports to others.

    It is bound only seconds later, and a test running in parallel may open a hundred ephemeral ports meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.clear()  # that of the server's start
    os.environ.update(environment, OMP_NUM_THREADS="1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several ranks cannot share one GPU: theirs is the CPU
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from megatron_align.model import parallel
    from tests.harness import kernel_ranks, model_ranks, training_ranks  # noqa: F401  # what tests call, imported before any timeout runs

    gc.freeze()  # imported objects stay: collecting is fast without them
    pipe.send("ready")
    while True:
        try:
            of_rank, function, arguments = pipe.recv()
        except EOFError:
            return
        os.environ.update(of_rank)
        try:
            answer = (True, function(parallel.RankInfo.from_environment(), *arguments))
        except BaseException as error:  # reported to the test, which raises it there
            answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
        pipe.send(answer)
        del answer, function, arguments
        gc.collect()  # a run's model and process groups refer to each other; each group has three threads


class RankFailed(Exception):
    """A rank raised; holds its type, message and traceback."""


class Pool:
    """Ranks that wait for calls.

    Args:
        forked: from the server of imports; False: each imports all, as variables that are read at an import are set.
    """

    def __init__(self, forked: bool = True) -> None:
        self._context = forking if forked else lambda: multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120
    ) -> list[Any]:
        """Call ``function(rank_info, *arguments)`` on each rank and return the answers by rank.

        Raises:
            RankFailed: with the first rank's error; the ranks that took part are replaced at the next call.
        """
        self._start(world_size)
        # Hosted here, as by torchrun's agent: a port that is free now may be taken once a rank listens.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        workers = self._workers[:world_size]
        for rank, (_, pipe) in enumerate(workers):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            pipe.send((environment, function, arguments))
        answers: dict[int, Any] = {}
        while len(answers) < world_size:
            pending = {pipe: rank for rank, (_, pipe) in enumerate(workers) if rank not in answers}
            ready = wait(list(pending), timeout=timeout)
            if not ready:
                self._stop_ranks(world_size)
                raise TimeoutError(f"ranks {sorted(pending.values())} did not answer within {timeout} s")
            for pipe in ready:
                good, answer = pipe.recv()
                if not good:
                    self._stop_ranks(world_size)
                    raise RankFailed(f"rank {pending[pipe]}: {answer[0]}: {answer[1]}\n{answer[2]}")
                answers[pending[pipe]] = answer
        return [answers[rank] for rank in range(world_size)]

    def _start(self, at_least: int) -> None:
        context = self._context()
        started: list[Connection] = []
        while len(self._workers) < at_least:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, dict(os.environ)), daemon=False)
            process.start()
            theirs.close()
            self._workers.append((process, ours))
            started.append(ours)
        # On a busy machine the imports take longer than any test.
        while started:
            ready = wait(started, timeout=START_SECONDS)
            if not ready:
                self.stop()
                raise TimeoutError(f"{len(started)} ranks were not ready within {START_SECONDS} s")
            for pipe in ready:
                pipe.recv()
                started.remove(pipe)

    def stop(self) -> None:
        self._stop_ranks(len(self._workers))

    def _stop_ranks(self, count: int) -> None:
        """Stop the first ``count`` processes; the others stay, as importing everything takes ten seconds."""
        for process, pipe in self._workers[:count]:
            pipe.close()
            process.kill()
            process.join()
        del self._workers[:count]
