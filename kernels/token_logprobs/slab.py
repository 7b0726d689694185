"""A slab: the run of rows whose logits exist at one time, in one reused buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_align.kernels.token_logprobs.vocab_shard import VocabShard

# Bytes of one slab of logits. A GPU's holds about 4,096 rows of a real vocabulary in bf16, enough to keep the GEMMs
# efficient and dW's read-modify-write rare. A CPU's GEMMs need fewer rows, and tests share its memory.
SLAB_BYTES = {"cpu": 2**27, "cuda": 2**30}
TEMPORARY_ELEMENTS = 2**20  # elements that the PyTorch passes allocate in addition to the slab


def slab_rows(weight_VH: Tensor) -> int:
    """Return the maximum number of rows of one slab of logits; a multiple of 128 if it is larger than that."""
    rows = max(1, SLAB_BYTES[weight_VH.device.type] // (weight_VH.shape[0] * weight_VH.element_size()))
    return rows if rows < 128 else rows - rows % 128


def chunks(start: int, stop: int, most: int) -> list[slice]:
    """Cut rows ``[start, stop)`` into chunks of at most ``most`` rows; at least one chunk, possibly empty."""
    return [slice(at, min(at + most, stop)) for at in range(start, stop, most)] or [slice(start, stop)]


class Slab:
    """A buffer of logits, reused for every slab and chunk of one call."""

    def __init__(self, shard: VocabShard, rows: int):
        self.shard = shard
        self._logits = shard.weight_VH.new_empty(rows, shard.weight_VH.shape[0])

    def project(self, hidden_nH: Tensor) -> Tensor:
        """Fill the buffer with ``hidden @ weight.T`` and return the rows in use, ``[n, V]``."""
        out_nV = self._logits[: hidden_nH.shape[0]]
        return torch.mm(hidden_nH, self.shard.weight_VH.T, out=out_nV)
