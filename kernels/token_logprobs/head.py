"""The vocabulary projection as an engine sees it, and the checks of everything that callers hand in."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CHECKS = (
    "MEGATRON_ALIGN_CHECKS"  # environment: 1 checks values on the device too, at the price of synchronising
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Head:
    """This rank's rows of the projection, and what turns the projection into logits."""

    weight_VH: Tensor
    vocab_size: int  # over all ranks, without padding
    group: dist.ProcessGroup | None = None
    temperature: float = 1.0
    softcap: float | None = (
        None  # logits are bent to softcap * tanh(x / softcap), then divided by the temperature
    )

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """R."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def first(self) -> int:
        """Token of this rank's first row."""
        return self.rank * self.weight_VH.shape[0]

    @property
    def real(self) -> int:
        """Rows of this rank that count; those after them are padding."""
        return min(max(self.vocab_size - self.first, 0), self.weight_VH.shape[0])

    def local(self, targets_N: Tensor) -> Tensor:
        """Return each target's row here; outside ``[0, real)`` where another rank has it."""
        return targets_N - self.first

    def gathered(self, mine: Tensor) -> Tensor:
        """Return ``[R, *mine.shape]``: everyone's tensor of this shape."""
        everyone = mine.new_empty(self.ranks * mine.shape[0], *mine.shape[1:])
        dist.all_gather_into_tensor(everyone, mine.contiguous(), group=self.group)
        return everyone.unflatten(0, (self.ranks, mine.shape[0]))


def open_head(  # noqa: PLR0913  # the options of the public functions
    hidden_NH: Tensor,
    weight_VH: Tensor,
    targets_N: Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int | None,
) -> Head:
    """Check what was handed in and return the head.

    Raises:
        ValueError: on shapes, dtypes or options that do not fit; on CPU also for targets outside the vocabulary.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        shapes = f"{tuple(hidden_NH.shape)} and {tuple(weight_VH.shape)}"
        raise ValueError(f"log-probs need hidden [N, H] and weight [V, H]; got {shapes}")
    if hidden_NH.dtype != weight_VH.dtype:
        raise ValueError(f"log-probs need one dtype; got hidden {hidden_NH.dtype}, weight {weight_VH.dtype}")
    if targets_N.shape != hidden_NH.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(
            f"log-probs need int64 targets [N = {hidden_NH.shape[0]}]; got {targets_N.dtype} "
            f"{tuple(targets_N.shape)}"
        )
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"log-probs need {name} > 0; got {value}")
    rows = weight_VH.shape[0] * ranks
    vocab_size = rows if vocab_size is None else vocab_size
    if not 0 < vocab_size <= rows:
        raise ValueError(f"log-probs need 0 < vocab_size <= {rows} rows over {ranks} ranks; got {vocab_size}")
    head = Head(
        weight_VH=weight_VH, vocab_size=vocab_size, group=group, temperature=temperature, softcap=softcap
    )
    _check_values(hidden_NH, targets_N, head)
    return head


def _check_values(hidden_NH: Tensor, targets_N: Tensor, head: Head) -> None:
    """Look at numbers: targets where that costs nothing (CPU), the rest only when ``CHECKS`` asks for it."""
    asked = os.environ.get(CHECKS) == "1"
    if (asked or targets_N.device.type == "cpu") and targets_N.numel():
        low, high = targets_N.aminmax()
        if low < 0 or high >= head.vocab_size:
            raise ValueError(
                f"log-probs need targets in [0, {head.vocab_size}); got {low.item()} to {high.item()}"
            )
    if asked:
        wrong = (~hidden_NH.isfinite().all(1)).nonzero()
        if len(wrong):
            raise ValueError(f"log-probs need finite hidden states; row {wrong[0].item()} is not")
    if asked and head.ranks > 1:
        rows: list[int] = [0] * head.ranks
        dist.all_gather_object(rows, head.weight_VH.shape[0], group=head.group)
        if len(set(rows)) > 1:
            raise ValueError(
                f"log-probs need as many vocabulary rows on every rank, so a group size that divides the padded "
                f"vocabulary; got {rows}"
            )


def check_slabs(slabs: Sequence[tuple[int, int]], rows: int) -> None:
    """Check that slabs cover all rows, one after the other.

    Raises:
        ValueError: naming the first slab that does not start where the one before it stopped.
    """
    at = 0
    for i, (start, stop) in enumerate(slabs):
        if start != at or stop < start:
            raise ValueError(
                f"slab {i} needs to start at row {at} and not to stop before; got {start} to {stop}"
            )
        at = stop
    if at != rows:
        raise ValueError(f"slabs need to cover N = {rows} rows; they cover {at}")
