"""Communication volume of the two context-parallel kinds, and the rule by which ``auto`` chooses one.

Both hold T / CP tokens of a pack on each rank. ``ulysses`` exchanges tokens for heads by all-to-all before attention
(q, k, v) and back after it (out); ``allgather`` gathers k and v and keeps q in place. Backward moves the gradients of
the same tensors the other way, the same number of bytes again.

**The rule of auto**: ``ulysses`` where its heads divide (H a multiple of TP * CP) and it moves no more than
``allgather``, that is H / TP + KV heads sent <= CP * KV heads held; else ``allgather``. So grouped-query attention over
few ranks uses ``allgather`` (Qwen2-7B, 28 : 4, always), many ranks or multi-head attention use ``ulysses``. A tie goes
to ``ulysses``: its ranks share the work evenly for every pack, and none holds the keys of all tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape
from megatron_align.records import ContextKind


class AttentionSplit(NamedTuple):
    """The sizes of an attention layer and the ranks that share it."""

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
    """Return whether every rank gets the same number of query heads."""
    return split.heads % (split.tensor * split.context) == 0


def ulysses_groups(split: AttentionSplit) -> int:
    """Return the KV heads that a tensor-parallel rank sends: replicated until the context ranks divide them."""
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


def auto_context_kind(heads: int, groups: int, head_dim: int, tensor: int, context: int) -> ContextKind:
    """Return the kind that ``context_kind: auto`` chooses for this layer; the rule is in this file's docstring."""
    split = AttentionSplit(heads, groups, head_dim, tensor, context)
    tokens = context * context  # any multiple: both grow with the tokens
    if ulysses_fits(split) and ulysses_bytes(split, tokens, 1) <= allgather_bytes(split, tokens, 1):
        return "ulysses"
    return "allgather"


def context_kind_of(shape: ModelShape, parallel: ParallelConfig) -> ContextKind | None:
    """Return the kind of context parallelism of a run; None without context parallelism.

    Raises:
        InputError: if ``ulysses`` is requested and the heads do not divide.
    """
    if parallel.context == 1:
        return None
    layer = (shape.num_heads, shape.num_query_groups, shape.head_dim, parallel.tensor, parallel.context)
    if parallel.context_kind == "auto":
        return auto_context_kind(*layer)
    if parallel.context_kind == "ulysses" and not ulysses_fits(AttentionSplit(*layer)):
        raise InputError(
            f"parallel.context_kind: ulysses needs attention heads that tensor x context divide, got {shape.num_heads} "
            f"heads for {parallel.tensor} x {parallel.context}; use allgather, which has no such rule"
        )
    return parallel.context_kind
