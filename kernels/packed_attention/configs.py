"""Which tile sizes a launch gets: a small table per (chip, head dim, dtype), and a safe row for everything else.

``table.py`` holds the table; ``benchmarks/tune_attention.py`` writes it. Nothing is tried out at start.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

import torch

from megatron_align.kernels.packed_attention.table import TABLE

_LOG = logging.getLogger(__name__)
LARGEST_HEAD_DIM = 256


class Tile(NamedTuple):
    """Block sizes and compiler options of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int  # of the software pipeline that loads tiles ahead


class Tiles(NamedTuple):
    """The three kernels' tiles."""

    forward: Tile
    dq: Tile
    dkdv: Tile


# Fit every chip from sm_80 on (99 KiB of shared memory on the smallest). WIDE: head dim over 128.
SAFE_16_BIT = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2))
SAFE_16_BIT_WIDE = Tiles(Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))
# Exact fp32 products run outside the tensor cores, from registers: tiles must be small.
SAFE_32_BIT = Tiles(Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1))
SAFE_32_BIT_WIDE = Tiles(Tile(16, 16, 8, 1), Tile(16, 16, 16, 1), Tile(16, 16, 8, 1))
# The interpreter's cost is per tile, whatever its size.
INTERPRETER = Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))


def padded(head_dim: int) -> int:
    """Return the power of two, at least 16, that holds ``head_dim``: what the kernels compute with."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def choose(chip: str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles for ``chip`` (``sm_90``); says so once where only the safe ones are known."""
    name = str(dtype).removeprefix("torch.")
    row = TABLE.get((chip, head_dim, name))
    if row is not None:
        return Tiles(*(Tile(*tile) for tile in row))
    _LOG.warning(
        "packed_attention: no tuned tiles for %s, head dim %d, %s; the safe ones are used "
        "(benchmarks/tune_attention.py finds better)",
        chip,
        head_dim,
        name,
    )
    narrow, wide = (SAFE_32_BIT, SAFE_32_BIT_WIDE) if dtype.itemsize > 2 else (SAFE_16_BIT, SAFE_16_BIT_WIDE)
    return narrow if head_dim <= 128 else wide


def chip_of(device: torch.device) -> str:
    """Return the compute capability as ``sm_90``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
