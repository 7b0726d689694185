"""Floating-point operations (FLOPs) of a step: matrix products only, a multiply-add counts as two.

Attention is counted by the keys each token attends to, not by the square of the pack. There are two counts per step:
``model``, what the mathematics requires (the usual numerator of MFU: forward, and twice that for backward, without
padding or recomputation), and ``executed``, which adds padding, recomputation and the attention scores of backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_align.cost.placement import Placement
from megatron_align.model.families import ModelShape, padded_vocab
from megatron_align.model.families.adapter import (
    EMBED_TOKENS,
    LM_HEAD,
    Adapter,
    adapter_tensors,
    all_adapter_rows,
    linear_rows,
)
from megatron_align.model.families.saved_modules import is_tied_copy
from megatron_align.model.tied_embedding import EMBEDDING, HEAD, is_tied

# Backward over forward. A product y = x w has two gradients of the same size; attention's forward has two products,
# its backward recomputes the scores and then has four (arXiv:2307.08691).
LINEAR_BACKWARD = 2.0
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, slots=True)
class Forward:
    """FLOPs of one forward pass, over all ranks."""

    layers: int  # linear products of the layers, without an adapter's
    mlp: int  # the part of ``layers`` in the MLPs
    attention: int
    head: int
    adapter: int = 0

    @property
    def total(self) -> int:
        """Sum over layers, attention, head and adapter."""
        return self.layers + self.attention + self.head + self.adapter


@dataclass(frozen=True, slots=True)
class Trained:
    """The products with a weight gradient: their share of the layers' linear products, and whether the head is one.

    The gradient of a product's input is always counted: below the lowest trained layer it may not be computed.
    """

    layers: float = 1.0
    head: bool = True

    @classmethod
    def of(cls, placement: Placement) -> Trained:
        """Return what a placement trains."""
        shape, frozen = placement.shape, placement.frozen
        if placement.adapter is not None:
            adapter = placement.adapter
            trains_head = LM_HEAD in adapter.modules | adapter.saved or is_tied_copy(shape, adapter)
            return cls(0.0, shape.is_reward or trains_head)
        if not frozen:
            return cls()
        head = EMBEDDING if is_tied(shape) else HEAD
        return cls(_trained_share(shape, frozen), head not in frozen)


@lru_cache(maxsize=64)
def _trained_share(shape: ModelShape, frozen: frozenset[str]) -> float:
    """Return the share of the layers' linear products whose weights are trained."""
    sizes = {row.megatron: sum(map(prod, row.hf_shapes(shape))) for row in linear_rows(shape)}
    return sum(size for name, size in sizes.items() if name not in frozen) / sum(sizes.values())


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


@lru_cache(maxsize=64)
def adapter_flops(shape: ModelShape, adapter: Adapter | None) -> int:
    """Return the FLOPs of an adapter's products per token: of the inputs with A, and of the result with B.

    The embedding's A is looked up, not multiplied; the output head's are in :func:`adapter_head_flops`.
    """
    if adapter is None:
        return 0
    left_out = {adapter_tensors(EMBED_TOKENS)[0], *adapter_tensors(LM_HEAD)}
    table = [
        row
        for row in all_adapter_rows(shape, adapter, 1)
        if row.hf[0] not in left_out and len(row.dims[0]) == 2
    ]
    return 2 * sum(prod(row.hf_shapes(shape)[0]) for row in table)


def adapter_head_flops(shape: ModelShape, adapter: Adapter | None, vocabulary: int | None) -> int:
    """Return the FLOPs of an adapter of the output head per scored row, whose products are some more columns of it."""
    if adapter is None or LM_HEAD not in adapter.modules:
        return 0
    return 2 * adapter.rank * (shape.hidden_size + (vocabulary or shape.vocab_size))


def forward_flops(
    shape: ModelShape,
    tokens: int,
    visible_keys: int,
    scored: int,
    *,
    vocabulary: int | None = None,
    adapter: Adapter | None = None,
) -> Forward:
    """Return the FLOPs of a forward pass over ``tokens`` tokens."""
    return Forward(
        layers=shape.num_layers * layer_flops(shape) * tokens,
        mlp=shape.num_layers * mlp_flops(shape) * tokens,
        attention=shape.num_layers * attention_flops(shape, visible_keys),
        head=head_flops(shape, scored, vocabulary) + adapter_head_flops(shape, adapter, vocabulary) * scored,
        adapter=adapter_flops(shape, adapter) * tokens,
    )


def model_flops(forward: Forward, trained: Trained = Trained()) -> float:  # noqa: B008  # it is frozen
    """Return the FLOPs a training step requires: forward, and as much for the gradients of inputs and of weights."""
    weights = (
        trained.layers * forward.layers + forward.attention + trained.head * forward.head + forward.adapter
    )
    return 2.0 * forward.total + weights


def executed_flops(placement: Placement, forward: Forward) -> float:
    """Return the FLOPs a training step executes.

    A pair or sample with more scored rows than one slab of logits is projected once more, which is not counted.

    Args:
        placement: model and layout, with its recomputation.
        forward: FLOPs over all computed tokens, padding included.
    """
    return layers_executed(placement, forward) + (LINEAR_BACKWARD + Trained.of(placement).head) * forward.head


def layers_executed(placement: Placement, forward: Forward) -> float:
    """Return the FLOPs a training step executes in the layers, without the head."""
    again = placement.runs_again("mlp") * forward.mlp
    if placement.recompute_layers:
        again = forward.layers + forward.adapter
    attention = (1 + placement.runs_again("attention") + ATTENTION_BACKWARD) * forward.attention
    linear = (LINEAR_BACKWARD + Trained.of(placement).layers) * forward.layers
    return linear + (1 + LINEAR_BACKWARD) * forward.adapter + again + attention


def padded_vocabulary(placement: Placement) -> int:
    """Return the vocabulary size with padding."""
    return padded_vocab(placement.shape.vocab_size, placement.parallel.tensor)
