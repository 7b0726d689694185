"""Bytes of the head while a pack's loss is taken: one slab of logits, whatever the pack's length."""

from __future__ import annotations

from megatron_align.cost.placement import Placement
from megatron_align.model.families import padded_vocab

SLAB_BYTES = 2**30  # of logits on a GPU: kernels.token_logprobs.passes.SLAB_BYTES, which a test compares


def head_bytes(placement: Placement, tokens: int, scored_rows: int) -> int:
    """Return what the last stage holds for its loss, besides weights and gradients.

    Args:
        placement: of the model.
        tokens: padded length of a pack.
        scored_rows: of the pack, over all ranks.
    """
    shape, b = placement.shape, placement.itemsize
    rows = -(-scored_rows // placement.parallel.context)
    gathered = tokens // placement.parallel.context if placement.sequence_ranks > 1 else 0
    hidden = (
        (2 * rows + gathered) * shape.hidden_size * b
    )  # scored rows, their gradient, what they were picked from
    if shape.is_reward:
        return hidden
    return hidden + slab_bytes(placement, scored_rows)


def slab_bytes(placement: Placement, scored_rows: int) -> int:
    """Return the bytes of a slab of logits on one tensor-parallel rank."""
    columns = padded_vocab(placement.shape.vocab_size, placement.parallel.tensor) // placement.parallel.tensor
    row = columns * placement.itemsize
    most = max(1, SLAB_BYTES // row)
    most = most if most < 128 else most - most % 128
    return min(most, scored_rows) * row
