"""Shared parts of the GPU benchmarks: description of the GPU, interleaved timing, the cuBLAS yardstick."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable

from benchmarks.rows import stamp


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """Exit with one line unless a CUDA GPU is visible."""
    import torch

    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: needs a CUDA GPU; torch {torch.__version__} sees none here\n")


def device() -> str:
    """Return the device that is measured: the GPU; without one the CPU, on which only ``gpu_check`` runs."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def environment() -> dict[str, str]:
    """Return the columns that say when and on what a row was measured."""
    import torch
    import triton

    clock = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    ).stdout
    return {
        **stamp(torch.cuda.get_device_name()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sm_clock_and_power": clock.strip().splitlines()[0] if clock.strip() else "unknown",
    }


def interleaved(runs: dict[str, Callable[[], object]], rounds: int = 30) -> dict[str, list[float]]:
    """Time runs alternately (A B A B ...) after warm-up, in ms, on a GPU with its L2 cache flushed before each."""
    import torch

    if device() == "cpu":
        return _interleaved_on_cpu(runs, rounds)
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop))
    return times


def _interleaved_on_cpu(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) * 1e3)
    return {name: each[1:] for name, each in times.items()}


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80."""
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def yardstick(size: int = 8192) -> float:
    """Return the TFLOP/s of a bf16 product of ``size`` x ``size`` x ``size`` on this device now."""
    import torch

    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device())
    [times] = interleaved({"gemm": lambda: a @ b}, 10).values()
    return 2 * size**3 / quantiles(times)[1] / 1e9
