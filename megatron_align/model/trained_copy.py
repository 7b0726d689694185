"""A complete copy of a module's weight that an adapter trains: PEFT's ``modules_to_save``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TrainedCopy(nn.Module):
    """The trained copy of the weight of an embedding, an output head or a norm, sharded as the weight is.

    It is the module's ``adapter``, and used in place of the weight, which stays as it is.

    Args:
        module: whose weight is copied by :meth:`start`.

    Attributes:
        enabled: whether the copy is used; off, the model is the base, bit for bit.
    """

    weight: nn.Parameter

    def __init__(self, module: nn.Module):
        super().__init__()
        self._module = [module]  # in a list, as it is no module of this one
        self.enabled = True
        own = module.get_parameter("weight")
        self.weight = nn.Parameter(torch.empty_like(own, requires_grad=False))
        vars(self.weight).update(vars(own))  # megatron-core's: how it is sharded, and what sums its gradient

    def forward(self) -> Tensor:
        """Return the copy. A call, as megatron-core's hooks then wait for a copy that is still being gathered."""
        return self.weight

    @torch.no_grad()
    def start(self) -> None:
        """Set the copy to the module's weight."""
        self.weight.copy_(self._module[0].get_parameter("weight"))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute with the base's weight inside a with-block."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight of the merged model: the copy."""
        return self.weight


def weight_in_use(module: nn.Module) -> Tensor:
    """Return a module's weight, or the trained copy of it unless that is off."""
    copy = getattr(module, "adapter", None)
    if isinstance(copy, TrainedCopy) and copy.enabled:
        return copy()
    return module.weight  # type: ignore[return-value]  # a parameter
