"""The feed-forward network of a layer: megatron-core's linear layers around our SwiGLU."""

from __future__ import annotations

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_align.kernels import swiglu


class FeedForward(MLP):
    """megatron-core's MLP, which saves two tensors of the network's width for backward: the projection, the product.

    megatron-core's own saves three more: silu(gate), and up a second time as it adds 0 to it. Its fused version is
    compiled by ``torch.compile`` at the first step.
    """

    def forward(
        self, hidden_states: Tensor, per_token_scale: None = None, **unused: object
    ) -> tuple[Tensor, None]:
        """Return the output ``[T, 1, H]`` of ``[T, 1, H]``; there is no bias."""
        gate_up, _ = self.linear_fc1(hidden_states)
        output, _ = self.linear_fc2(swiglu(gate_up))
        return output, None
