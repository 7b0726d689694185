"""What context parallelism moves: bytes of ``ulysses`` and of ``allgather``, and the rule by which ``auto`` picks.

Both hold T / CP tokens of a pack on each rank. ``ulysses`` turns tokens into heads by all-to-all before attention (q,
k, v) and back after it (out); ``allgather`` gathers k and v and leaves q where it is. Backward moves the gradients of
the same tensors the other way, as many bytes again.

**The rule of auto**: ``ulysses`` where its heads divide (H a multiple of TP * CP) and it moves no more than
``allgather``, that is H / TP + KV heads sent <= CP * KV heads held; else ``allgather``. So ranks few for their query
heads per KV head gather (Qwen2-7B, 28 : 4, always), many ranks or plain multi-head attention turn. A tie goes to
``ulysses``: its ranks share the work evenly whatever the pack, and none holds the keys of all tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape
from megatron_align.records import ContextKind


class AttentionSplit(NamedTuple):
    """An attention layer and the ranks that share it."""

    heads: int  # H, query heads of the model
    groups: int  # G, KV heads of the model
    head_dim: int
    tensor: int  # tensor-parallel ranks
    context: int  # context-parallel ranks

    @property
    def local_heads(self) -> int:
        """Query heads of one tensor-parallel rank."""
        return self.heads // self.tensor

    @property
    def local_groups(self) -> int:
        """KV heads of one tensor-parallel rank."""
        return max(1, self.groups // self.tensor)


def ulysses_fits(split: AttentionSplit) -> bool:
    """Whether every rank gets as many query heads."""
    return split.heads % (split.tensor * split.context) == 0


def ulysses_groups(split: AttentionSplit) -> int:
    """Return the KV heads of a tensor-parallel rank that are sent: repeated until the context ranks divide them."""
    return math.lcm(split.local_groups, split.context)


def ulysses_bytes(split: AttentionSplit, tokens: int, itemsize: int) -> int:
    """Return the bytes that one rank sends per layer, forward and backward.

    Args:
        split: the layer and its ranks; :func:`ulysses_fits` holds.
        tokens: T of the pack, over all context ranks.
        itemsize: bytes of an element: 2 for bf16.
    """
    of_token = 2 * (split.local_heads + ulysses_groups(split)) * split.head_dim  # q and out, k and v
    to_others = tokens // split.context * (split.context - 1) // split.context
    return 2 * to_others * of_token * itemsize


def allgather_bytes(split: AttentionSplit, tokens: int, itemsize: int) -> int:
    """Return the bytes that one rank receives per layer, forward (gather) and backward (reduce-scatter); as above."""
    of_token = 2 * split.local_groups * split.head_dim  # k and v
    return 2 * tokens // split.context * (split.context - 1) * of_token * itemsize


def choose_kind(heads: int, groups: int, head_dim: int, tensor: int, context: int) -> ContextKind:
    """Return what ``context_kind: auto`` means for this layer; the rule is atop this file."""
    split = AttentionSplit(heads, groups, head_dim, tensor, context)
    tokens = context * context  # any multiple: both grow with the tokens
    if ulysses_fits(split) and ulysses_bytes(split, tokens, 1) <= allgather_bytes(split, tokens, 1):
        return "ulysses"
    return "allgather"


def kind_of(shape: ModelShape, parallel: ParallelConfig) -> ContextKind | None:
    """Return how this run's context-parallel ranks attend together; None: a pack has one rank.

    Raises:
        InputError: if ``ulysses`` is asked for and the heads do not divide.
    """
    if parallel.context == 1:
        return None
    layer = (shape.num_heads, shape.num_query_groups, shape.head_dim, parallel.tensor, parallel.context)
    if parallel.context_kind == "auto":
        return choose_kind(*layer)
    if parallel.context_kind == "ulysses" and not ulysses_fits(AttentionSplit(*layer)):
        raise InputError(
            f"parallel.context_kind: ulysses needs attention heads that tensor x context divide, got {shape.num_heads} "
            f"heads for {parallel.tensor} x {parallel.context}; allgather has no such rule"
        )
    return parallel.context_kind
