"""Hold the folder of a run, and join its ranks; hangs and out-of-memory errors end in one readable line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from megatron_align.config import RunConfig
from megatron_align.model import parallel
from megatron_align.monitoring import flight_recorder
from megatron_align.monitoring.memory import explaining_out_of_memory
from megatron_align.rollout.prompt_table import PromptTable
from megatron_align.training.rewards import require_rewards
from megatron_align.training.rollout_servers import require_servers
from megatron_align.training.run_lock import RunLock
from megatron_align.training.setup import RunSetup, prepare_run
from megatron_align.training.watchdog import Watchdog, join_watched


@contextmanager
def prepared_run(config: RunConfig, rank_info: parallel.RankInfo) -> Iterator[RunSetup]:
    """Check a run, and hold the lock of its folder inside a with-block.

    Raises:
        InputError: another run uses the folder; or anything else that the user can correct.
    """
    with RunLock(Path(config.checkpoint.dir), rank_info) as lock:
        setup = prepare_run(config, rank_info, lock=lock)
        if isinstance(setup.train, PromptTable):
            require_rewards(config, setup.train.records, rank_info)
        yield setup


@contextmanager
def joined_ranks(setup: RunSetup) -> Iterator[Watchdog]:
    """Hold the process groups of a run, watched, inside a with-block; its vLLM servers are checked before.

    Raises:
        InputError: a server of ``rollout.url`` does not answer, or holds another model.
        TimeoutError: naming the ranks that did not come in time.
        OutOfMemory: in place of torch's error.
    """
    # megatron-core relies on this for the order of tensor-parallel collectives and GEMMs; CUDA reads it when it starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    config, rank_info = setup.config, setup.rank_info
    for note in require_servers(config.rollout, setup.assets, setup.shape):
        if rank_info.rank == 0:
            print(f"warning: {note}", flush=True)
    if torch.cuda.is_available():
        flight_recorder.enable(setup.folder)
    watchdog = join_watched(rank_info, config.parallel)
    if torch.cuda.is_available():
        watchdog.before_end = partial(flight_recorder.dump, setup.folder, rank_info)
    explaining = explaining_out_of_memory(config, setup.folder, rank_info.rank, lambda: watchdog.doing)
    completed = False
    try:
        with watchdog.watching(), explaining:
            yield watchdog
        completed = True
    finally:
        # A process alone may open another run; after a failure of several nobody knows which of them still answer.
        if completed or rank_info.world_size == 1:
            parallel.leave()
