"""Floating-point operations of a step: matrix products only, a multiply and an add being two.

Attention is counted by what its layout lets each token see, not by the square of the pack. Two numbers per step:
``model``, what the mathematics needs (the usual numerator of MFU: forward and twice that backward, no padding, nothing
twice), and ``executed``, what is run: padding, recomputation, attention's scores made again in backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_align.cost.placement import Placement
from megatron_align.model.families import ModelShape, padded_vocab

# Backward over forward. A product y = x w has two gradients of the same size; attention's forward has two products,
# its backward makes the scores again and then has four (arXiv:2307.08691).
LINEAR_BACKWARD = 2.0
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, slots=True)
class Forward:
    """Operations of one forward pass, over all ranks."""

    layers: int  # linear products of the layers
    mlp: int  # of them the MLPs'
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.layers + self.attention + self.head


def layer_flops(shape: ModelShape) -> int:
    """Return the operations of one layer's linear products for one token."""
    heads = (2 * shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim  # q, output; k, v
    return 2 * shape.hidden_size * heads + mlp_flops(shape)


def mlp_flops(shape: ModelShape) -> int:
    """Return those of one layer's MLP."""
    return 2 * shape.hidden_size * 3 * shape.ffn_size


def attention_flops(shape: ModelShape, visible_keys: int) -> int:
    """Return the operations of one layer's attention, forward.

    Args:
        shape: of the model.
        visible_keys: pairs of a token and a token that it sees (itself among them).
    """
    return 4 * visible_keys * shape.num_heads * shape.head_dim


def head_flops(shape: ModelShape, scored: int, vocabulary: int | None = None) -> int:
    """Return the operations of the head, forward: only scored rows meet the vocabulary.

    Args:
        shape: of the model.
        scored: rows; for a reward model completions.
        vocabulary: columns, padding included. Default: without.
    """
    columns = 1 if shape.is_reward else vocabulary or shape.vocab_size
    return 2 * scored * shape.hidden_size * columns


def forward_flops(
    shape: ModelShape, tokens: int, visible_keys: int, scored: int, *, vocabulary: int | None = None
) -> Forward:
    """Return the operations of a forward pass over ``tokens``."""
    return Forward(
        layers=shape.num_layers * layer_flops(shape) * tokens,
        mlp=shape.num_layers * mlp_flops(shape) * tokens,
        attention=shape.num_layers * attention_flops(shape, visible_keys),
        head=head_flops(shape, scored, vocabulary),
    )


def model_flops(forward: Forward) -> float:
    """Return what a training step needs: forward, and twice that backward."""
    return 3.0 * forward.total


def executed_flops(placement: Placement, forward: Forward) -> float:
    """Return what a training step runs.

    A pair or a sample with more scored rows than one slab of logits holds is projected once more; it is not counted.

    Args:
        placement: says what is run again.
        forward: over all tokens that are computed, padding included.
    """
    return layers_executed(placement, forward) + (1 + LINEAR_BACKWARD) * forward.head


def layers_executed(placement: Placement, forward: Forward) -> float:
    """Return the layers' part of it."""
    again = forward.layers if placement.recompute_layers else placement.runs_again("mlp") * forward.mlp
    attention = (1 + placement.runs_again("attention") + ATTENTION_BACKWARD) * forward.attention
    return (1 + LINEAR_BACKWARD) * forward.layers + again + attention


def padded_vocabulary(placement: Placement) -> int:
    """Return the vocabulary that is computed."""
    return padded_vocab(placement.shape.vocab_size, placement.parallel.tensor)
