"""SHA-256 and NaN/inf counts of tensors that are streamed block by block."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_align.errors import InputError

SHOWN = 10  # tensors named in a message
Counts = tuple[int, int]  # NaN, infinite


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """``sha256`` is of the bytes as safetensors stores them: little-endian, row-major."""

    sha256: str
    nan: int = 0
    inf: int = 0

    @property
    def finite(self) -> bool:
        return not self.nan + self.inf

    def __str__(self) -> str:
        counts = {"NaN": self.nan, "infinite": self.inf}
        return " and ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "all finite"


class RunningDigest:
    """Compute the digest of one tensor from its blocks, added in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._nan = self._inf = 0

    def add(self, block: Tensor) -> None:
        """Add a one-dimensional block in CPU memory."""
        self._hash.update(memoryview(block.view(torch.uint8).numpy()))
        nan, inf = count_nonfinite(block)
        self._nan += nan
        self._inf += inf

    def result(self) -> TensorDigest:
        """Return the digest of the blocks added so far."""
        return TensorDigest(self._hash.hexdigest(), self._nan, self._inf)


def count_nonfinite(tensor: Tensor) -> Counts:
    """Return how many elements are NaN and how many are infinite."""
    # One fast pass over the extremes shows whether anything needs counting: NaN wins in both.
    if not tensor.numel() or all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        return 0, 0
    return int(tensor.isnan().sum()), int(tensor.isinf().sum())


def model_sha256(tensors: Mapping[str, TensorDigest]) -> str:
    """Return one hash over all tensors' names and hashes, independent of how they are split into files."""
    lines = "".join(f"{name} {digest.sha256}\n" for name, digest in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def add_counts(totals: dict[str, Counts], name: str, counts: Counts) -> None:
    """Add to a tensor's numbers of NaN and infinite elements."""
    nan, inf = totals.get(name, (0, 0))
    totals[name] = nan + counts[0], inf + counts[1]


def describe_nonfinite(tensors: Mapping[str, TensorDigest]) -> str | None:
    """Name the tensors that are not finite, with their numbers of NaN and infinite elements; None: there is none."""
    nonfinite = [f"{name} holds {digest}" for name, digest in tensors.items() if not digest.finite]
    more = f"; and {len(nonfinite) - SHOWN} more tensors" if len(nonfinite) > SHOWN else ""
    return f"{'; '.join(nonfinite[:SHOWN])}{more}" if nonfinite else None


def require_finite(tensors: Mapping[str, TensorDigest], source: object) -> None:
    """Refuse weights that are not finite; ``source`` is the folder they were read from.

    Raises:
        InputError: naming such tensors with their numbers of NaN and infinite elements.
    """
    if nonfinite := describe_nonfinite(tensors):
        raise InputError(f"weights must be finite: {nonfinite} in {source}")
