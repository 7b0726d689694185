"""Weights of the live policy to a generation engine, against the disk's and the memory's own speed, in one run.

``python -m benchmarks.weight_sync --folder /big/disk`` builds a model with Llama-3-8B's tensor shapes and fewer layers
(``--layers 5``: 4.3 GB in bf16), on one process or as tensor-parallel ranks of this machine (``--tensor 2``), and
gives its weights to

- a vLLM engine: a folder of safetensors for its servers (a stub answers, that reads nothing), against ``write`` of as
  many bytes from memory into files of the same folder. Neither forces them onto the disk: servers read them at once;
- the transformers engine of every rank, against a copy of as many bytes in memory.

With several ranks the time of gloo's own ``all_gather`` of the shards, into held memory, is added to the peers'.

It prints seconds (median of ``--rounds``, in turn), GB/s, the share of the peer's speed, and by how much the process
grew beyond what it held before. Rows go to ``benchmarks/results/weight_sync.csv``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn
from transformers import LlamaConfig

from benchmarks.convert import FFN, GROUPS, HEADS, HIDDEN, VOCAB
from benchmarks.rows import record, stamp
from examples.quickstart.tiny_model import build_tokenizer
from megatron_align.config import ParallelConfig
from megatron_align.hf.assets import AssetChanges
from megatron_align.model import parallel
from megatron_align.model.families import read_shape
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.rollout.live_weights import live_engine, update_engine
from megatron_align.rollout.vllm_engine import VLLMEngine
from tests.harness.http_server import VLLMScript, serving
from tests.harness.pool import free_port


class Stub(VLLMScript):
    """A server that takes every update and reads no weights."""

    def __call__(self, path: str, body: dict) -> tuple[int, object]:
        return (200, {}) if path == "/collective_rpc" else super().__call__(path, body)


class Growth:
    """The greatest resident size within a with-block beyond that before it, in MB; looked at every 5 ms."""

    def __enter__(self) -> Growth:
        self._before, self.most, self._stop = self._resident(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.most = max(self.most, self._resident() - self._before)

    @staticmethod
    def _resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write_plainly(folder: Path, sizes: list[int]) -> float:
    """Write files of these sizes from memory, as the vLLM engine's folder has them; return the seconds."""
    block = memoryview(os.urandom(1 << 20) * (max(sizes) // (1 << 20) + 1))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        started = time.perf_counter()
        for number, size in enumerate(sizes):
            with open(Path(name) / f"{number}", "wb", buffering=0) as file:
                file.write(block[:size])
        return time.perf_counter() - started


def copy_plainly(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> float:
    """Copy tensors in memory; return the seconds."""
    started = time.perf_counter()
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
    return time.perf_counter() - started


def gather_plainly(shards: list[torch.Tensor]) -> float:
    """Gather each shard from all ranks into memory that is held; return the seconds. Collective."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return 0.0
    block = torch.zeros(ranks, max(shard.numel() for shard in shards), dtype=shards[0].dtype)
    dist.barrier()
    started = time.perf_counter()
    for shard in shards:
        dist.all_gather(list(block[:, : shard.numel()]), shard.view(-1))
    dist.barrier()
    return time.perf_counter() - started


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long a call takes on the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - started


@torch.no_grad()
def measure(rank: int, options: argparse.Namespace, assets: Path, port: int) -> None:
    """Measure on this rank; rank 0 records."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.tensor)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    layout = ParallelConfig(tensor=options.tensor)
    parallel.join(parallel.RankInfo.from_environment(), layout)
    shape, dtype = read_shape(assets), torch.bfloat16
    chunks = build_policy(transformer_config(shape, layout, dtype), shape, parallel.groups())
    for parameter in chunks[0].parameters():
        parameter.fill_(0.5)
    engine = live_engine(chunks, assets, AssetChanges())
    held = [parameter.data for parameter in engine.model.parameters()]
    copies = [torch.zeros_like(tensor) for tensor in held]
    sizes = [tensor.nbytes for tensor in held]
    shards = [parameter.data for parameter in chunks[0].parameters()]
    with serving(Stub()) as url:
        servers = VLLMEngine([url], build_tokenizer(words=()), weights_folder=options.folder)
        peers = {
            "vllm": (servers, lambda: 0.0 if rank else write_plainly(options.folder, sizes)),
            "transformers": (engine, lambda: copy_plainly(held, copies)),
        }
        rows = [
            row_of(
                name, partial(update_engine, engine, chunks, 1), partial(both, peer, shards), sizes, options
            )
            for name, (engine, peer) in peers.items()
        ]
    if rank == 0:
        record("weight_sync", rows)
    parallel.leave()


def both(peer: Callable[[], float], shards: list[torch.Tensor]) -> float:
    """Return the seconds of gathering and of a peer."""
    return gather_plainly(shards) + peer()


def row_of(
    name: str,
    sync: Callable[[], object],
    peer: Callable[[], float],
    sizes: list[int],
    options: argparse.Namespace,
) -> dict[str, object]:
    """Return the row of one engine; collective. The first round warms up."""
    times, peers, grown = [], [], []
    for _ in range(options.rounds + 1):
        with Growth() as growth:
            times.append(seconds_of(sync))
        grown.append(growth.most)
        peers.append(peer())
        dist.barrier()
    seconds, own, size = statistics.median(times[1:]), statistics.median(peers[1:]), sum(sizes)
    return {
        **stamp(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "engine": name,
        "tensor": options.tensor,
        "model_gb": round(size / 1e9, 2),
        "seconds": round(seconds, 2),
        "gb_per_second": round(size / 1e9 / seconds, 2),
        "peer_gb_per_second": round(size / 1e9 / own, 2) if own else "",
        "share_of_peer": round(own / seconds, 2),
        "grown_mb": round(max(grown[1:])),
        "largest_tensor_mb": round(max(sizes) / 2**20),
    }


def write_assets(folder: Path, layers: int) -> None:
    """Save the configuration and a tokenizer; the weights are the policy's."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=8192,
        dtype="bfloat16",
    ).save_pretrained(folder)
    build_tokenizer(words=()).save_pretrained(folder)


def main() -> None:
    """Build the model's folder and start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_assets(Path(name), options.layers)
        spawn(measure, (options, Path(name), free_port()), nprocs=options.tensor)


if __name__ == "__main__":
    main()
