"""The activation of a layer's feed-forward network: our SwiGLU between megatron-core's linear layers."""

from __future__ import annotations

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_align.kernels import swiglu


class SwiGLU(MegatronModule):
    """``silu(gate) * up``, for which backward keeps two tensors of the network's width: the projection, the product.

    megatron-core's own keeps three more: silu(gate), and up a second time as it adds 0 to it. Its fused version is
    compiled by ``torch.compile`` at the first step. megatron-core builds this module in the place where Transformer
    Engine's activations go, and applies it to the joined projection (``use_te_activation_func``).
    """

    def forward(self, gate_up: Tensor) -> Tensor:
        """Return ``[T, 1, F]`` of gate and up, ``[T, 1, 2 F]``."""
        return swiglu(gate_up)
