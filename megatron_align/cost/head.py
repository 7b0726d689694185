"""Bytes of the head while a pack's loss is taken: one slab of logits, whatever the pack's length."""

from __future__ import annotations

from megatron_align.cost.placement import Placement
from megatron_align.kernels.token_logprobs.passes import SLAB_BYTES
from megatron_align.model.families import padded_vocab


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
    return min(_slab_rows(row), scored_rows) * row


def _slab_rows(row_bytes: int) -> int:
    """Return how many rows a slab has on a GPU, as :func:`megatron_align.kernels.slab_rows`, which needs a tensor."""
    rows = max(1, SLAB_BYTES["cuda"] // row_bytes)
    return rows if rows < 128 else rows - rows % 128
