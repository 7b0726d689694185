"""Helpers shared by import and export: block size, torch on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BLOCK_BYTES = 64 << 20  # of a tensor that is streamed


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch's operations on the calling thread only, also on threads that are started in the with-block.

    Operations on a block are short and frequent: in between, OpenMP's idle threads spin on the cores that read, hash
    and write. Of 11 s of processor time for an export of 4.3 GB, they took three.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
