"""What is worth knowing of a tensor that passes by: its hash, and how many of its numbers are not finite."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_align.errors import InputError


@dataclass(frozen=True, slots=True)
class Facts:
    """``sha256`` is of the bytes as safetensors stores them: little-endian, rows in order."""

    sha256: str
    nan: int = 0
    inf: int = 0

    @property
    def finite(self) -> bool:
        return not self.nan + self.inf

    def __str__(self) -> str:
        counts = {"NaN": self.nan, "infinite": self.inf}
        return " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count) or "all finite"


class Digest:
    """Gathers the facts of one tensor from its stretches, given in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._nan = self._inf = 0

    def add(self, part: Tensor) -> None:
        """Take a one-dimensional stretch in CPU memory."""
        self._hash.update(memoryview(part.view(torch.uint8).numpy()))
        nan, inf = count_nonfinite(part)
        self._nan += nan
        self._inf += inf

    def facts(self) -> Facts:
        """Return what was found."""
        return Facts(self._hash.hexdigest(), self._nan, self._inf)


def count_nonfinite(tensor: Tensor) -> tuple[int, int]:
    """Return how many numbers are NaN and how many are infinite."""
    # The extremes show in one fast pass whether anything is to be counted: NaN wins in both.
    if not tensor.numel() or all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        return 0, 0
    return int(tensor.isnan().sum()), int(tensor.isinf().sum())


def model_sha256(tensors: Mapping[str, Facts]) -> str:
    """Return one hash of all tensors' names and hashes, whatever files they lie in."""
    lines = "".join(f"{name} {facts.sha256}\n" for name, facts in sorted(tensors.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def require_finite(tensors: Mapping[str, Facts], place: object) -> None:
    """Refuse weights that are not finite.

    Raises:
        InputError: naming every such tensor and how many of its numbers are NaN and infinite.
    """
    if spoilt := [f"{name} holds {facts}" for name, facts in tensors.items() if not facts.finite]:
        raise InputError(f"the weights must be finite: {'; '.join(spoilt)} in {place}")
