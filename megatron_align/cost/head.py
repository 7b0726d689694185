"""Memory of the output head during the loss: one slab of logits, independent of the pack's length."""

from __future__ import annotations

from megatron_align.cost.flops import Trained
from megatron_align.cost.placement import Placement
from megatron_align.kernels.token_logprobs.slab import SLAB_BYTES
from megatron_align.model.families import padded_vocab
from megatron_align.model.families.adapter import LM_HEAD

# Of a scored row: its target, row and weight, statistics of its logits, log-prob, and their gradients.
OF_ROW = 160


def head_bytes(placement: Placement, tokens: int, scored_rows: int) -> int:
    """Return the bytes the last stage holds for its loss, without weights and their gradients.

    Args:
        placement: model and layout.
        tokens: padded length of a pack.
        scored_rows: scored rows of the pack, over all ranks.
    """
    hidden = hidden_bytes(placement, tokens, scored_rows)
    if placement.shape.is_reward:
        return hidden
    return hidden + slab_bytes(placement, scored_rows) + _adapted_head(placement)


def hidden_bytes(placement: Placement, tokens: int, scored_rows: int) -> int:
    """Return the bytes of the scored rows, their gradient, their numbers, and the gathered rows they come from.

    Arguments as of :func:`head_bytes`.
    """
    rows = -(-scored_rows // placement.parallel.context)
    gathered = tokens // placement.parallel.context if placement.sequence_ranks > 1 else 0
    return (2 * rows + gathered) * placement.shape.hidden_size * placement.itemsize + OF_ROW * scored_rows


def stand_in_bytes(placement: Placement) -> int:
    """Return the bytes of what autograd is given for the gradient of the head's weight, which is in its buffer already.

    0 where the weight is not trained. See ``kernels.token_logprobs.gradients``.
    """
    shape, tensor = placement.shape, placement.parallel.tensor
    if shape.is_reward or not Trained.of(placement).head:
        return 0
    return padded_vocab(shape.vocab_size, tensor) // tensor * shape.hidden_size * placement.itemsize


def _adapted_head(placement: Placement) -> int:
    """Return the bytes of the weight with an adapter's columns, and of its fp32 gradient; 0 without one of the head."""
    shape, adapter = placement.shape, placement.adapter
    if adapter is None or LM_HEAD not in adapter.modules:
        return 0
    columns = padded_vocab(shape.vocab_size, placement.parallel.tensor) // placement.parallel.tensor
    return columns * (shape.hidden_size + adapter.rank) * (placement.itemsize + 4)


def column_bytes(placement: Placement, scored_rows: int, top_k: int) -> int:
    """Return the bytes of the reference's likeliest tokens of each row, and of the loss on them.

    Tokens (int32, and int64 as indices) and logits of the reference, its logits and the policy's in fp32, their
    gradient.
    """
    rows = -(-scored_rows // placement.parallel.context)
    return rows * top_k * (4 + 8 + placement.itemsize + 3 * 4)


def slab_bytes(placement: Placement, scored_rows: int) -> int:
    """Return the bytes of a slab of logits on one tensor-parallel rank."""
    columns = padded_vocab(placement.shape.vocab_size, placement.parallel.tensor) // placement.parallel.tensor
    row = columns * placement.itemsize
    return min(_slab_rows(row), scored_rows) * row


def _slab_rows(row_bytes: int) -> int:
    """Return the rows of a slab on a GPU, as :func:`megatron_align.kernels.slab_rows` does, which needs a tensor."""
    rows = max(1, SLAB_BYTES["cuda"] // row_bytes)
    return rows if rows < 128 else rows - rows % 128
