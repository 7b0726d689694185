"""Communication volume: bytes each rank sends in collectives, by ring or direct exchange.

Of m bytes on R ranks, all-gather and reduce-scatter send m (R - 1) / R from each rank, all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_align.cost.activations import boundary_bytes
from megatron_align.cost.flops import Trained
from megatron_align.cost.placement import Placement
from megatron_align.cost.state import GRADIENT, state_bytes
from megatron_align.model.context_kind import allgather_bytes, context_kind_of, ulysses_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that each rank sends.

    Args:
        tensor: per layer and micro-batch, forward and backward (with recomputation forward twice).
        context: likewise for context-parallel collectives.
        pipeline: per micro-batch to the next stage, and the same back.
        data: per step: gradients reduced and weights gathered over data x context parallel ranks.
    """

    tensor: int
    context: int
    pipeline: int
    data: int


def traffic(placement: Placement, tokens: int) -> Traffic:
    """Return the traffic for packs of ``tokens`` tokens, padding included."""
    parallel = placement.parallel
    ranks = placement.shard_ranks
    return Traffic(
        tensor=_tensor(placement, tokens),
        context=_context(placement, tokens),
        pipeline=boundary_bytes(placement, tokens) * parallel.chunks if parallel.pipeline > 1 else 0,
        data=max(trained * (ranks - 1) // ranks for trained in _trained_bytes(placement)),
    )


def _trained_bytes(placement: Placement) -> list[int]:
    """Return the bytes of gradients and trained weights on each pipeline stage."""
    gradients = [state_bytes(placement, stage).gradients for stage in range(placement.parallel.pipeline)]
    return [size + size // GRADIENT * placement.itemsize for size in gradients]


def _tensor(placement: Placement, tokens: int) -> int:
    """Return the bytes of a layer's two tensor-parallel regions.

    Under sequence parallel: all-gather in, reduce-scatter out, all-gather again for the weight's gradient.
    """
    parallel = placement.parallel
    if parallel.tensor == 1:
        return 0
    shape, t = placement.shape, tokens // parallel.context
    times = 2 if placement.recompute_layers else 1

    def once(columns: int) -> int:
        return placement.itemsize * t * columns * (parallel.tensor - 1) // parallel.tensor

    hidden = once(shape.hidden_size)
    # with or without sequence parallel: an all-reduce is a reduce-scatter and an all-gather
    forward = 2 * 2 * hidden
    gathers = placement.sequence_ranks > 1 and Trained.of(placement).layers > 0
    backward = forward + (2 * hidden if gathers else 0)
    if (
        shape.num_query_groups < parallel.tensor
    ):  # ranks that share a key/value head gather the full projection
        projection = once((shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim)
        forward, backward = forward + projection, backward + projection
    again = 2 * hidden if "mlp" in placement.recompute_modules else 0  # the MLP's region
    return times * forward + again + backward


def _context(placement: Placement, tokens: int) -> int:
    """Return the bytes of :mod:`megatron_align.model.context_kind`; recomputation sends those of forward twice."""
    kind = context_kind_of(placement.shape, placement.parallel)
    if kind is None:
        return 0
    count = ulysses_bytes if kind == "ulysses" else allgather_bytes
    both_ways = count(placement.split, tokens, placement.itemsize)
    return both_ways + (both_ways // 2 if placement.recompute_layers else 0)
