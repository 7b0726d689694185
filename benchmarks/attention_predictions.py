"""Predict the attention kernels' speed from their listings, row by row of the table of tiles: no GPU is needed.

``python -m benchmarks.attention_predictions`` compiles each row of 16 bit for its chip and prints the table of
``docs/kernels.md``, to be compared with the figures of a GPU. Per full tile and multiprocessor, in cycles:

- matrix: products of the tile at the tensor cores' peak (2,048 operations a cycle on sm_80, 4,096 on sm_90);
- issue: instructions that are not matrix products, one a cycle on each of 4 schedulers;
- exponentials: 16 a cycle.

The share of the peak is ``matrix / (matrix + max(issue, exponentials))`` if nothing overlaps, and
``matrix / max(matrix, issue, exponentials)`` if everything does. Waits for memory and for barriers, and partial tiles,
are not counted.
"""

from __future__ import annotations

import torch

from megatron_align.kernels import PackedLayout
from megatron_align.kernels.packed_attention.autograd import attend
from megatron_align.kernels.packed_attention.tiles import Tile, choose_tiles
from megatron_align.kernels.packed_attention.tuned_tiles import TABLE
from tests.harness.compiled import SHARED_LIMIT, Built, Loop, compiling_for

# CUDA programming guide: 65,536 registers and 64 warps of a multiprocessor, in any chip of the table.
REGISTERS, WARPS, SCHEDULERS, EXPONENTIALS = 65_536, 64, 4, 16
OPERATIONS = {"sm_80": 2048, "sm_90": 4096}  # of 16 bit, dense, a cycle and multiprocessor
PRODUCTS = (2, 3, 4)  # of the forward, dq and dkdv kernels
HEADER = (
    "| chip, head dim | kernel | queries x keys, warps, stages | registers | shared KiB "
    "| blocks, warps a multiprocessor | matrix instructions | others | cycles matrix, issue, exponentials "
    "| share of peak |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def build(chip: str, head_dim: int) -> list[Built]:
    """Compile the three kernels of a row for all queries of a pack, with 8 query heads on 2 key heads."""
    layout = PackedLayout.from_lengths([256])
    shapes = [(256, 8, head_dim), *[(256, 2, head_dim)] * 2]
    tensors = [torch.zeros(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    with compiling_for(chip) as built:
        out = attend(*tensors, layout, head_dim**-0.5, choose_tiles(chip, head_dim, torch.bfloat16))
        out.backward(torch.ones_like(out))
    return built


def full_loop(built: Built) -> Loop:
    """Return the loop over full tiles: the one without mask code."""
    return min(built.loops, key=lambda loop: loop.other)


def row(built: Built, tile: Tile, head_dim: int, products: int) -> str:
    """Return the figures and predictions of one kernel as a line of the table."""
    loop = full_loop(built)
    blocks = min(
        REGISTERS // (-(-built.registers // 8) * 8 * built.warps * 32),
        WARPS // built.warps,
        SHARED_LIMIT[built.chip] // max(1, built.shared),
    )
    scores = tile.queries * tile.keys
    matrix = products * 2 * scores * head_dim / OPERATIONS[built.chip]
    issue = loop.other * built.warps / SCHEDULERS
    exponentials = scores / EXPONENTIALS
    alone = matrix / (matrix + max(issue, exponentials))
    together = matrix / max(matrix, issue, exponentials)
    return (
        f"| {built.chip}, {head_dim} | {built.name.removesuffix('_kernel')} "
        f"| {tile.queries} x {tile.keys}, {tile.warps}, {tile.stages} | {built.registers} | {built.shared / 1024:.0f} "
        f"| {blocks}, {blocks * built.warps} | {loop.matrix} | {loop.other} "
        f"| {matrix:.0f}, {issue:.0f}, {exponentials:.0f} | {alone:.0%} to {together:.0%} |\n"
    )


def table() -> str:
    """Return the table of all rows in bf16: fp16 has the same tiles and instructions."""
    rows = []
    for chip, head_dim in sorted({row[:2] for row in TABLE}):
        tiles = choose_tiles(chip, head_dim, torch.bfloat16)
        built = build(chip, head_dim)
        rows += [row(*each, head_dim, n) for *each, n in zip(built, tiles, PRODUCTS, strict=True)]
    return HEADER + "".join(rows)


if __name__ == "__main__":
    print(table(), end="")
