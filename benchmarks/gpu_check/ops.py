"""Attention and the log-prob engine against their peers, by ``benchmarks.gpu_attention`` and ``gpu_logprobs``.

Fewer rounds and cases than there. Every row is written as soon as its case is measured.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from benchmarks.gpu_check.step import Context, context

if TYPE_CHECKING:
    from benchmarks.gpu_attention import Case

ROUNDS = 10
# The most telling first: time may run out.
ATTENTION = ("4x4k", "3 pairs P4096 2x512", "1x16k", "16x1k", "mixed 16k")


def _tiny_cases() -> dict[str, Case]:
    from benchmarks.gpu_attention import Case
    from megatron_align.kernels import PackedLayout

    size = {"heads": 4, "groups": 2, "head_dim": 32}
    return {
        "2x64": Case(layout=PackedLayout.from_lengths([64, 64]), **size),
        "1 pair P64 2x16": Case(layout=PackedLayout.from_groups([(64, [16, 16])]), **size),
    }


def attention(ours: Context) -> None:
    """Write a row for each case, contestant and pass."""
    from benchmarks.gpu import yardstick
    from benchmarks.gpu_attention import CASES, measure, require_correct

    cases = _tiny_cases() if ours.tiny else {name: CASES[name] for name in ATTENTION}
    if not ours.tiny:
        require_correct(128)
    gemm = yardstick(256 if ours.tiny else 8192)
    ours.results.row("attention", "gemm", tflops=gemm)
    for name, case in cases.items():
        for row in measure(name, case, 2 if ours.tiny else ROUNDS, gemm, {}):
            ours.results.row("attention", "figure", **row)


def logprobs(ours: Context) -> None:
    """Write a row for each contestant."""
    from benchmarks.gpu_logprobs import Sizes, gate, measure

    sizes = Sizes(samples=ROUNDS, lengths=(16384, 65536))
    if ours.tiny:
        tiny = {"rows": 256, "hidden": 64, "vocab": 1024, "pair_rows": 64, "samples": 2}
        sizes = Sizes(**tiny, lengths=(), compiled=False)
    else:
        gate()
    for row in measure(sizes):
        ours.results.row("logprobs", "figure", **row)


if __name__ == "__main__":
    ours = context("attention", "logprobs")
    sys.exit({"attention": attention, "logprobs": logprobs}[ours.what](ours))
