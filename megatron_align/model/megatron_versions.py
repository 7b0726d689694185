"""Differences between the supported releases of megatron-core, 0.16.1 to 0.19; all other code is the same for all.

Each difference is recognised by what the installed release has, not by its number.
``tests/model/test_megatron_versions.py`` lists what we override, patch or use by a private name, and fails where an
installed release no longer has it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor


class _MergingBlock(TransformerBlock):
    """The block of 0.16 and 0.17, with merged layers that need not divide its layers."""

    def _checkpointed_forward(
        self, hidden_states: Tensor, packed_seq_params: Any, **unused: object
    ) -> Tensor:
        merged = self.config.recompute_num_layers
        for first in range(0, len(self.layers), merged):
            run = partial(self._run, range(first, min(first + merged, len(self.layers))), packed_seq_params)
            hidden_states = checkpoint(run, self.config.distribute_saved_activations, hidden_states)
        return hidden_states

    def _run(self, layers: range, pack: Any, hidden: Tensor) -> Tensor:
        for i in layers:
            hidden, _ = self.layers[i](hidden, attention_mask=None, packed_seq_params=pack)
        return hidden


# From 0.18 on ``megatron.core.recompute`` merges any number of layers, and the method is gone.
Block: type[TransformerBlock] = (
    _MergingBlock if hasattr(TransformerBlock, "_checkpointed_forward") else TransformerBlock
)


def grads_for_norm(optimizer: DistributedOptimizer) -> list[Tensor]:
    """Return the gradients that this rank counts in the global norm: each element of the model on one rank."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):  # from 0.19 on
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()
