"""Plot the attention mask of a pack and the tiles that the attention kernels visit, as PNG.

``python -m examples.draw_layout --group 40 24 16 --group 0 30 --out layout.png``: each group is the length of a
prompt followed by those of its completions; a plain document has prompt 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_align.kernels.packed_attention import PackedLayout
from megatron_align.kernels.packed_attention.reference import visible_tiles_reference

COLOURS = ["#f4f4f2", "#f0b75a", "#2f6c8f"]  # not visited, visited with a mask, visited without
WORDS = ["not visited", "visited, masked", "visited, no mask needed"]


def draw(layout: PackedLayout, block: int, out: Path) -> None:
    """Plot ``layout`` with tiles of ``block`` x ``block`` tokens into ``out``."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    visited, full = visible_tiles_reference(layout, block, block)
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(layout.mask_QT(), cmap=ListedColormap([COLOURS[0], "#333333"]), interpolation="nearest")
    left.set_title(f"mask: {layout.tokens} tokens", fontsize=11)
    colours = ListedColormap(COLOURS)
    right.imshow(
        visited.int() + full.int() * visited.int(), cmap=colours, vmin=0, vmax=2, interpolation="nearest"
    )
    right.set_title(
        f"tiles of {block} x {block}: {int(visited.sum())} of {visited.numel()} visited, "
        f"{int((visited & ~full).sum())} masked",
        fontsize=11,
    )
    right.set_xticks([x - 0.5 for x in range(1, visited.shape[1])], minor=True)
    right.set_yticks([y - 0.5 for y in range(1, visited.shape[0])], minor=True)
    right.grid(which="minor", color="white", linewidth=1)
    right.tick_params(which="minor", length=0)
    for axes, unit in ((left, "token"), (right, "block")):
        axes.set_xlabel(f"key {unit}")
        axes.set_ylabel(f"query {unit}")
    figure.legend(
        handles=[
            Patch(facecolor=c, edgecolor="#999999", label=w) for c, w in zip(COLOURS, WORDS, strict=True)
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(out, dpi=110)


def main() -> None:
    """Run with command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", type=int, nargs="+", action="append", metavar="LENGTH")
    parser.add_argument("--padding", type=int, default=8)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("layout.png"))
    args = parser.parse_args()
    groups = [
        (lengths[0], lengths[1:]) for lengths in args.group or [[70, 30, 44], [0, 50], [24, 10, 10, 10]]
    ]
    used = sum(prompt + sum(completions) for prompt, completions in groups)
    draw(PackedLayout.from_groups(groups, total=used + args.padding), args.block, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
