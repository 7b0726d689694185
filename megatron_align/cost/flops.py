"""Floating-point operations (FLOPs) of a step: matrix products only, a multiply-add counts as two.

Attention is counted by the keys each token attends to, not by the square of the pack. There are two counts per step:
``model``, what the mathematics requires (the usual numerator of MFU: forward, and twice that for backward, without
padding or recomputation), and ``executed``, which adds padding, recomputation and the attention scores of backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_align.cost.placement import Placement
from megatron_align.model.families import ModelShape, padded_vocab

# Backward over forward. A product y = x w has two gradients of the same size; attention's forward has two products,
# its backward recomputes the scores and then has four (arXiv:2307.08691).
LINEAR_BACKWARD = 2.0
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, slots=True)
class Forward:
    """FLOPs of one forward pass, over all ranks."""

    layers: int  # linear products of the layers
    mlp: int  # the part of ``layers`` in the MLPs
    attention: int
    head: int

    @property
    def total(self) -> int:
        """Sum over layers, attention and head."""
        return self.layers + self.attention + self.head


def layer_flops(shape: ModelShape) -> int:
    """Return the FLOPs of one layer's linear products per token."""
    heads = (2 * shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim  # q, output; k, v
    return 2 * shape.hidden_size * heads + mlp_flops(shape)


def mlp_flops(shape: ModelShape) -> int:
    """Return the FLOPs of one layer's MLP per token."""
    return 2 * shape.hidden_size * 3 * shape.ffn_size


def attention_flops(shape: ModelShape, visible_keys: int) -> int:
    """Return the forward FLOPs of one layer's attention.

    Args:
        shape: model dimensions.
        visible_keys: number of (query, key) pairs that the mask allows, each token's pair with itself included.
    """
    return 4 * visible_keys * shape.num_heads * shape.head_dim


def head_flops(shape: ModelShape, scored: int, vocabulary: int | None = None) -> int:
    """Return the forward FLOPs of the head, which projects scored rows only.

    Args:
        shape: model dimensions.
        scored: number of scored rows; completions for a reward model.
        vocabulary: number of columns, padding included. Default: the vocabulary without padding.
    """
    columns = 1 if shape.is_reward else vocabulary or shape.vocab_size
    return 2 * scored * shape.hidden_size * columns


def forward_flops(
    shape: ModelShape, tokens: int, visible_keys: int, scored: int, *, vocabulary: int | None = None
) -> Forward:
    """Return the FLOPs of a forward pass over ``tokens`` tokens."""
    return Forward(
        layers=shape.num_layers * layer_flops(shape) * tokens,
        mlp=shape.num_layers * mlp_flops(shape) * tokens,
        attention=shape.num_layers * attention_flops(shape, visible_keys),
        head=head_flops(shape, scored, vocabulary),
    )


def model_flops(forward: Forward) -> float:
    """Return the FLOPs a training step requires: forward, and twice that for backward."""
    return 3.0 * forward.total


def executed_flops(placement: Placement, forward: Forward) -> float:
    """Return the FLOPs a training step executes.

    A pair or sample with more scored rows than one slab of logits is projected once more, which is not counted.

    Args:
        placement: model and layout, with its recomputation.
        forward: FLOPs over all computed tokens, padding included.
    """
    return layers_executed(placement, forward) + (1 + LINEAR_BACKWARD) * forward.head


def layers_executed(placement: Placement, forward: Forward) -> float:
    """Return the FLOPs a training step executes in the layers, without the head."""
    again = forward.layers if placement.recompute_layers else placement.runs_again("mlp") * forward.mlp
    attention = (1 + placement.runs_again("attention") + ATTENTION_BACKWARD) * forward.attention
    return (1 + LINEAR_BACKWARD) * forward.layers + again + attention


def padded_vocabulary(placement: Placement) -> int:
    """Return the vocabulary size with padding."""
    return padded_vocab(placement.shape.vocab_size, placement.parallel.tensor)
