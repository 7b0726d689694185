"""Find the fastest tiles of the attention kernels on this GPU, and write them into ``packed_attention/tuned_tiles.py``.

``python -m benchmarks.tune_attention`` tries the candidates below on the benchmark's mixed pack of 16k tokens, forward
and backward separately, checks each against the safe tiles' result, and replaces this chip's rows. Run it on an idle
GPU; commit the table with the output as the reason.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch

from benchmarks.gpu import environment, interleaved, quantiles, require_gpu
from benchmarks.gpu_attention import MIXED, inputs
from megatron_align.kernels import PackedLayout
from megatron_align.kernels.packed_attention import tiles as tile_sizes
from megatron_align.kernels.packed_attention.tiles import Tile, Tiles
from megatron_align.kernels.packed_attention.tuned_tiles import TABLE

FILE = Path(tile_sizes.__file__).with_name("tuned_tiles.py")
CANDIDATES = [
    Tile(*sizes)
    for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    if sizes[0] * sizes[1] >= 2048 * sizes[2] // 4
]
KINDS = ("forward", "dq", "dkdv")


def render(table: dict, note: str) -> str:
    """Return the source of ``tuned_tiles.py``."""
    rows = "".join(
        f'    ("{chip}", {head_dim}, "{dtype}"): {tiles},\n'
        for (chip, head_dim, dtype), tiles in sorted(table.items())
    )
    return (
        f'"""Tile sizes, written by benchmarks/tune_attention.py. {note}\n\n'
        "(chip, head dim, dtype): (queries, keys, warps, stages) of the forward, dq and dkdv kernels.\n"
        f'"""\n\nTABLE = {{\n{rows}}}\n'
    )


def best(kind: str, tiles: Tiles, head_dim: int, rounds: int) -> Tile:
    """Return the fastest correct candidate of one kernel; the other kernels use ``tiles``."""
    # Imported here: this module is also imported without Triton.
    from triton.runtime.errors import OutOfResources

    from megatron_align.kernels.packed_attention.autograd import attend

    layout = PackedLayout.from_lengths(MIXED).to("cuda")
    tensors = inputs(layout.tokens, head_dim)
    grad = torch.randn_like(tensors[0])

    def run(tile: Tile):
        out = attend(*tensors, layout, head_dim**-0.5, tiles._replace(**{kind: tile}))
        return [out] if kind == "forward" else [out, *torch.autograd.grad(out, tensors, grad)]

    truth, runs = run(getattr(tiles, kind)), {}
    for tile in CANDIDATES:
        try:
            got = run(tile)
        except OutOfResources as error:
            print(f"{kind} {tuple(tile)}: {error}")
            continue
        worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, truth, strict=True))
        if worst < 2 * torch.finfo(torch.bfloat16).eps:
            runs[tile] = lambda tile=tile: run(tile)
        else:
            print(f"{kind} {tuple(tile)}: wrong by {worst:.1e}, excluded")
    times = {tile: quantiles(each)[1] for tile, each in interleaved(runs, rounds).items()}
    for tile, ms in sorted(times.items(), key=lambda item: item[1]):
        print(f"{kind} {tuple(tile)}: {ms:.3f} ms")
    return min(times, key=times.__getitem__)


def main() -> None:
    """Tune and rewrite the table."""
    parser = argparse.ArgumentParser(
        prog="tune_attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    args = parser.parse_args()
    require_gpu(parser)
    chip, where, table = tile_sizes.chip_of(torch.device("cuda")), environment(), dict(TABLE)
    for head_dim in args.head_dim:
        tiles = tile_sizes.SAFE_16_BIT
        for kind in KINDS:
            tiles = tiles._replace(**{kind: best(kind, tiles, head_dim, args.rounds)})
        for dtype in ("bfloat16", "float16"):
            table[chip, head_dim, dtype] = tuple(map(tuple, tiles))
    note = f"{chip}: {where['machine']}, {where['date']}, triton {where['triton']}."
    FILE.write_text(render(table, note), encoding="utf-8")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
