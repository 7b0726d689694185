"""megatron-core's column- and row-parallel linear layers, to whose output an adapter may be added."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

ADAPTER = ".adapter."  # part of the name of every parameter of an adapter


class ColumnLinear(ColumnParallelLinear):
    """megatron-core's column-parallel linear layer, to whose output an adapter may be added."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output ``[T, 1, O]``, and the bias if it is left to the caller."""
        output, bias = super().forward(input_, *args, **kwargs)
        if self.adapter is not None and self.adapter.enabled:
            output = self.adapter(input_, output)
        return output, bias


class RowLinear(RowParallelLinear):
    """megatron-core's row-parallel linear layer, to whose output an adapter may be added."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_module("adapter", None)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output ``[T or s, 1, O]``, and the bias if it is left to the caller."""
        output, bias = super().forward(input_)
        if self.adapter is not None and self.adapter.enabled:
            output = self.adapter(input_, output)
        return output, bias


def without_adapter(state: dict[str, Any]) -> dict[str, Any]:
    """Return a sharded state without the tensors of adapters."""
    return {name: value for name, value in state.items() if ADAPTER not in name}
