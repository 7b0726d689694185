"""This rank's shard of the vocabulary projection, and the validation of a call's arguments."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align.kernels.token_logprobs.options import GradientOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Environment variable: 1 also validates values on the device, at the price of a synchronisation.
CHECKS = "MEGATRON_ALIGN_CHECKS"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VocabShard:
    """This rank's rows of the projection and the options of a call (``options.py`` describes them)."""

    weight_VH: Tensor
    group: dist.ProcessGroup | None = None
    vocab_size: int | None = None
    temperature: float = 1.0
    softcap: float | None = None
    sum_hidden_grad: bool = True

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """R, the number of vocab-parallel ranks."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def tokens(self) -> int:
        """Size of the vocabulary over all ranks, without padding."""
        return self.weight_VH.shape[0] * self.ranks if self.vocab_size is None else self.vocab_size

    @property
    def first_token(self) -> int:
        """Token id of this rank's first row."""
        return self.rank * self.weight_VH.shape[0]

    @property
    def real_rows(self) -> int:
        """Rows of this rank that are tokens; the rows after them are padding."""
        return min(max(self.tokens - self.first_token, 0), self.weight_VH.shape[0])

    @property
    def hidden_grad_group(self) -> dist.ProcessGroup | None:
        """Ranks over which the gradient of the hidden states is summed; None: no sum here."""
        return self.group if self.sum_hidden_grad and self.ranks > 1 else None

    def local_targets(self, targets_N: Tensor) -> Tensor:
        """Return the row of each target in this shard; outside ``[0, real_rows)`` where another rank holds it."""
        return targets_N - self.first_token

    def all_gather(self, local: Tensor) -> Tensor:
        """Gather a tensor of the same shape from all ranks: ``[R, *local.shape]``."""
        gathered = local.new_empty(self.ranks * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        return gathered.unflatten(0, (self.ranks, local.shape[0]))


def open_shard(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, **options: Unpack[GradientOptions]
) -> VocabShard:
    """Validate the arguments of a public function and return the shard.

    Raises:
        ValueError: on shapes, dtypes or options that do not fit; on CPU also for targets outside the vocabulary.
    """
    shard = VocabShard(weight_VH=weight_VH, **options)
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
    for name, value in (("temperature", shard.temperature), ("softcap", shard.softcap)):
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"log-probs need {name} > 0; got {value}")
    rows = weight_VH.shape[0] * shard.ranks
    if not 0 < shard.tokens <= rows:
        raise ValueError(
            f"log-probs need 0 < vocab_size <= {rows} rows over {shard.ranks} ranks; got {shard.tokens}"
        )
    _check_values(hidden_NH, targets_N, shard)
    return shard


def _check_values(hidden_NH: Tensor, targets_N: Tensor, shard: VocabShard) -> None:
    """Check values: targets where that is free (on CPU), everything else only if ``CHECKS`` is set."""
    check_all = os.environ.get(CHECKS) == "1"
    if (check_all or targets_N.device.type == "cpu") and targets_N.numel():
        low, high = targets_N.aminmax()
        if low < 0 or high >= shard.tokens:
            raise ValueError(
                f"log-probs need targets in [0, {shard.tokens}); got {low.item()} to {high.item()}"
            )
    if check_all:
        nonfinite = (~hidden_NH.isfinite().all(1)).nonzero()
        if len(nonfinite):
            raise ValueError(f"log-probs need finite hidden states; row {nonfinite[0].item()} is not")
    if check_all and shard.ranks > 1:
        rows: list[int] = [0] * shard.ranks
        dist.all_gather_object(rows, shard.weight_VH.shape[0], group=shard.group)
        if len(set(rows)) > 1:
            raise ValueError(
                f"log-probs need the same number of vocabulary rows on every rank, so a group size that divides the "
                f"padded vocabulary; got {rows}"
            )
