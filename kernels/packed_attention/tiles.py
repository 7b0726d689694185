"""Tile sizes of a launch: a table per (chip, head dim, dtype), and safe sizes for everything else. No autotuning.

``tuned_tiles.py`` is the table; ``benchmarks/tune_attention.py`` writes it.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

import torch

from megatron_align.kernels.packed_attention.tuned_tiles import TABLE

_LOG = logging.getLogger(__name__)
LARGEST_HEAD_DIM = 256


class Tile(NamedTuple):
    """Block sizes and compiler options of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int  # of the software pipeline that prefetches tiles


class Tiles(NamedTuple):
    """The tiles of the three kernels."""

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


def padded_head_dim(head_dim: int) -> int:
    """Return ``head_dim`` rounded up to a power of two, at least 16: the width that the kernels compute with."""
    return max(16, 1 << (head_dim - 1).bit_length())


@cache
def choose_tiles(chip: str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles for ``chip`` (``sm_90``); logs one warning if only safe ones are available."""
    name = str(dtype).removeprefix("torch.")
    row = TABLE.get((chip, head_dim, name))
    if row is not None:
        return Tiles(*(Tile(*tile) for tile in row))
    _LOG.warning(
        "packed_attention: no tuned tiles for %s, head dim %d, %s; using safe ones "
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
