"""Saving and loading a training checkpoint against the disk's own speed, and the pause of a save in the background.

``python -m benchmarks.checkpoint --folder /big/disk`` builds a Llama-type model with bf16 weights and its
optimizer (``--layers 8``: 81 M parameters, 1.14 GB), and in one process, the contestants in turn for ``--rounds``:

- write, read: the same number of bytes in one file, sequentially, written with ``fsync``: the speed of the disk
- save: synchronous, as in a run: planned, hashed, flushed to disk, renamed; the first save is a case of its own
- background: a background save while training makes steps of ``--tokens``. Three figures: the pause of training,
  including its wait for the copies; the slowdown, by how much those steps took longer, pause included, than the same
  number of steps without a save, as processor and memory are shared; and the time until the checkpoint was complete
- torch: ``torch.distributed.checkpoint`` saves the same tensors, without hashes: synchronously, and asynchronously
  with a reused stager that copies in a thread; its pause is measured in the same way
- verify, load: reading and hashing all files; then reading them into the model and its optimizer

The page cache is dropped before anything is read, and a few gigabytes of memory are written once before each case but
the pause: a virtual machine fetches idle memory from its host, and the first case would pay for that.
Prints a table and appends it to ``benchmarks/results/checkpoint.csv``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import append, stamp

BLOCK = 16 << 20
HIDDEN, FFN, VOCAB = 768, 2048, 32000


def model_folder(folder: Path, layers: int) -> Path:
    """Write a Hugging Face folder without weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=12,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


def build(assets: Path) -> tuple[Any, dict[str, Any]]:
    """Build a model, its stepper, an optimizer with nonzero moments, and checkpoint metadata."""
    import torch

    from megatron_align.checkpoint.card import make_checkpoint_metadata
    from megatron_align.config import OptimizerConfig, ParallelConfig
    from megatron_align.model import parallel
    from megatron_align.model.families import read_shape
    from megatron_align.model.policy import build_policy, transformer_config
    from megatron_align.objectives.registry import build_objective
    from megatron_align.objectives.sft import SFTOptions
    from megatron_align.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_align.training.step import Stepper

    parallel.join(parallel.RankInfo.from_environment(), ParallelConfig())
    shape, dtype = read_shape(assets), torch.bfloat16
    chunks = build_policy(transformer_config(shape, ParallelConfig(), dtype), shape, parallel.groups())
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.normal_(std=0.02)
    model = wrap_data_parallel(chunks, ParallelConfig())
    optimizer = build_optimizer(model, OptimizerConfig(), parallel.groups())
    for state in optimizer.optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            moment.uniform_()
    stepper = Stepper(model, build_objective(SFTOptions(), None), parallel.groups(), optimizer)
    return stepper, make_checkpoint_metadata(1, shape, dtype)


def one_pack(tokens: int) -> Any:
    """Return a pack of one document whose tokens are all trained."""
    import numpy as np

    from megatron_align.data.batching.collate import pack
    from megatron_align.records import Sample

    scored = np.arange(tokens) > 0
    return pack([Sample(np.arange(tokens, dtype=np.int32), scored)], [1 / (tokens - 1)], tokens)


class Torch:
    """Saves weights, masters and moments with torch.distributed.checkpoint."""

    def __init__(self, stepper: Any) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        states = stepper.optimizer.optimizer.state.items()
        self.state = {
            "model": {name: weight.detach() for name, weight in stepper.model[0].module.named_parameters()},
            "optimizer": {
                str(i): {"param": shard.detach(), "exp_avg": of["exp_avg"], "exp_avg_sq": of["exp_avg_sq"]}
                for i, (shard, of) in enumerate(states)
            },
        }
        # No GPU: neither pinned memory nor non-blocking copies; shared memory serves writers in other processes.
        self.stager = DefaultStager(StagingOptions(False, False, True, False))

    def save(self, folder: Path) -> None:
        """Save synchronously."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state, checkpoint_id=folder)

    def pause(self, folder: Path, stepper: Any, batches: list[Any]) -> float:
        """Save during a training step; return the seconds for which training was blocked."""
        import torch.distributed.checkpoint as dcp

        started = time.perf_counter()
        response = dcp.async_save(self.state, checkpoint_id=folder, async_stager=self.stager)
        pause = time.perf_counter() - started
        pause += stepper.train(batches, response.staging_completion.result).paused_seconds
        response.upload_completion.result()
        return pause


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forget(folder: Path) -> None:
    """Flush the files of a folder to disk and drop them from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory() -> None:
    """Write and free some gigabytes of memory in another process."""
    subprocess.run([sys.executable, "-c", "b'1' * (4 << 30)"], check=True)


def write(path: Path, size: int) -> None:
    """Write a file of random bytes block by block and flush it to disk."""
    block = os.urandom(BLOCK)
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: size - start])
        os.fsync(file.fileno())


def read(path: Path) -> None:
    """Read a file, block by block."""
    block = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def measure(folder: Path, layers: int, rounds: int, tokens: int) -> Iterator[tuple[str, int, list[float]]]:
    """Yield the bytes and the seconds of each case."""
    from megatron_align.checkpoint.integrity import require_intact
    from megatron_align.checkpoint.load import load_checkpoint
    from megatron_align.checkpoint.saver import CheckpointContent, Saver

    assets = model_folder(folder / "model", layers)
    stepper, metadata = build(assets)
    model, optimizer, batches = stepper.model, stepper.optimizer, [one_pack(tokens)]
    content = CheckpointContent(model=model, optimizer=optimizer, metadata=metadata, assets=assets)
    saver, background = Saver(), Saver(background=True)
    first = saver.save(folder / "save", content)
    background.save(folder / "background", content)  # allocates its buffers
    torch = Torch(stepper)
    torch.pause(folder / "torch", stepper, batches)  # allocates its buffers
    times: dict[str, list[float]] = {"save, the first": [first.seconds]}

    def note(case: str, seconds: float) -> None:
        times.setdefault(case, []).append(seconds)

    for _ in range(rounds):
        for name in ("plain", "save", "background", "torch"):
            shutil.rmtree(folder / name, ignore_errors=True)
        touch_memory()
        note("write", timed(lambda: write(folder / "plain" / "file", first.bytes)))
        touch_memory()
        note("save", saver.save(folder / "save", content).seconds)
        touch_memory()
        note("torch, save", timed(lambda: torch.save(folder / "torch" / "at_once")))
        note("torch, pause", torch.pause(folder / "torch" / "async", stepper, batches))
        alone = timed(lambda: stepper.train(batches))
        note("step", alone)
        started, steps = time.perf_counter(), 0
        background.begin(folder / "background", content)
        while not background.written():
            stepper.train(batches, background.wait_until_copied)
            steps += 1
        saved = background.finish()
        note("background, pause", saved.pause_seconds)
        note("background, of training", time.perf_counter() - started - steps * alone)
        note("background, in all", saved.seconds)
        forget(folder)
        touch_memory()
        note("read", timed(lambda: read(folder / "plain" / "file")))
        touch_memory()
        note("verify", timed(lambda: require_intact(folder / "save")))
        forget(folder)
        touch_memory()
        note("load", timed(lambda: load_checkpoint(folder / "save", model, optimizer)))
    for case, seconds in times.items():
        yield case, first.bytes, seconds


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=None, help="folder with enough free space (default: a temporary one)"
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        cases = {
            case: (size, seconds)
            for case, size, seconds in measure(Path(folder), options.layers, options.rounds, options.tokens)
        }
    rows = []
    for case, (size, seconds) in cases.items():
        like = "read" if case in ("read", "verify", "load") else "write"
        p20, p50, p80 = (
            statistics.quantiles(seconds, n=10, method="inclusive")[i] if len(seconds) > 1 else seconds[0]
            for i in (1, 4, 7)
        )
        rows.append(
            {
                **stamp(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "load": round(load, 1),
                "rounds": len(seconds),
                "case": case,
                "gigabytes": round(size / 1e9, 3),
                "seconds_p20": round(p20, 3),
                "seconds_p50": round(p50, 3),
                "seconds_p80": round(p80, 3),
                "gigabytes_per_second": round(size / 1e9 / p50, 3),
                "of_disk": round(statistics.median(cases[like][1]) / p50, 3),
                "of_save": round(p50 / statistics.median(cases["save"][1]), 3),
            }
        )
        print("  ".join(f"{name} {value}" for name, value in list(rows[-1].items())[6:]))
    append("checkpoint", rows)


if __name__ == "__main__":
    main()
