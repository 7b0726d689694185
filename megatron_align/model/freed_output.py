"""Free the output of a function until backward, which computes it again.

megatron-core's ``CheckpointWithoutOutput`` does the same for functions that draw random numbers. From 0.17 on it
compiles a C++ extension at the first backward, on every node; this one needs no compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FreedOutput:
    """One call of a function of one tensor, whose output is freed after use and recomputed in backward.

    The function must draw no random numbers. Gradients of parameters that it reads are accumulated as usual.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self._context: Any = None  # of the call, in which autograd keeps the input until backward
        self._input: Tensor | None = None  # detached, between recomputation and backward
        self._output: Tensor | None = None
        self._recomputed: Tensor | None = None  # with its graph, between recomputation and backward

    def run(self, x: Tensor) -> Tensor:
        """Return the function's output; backward computes it again."""
        output: Tensor = _Run.apply(x, self)
        self._output = output
        return output

    def free(self, user: Tensor) -> None:
        """Free the output; it is recomputed in backward once the gradient of ``user`` is computed."""
        assert self._output is not None, "run comes first"
        self._output.untyped_storage().resize_(0)
        if user.requires_grad:
            user.register_hook(self._recompute)

    def _recompute(self, gradient: Tensor) -> None:
        if self._output is None:
            return  # done before: ``user`` is saved for backward by several operations
        (x,) = self._context.saved_tensors
        self._input = x.detach().requires_grad_(x.requires_grad)
        with torch.enable_grad():
            self._recomputed = self._function(self._input)
        with torch.no_grad():
            # Below the tensor: operations that saved a view of the output see the values, and no version changes.
            storage, source = self._output.untyped_storage(), self._recomputed.untyped_storage()
            storage.resize_(source.size())
            storage.copy_(source)
        self._output = None

    def _backward(self, gradient: Tensor) -> Tensor | None:
        if self._recomputed is None:
            self._recompute(gradient)
        assert self._recomputed is not None, "recomputed above"
        assert self._input is not None, "set by the recomputation"
        torch.autograd.backward(self._recomputed, gradient)
        result = self._input.grad
        self._context = self._input = self._recomputed = None
        return result


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: FreedOutput) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call, call._context = call, ctx
        return call._function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return ctx.call._backward(*gradients), None
