"""Activation memory: bytes that autograd saves for one layer, and the peak that a pipeline stage holds.

Counted tensor by tensor as the modules save them on a GPU; tests compare the counts with the storages that autograd
really saves. On a CPU, whose norms are PyTorch's own operations, it saves more. All sizes are bytes on one rank.

Letters: t tokens of this rank's part of a pack, s of them between the tensor-parallel regions (t / TP under sequence
parallel), h hidden, q and kv columns of queries and of keys on this rank, f columns of the MLP on this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_align.cost.flops import Trained
from megatron_align.cost.placement import Placement
from megatron_align.model.context_kind import context_kind_of, ulysses_groups
from megatron_align.model.families import ModelShape, local_shape
from megatron_align.model.families.adapter import Adapter, adapter_rows, layer_of, linear_rows

FP32 = 4
OF_QUERY, OF_KEY = 4 * 4, 2 * 4  # bytes: the int32 tensors of kernels.packed_attention.PackedLayout


@dataclass(frozen=True, slots=True)
class Sizes:
    """The letters above, and b, the bytes per element of an activation."""

    t: int
    s: int
    h: int
    q: int
    kv: int
    f: int
    heads: int
    b: int

    @classmethod
    def of(cls, placement: Placement, tokens: int) -> Sizes:
        """Compute the sizes for a pack of ``tokens`` tokens, padding included."""
        shape, parallel = placement.shape, placement.parallel
        t = tokens // parallel.context
        return cls(
            t=t,
            s=t // placement.sequence_ranks,
            h=shape.hidden_size,
            q=shape.num_heads * shape.head_dim // parallel.tensor,
            # with fewer key/value heads than ranks, each rank holds all of the one it needs
            kv=max(shape.num_query_groups // parallel.tensor, 1) * shape.head_dim,
            f=shape.ffn_size // parallel.tensor,
            heads=shape.num_heads // parallel.tensor,
            b=placement.itemsize,
        )


def boundary_bytes(placement: Placement, tokens: int) -> int:
    """Return the bytes of the hidden states between two layers: a recompute checkpoint, or what a stage sends."""
    x = Sizes.of(placement, tokens)
    return x.b * x.s * x.h


def layer_bytes(placement: Placement, tokens: int) -> int:
    """Return the bytes one layer saves for its backward pass, ignoring ``recompute_layers``."""
    x = Sizes.of(placement, tokens)
    again = placement.recompute_modules
    # The norms' inputs, and their outputs, which the linears after them save, unless they are recomputed.
    kept = (2 if "norms" in again else 4) * boundary_bytes(placement, tokens)
    kept += _attention_inputs(placement, x) if "attention" in again else _attention(placement, x)
    return kept + (0 if "mlp" in again else _mlp(x)) + _adapter(placement, x) + _fp8_weights(placement)


def _adapter(placement: Placement, x: Sizes) -> int:
    """Return the bytes of an adapter in the layer that saves most: the inputs of B, A joined, B block-diagonal.

    DoRA saves two outputs more of each linear layer: that of the base, and the share (``model.dora.scaled``).
    The inputs of A are counted as the inputs of the layers that it adapts.
    """
    if placement.adapter is None:
        return 0
    sizes = _adapter_sizes(placement.shape, placement.adapter, placement.parallel.tensor)
    outputs = 2 if placement.adapter.dora else 0
    return max(
        (
            x.b * (columns * x.t + weights + outputs * (of_t * x.t + of_s * x.s))
            for columns, weights, of_t, of_s in sizes
        ),
        default=0,
    )


@lru_cache(maxsize=64)
def _adapter_sizes(shape: ModelShape, adapter: Adapter, tensor: int) -> frozenset[tuple[int, int, int, int]]:
    """Return sizes of the adapter of each kind of layer.

    They are the columns that it adds, the elements of its joined A and B, and the outputs of the linear layers that it
    adapts: of the column-parallel ones, which have t tokens, and of the row-parallel ones, which have s.
    """
    of_layer: dict[int | None, list[int]] = {}
    for row in linear_rows(shape):
        if pairs := adapter_rows(row, shape, adapter, tensor):
            columns = adapter.rank * len(pairs)
            size = local_shape(row, shape, tensor)
            sums = of_layer.setdefault(layer_of(row), [0, 0, 0, 0])
            sums[0] += columns
            sums[1] += columns * sum(size)
            sums[2 if row.split == 0 else 3] += size[0]
    return frozenset((columns, weights, of_t, of_s) for columns, weights, of_t, of_s in of_layer.values())


def _fp8_weights(placement: Placement) -> int:
    """Return the bytes of FP8 copies of a layer's weights, by rows and by columns, which its backward pass reads.

    Each micro-batch makes its own. Activations are counted in the precision, though FP8 copies are half of that: an
    upper bound.
    """
    if placement.fp8 is None:
        return 0
    shape, tensor = placement.shape, placement.parallel.tensor
    return 2 * sum(
        math.prod(local_shape(row, shape, tensor)) for row in linear_rows(shape) if layer_of(row) == 0
    )


def _attention(placement: Placement, x: Sizes) -> int:
    """Return the bytes of attention: rotated q and k, v, the output, and the log-sum-exp of each query."""
    shape = placement.shape
    kind = context_kind_of(shape, placement.parallel)
    kept = 2 * x.b * x.t * x.q + FP32 * x.t * x.heads
    if kind is None:
        kept += x.b * x.t * x.kv
    if kind == "ulysses":
        # One message brings q, k and v, which are views of it. The output is kept twice: by attention, and regrouped by
        # tokens by the linear after it.
        kept += x.b * x.t * (x.q + 2 * ulysses_groups(placement.split) * shape.head_dim)
    elif kind == "allgather":
        kept += 2 * x.b * x.t * placement.parallel.context * x.kv  # of the complete pack
    keeps_projection = kind is None  # v is a view of it
    if shape.qk_norm:
        # The norm of each head: its inputs, a copy of q and k within the projection. Rotation needs no output.
        keeps_projection = True
        kept += x.b * x.t * x.q
    if keeps_projection:
        kept += _qkv(placement, x)
    return kept


def _attention_inputs(placement: Placement, x: Sizes) -> int:
    """Return the bytes of recomputed attention: unrotated q, the projection (k and v are views), output, a scalar."""
    kept = 2 * x.b * x.t * x.q + _qkv(placement, x) + 4
    if placement.shape.qk_norm:
        kept += x.b * x.t * (x.q + x.kv)  # a copy of q, which is normalised, and the norm of k
    return kept


def _qkv(placement: Placement, x: Sizes) -> int:
    """Return the bytes of the projection that v, a view, keeps alive; gathered where ranks share a key/value head."""
    shape, tensor = placement.shape, placement.parallel.tensor
    columns = (shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim
    return x.b * x.t * (columns // tensor if shape.num_query_groups >= tensor else columns)


def _mlp(x: Sizes) -> int:
    """Return the bytes of the MLP: gate and up in one tensor, and ``silu(gate) * up``."""
    return 3 * x.b * x.t * x.f


def layer_workspace(placement: Placement, tokens: int) -> int:
    """Return the peak temporary bytes of a layer's backward pass, which is reached within the MLP.

    The gradients of the product, and of gate and up joined; the gradient of the projection's weight before it is added
    to the buffer; and the gathered input under sequence parallel.
    """
    x = Sizes.of(placement, tokens)
    weight = x.b * 2 * x.f * x.h if Trained.of(placement).layers else 0
    gathered = x.b * x.t * x.h if placement.sequence_ranks > 1 else 0
    return 3 * x.b * x.t * x.f + weight + gathered


@dataclass(frozen=True, slots=True)
class ActivationBytes:
    """Activation bytes of one rank.

    Args:
        held: of all micro-batches that wait for their backward pass.
        recomputed: of the layers that are recomputed together.
    """

    held: int
    recomputed: int


def stage_bytes(placement: Placement, stage: int, tokens: int, micro_batches: int) -> ActivationBytes:
    """Return the activation bytes of a pipeline stage at its peak.

    Args:
        placement: model and layout.
        stage: 0-based pipeline stage.
        tokens: padded length of a pack.
        micro_batches: per step and data-parallel rank.
    """
    chunks = placement.chunks(stage)
    layer, boundary = layer_bytes(placement, tokens), boundary_bytes(placement, tokens)
    in_flight = placement.in_flight(stage, micro_batches)
    k = placement.recompute_layers
    held = 0
    for i in range(in_flight):
        chunk = chunks[i * len(chunks) // in_flight]  # the schedule visits all chunks equally often
        held += tables_bytes(placement, tokens)
        held += embedding_bytes(placement, tokens) if chunk.embeds else 0
        held += -(-chunk.layers // k) * boundary if k else chunk.layers * layer
        held += boundary  # the final norm's input, or the hidden states that were sent
    return ActivationBytes(held=held, recomputed=k * layer)


def tables_bytes(placement: Placement, tokens: int) -> int:
    """Return the bytes all layers of a pack share: rotary tables, the kernels' intervals, token order over ranks."""
    parallel = placement.parallel
    own = tokens // parallel.context
    gathers = context_kind_of(placement.shape, parallel) == "allgather"
    rotary = 2 * FP32 * own * placement.shape.head_dim
    order = 8 * tokens if gathers else 0
    return rotary + order + interval_bytes(placement, tokens)


def interval_bytes(placement: Placement, tokens: int) -> int:
    """Return the bytes of the intervals of keys and queries that the kernels save; the CPU implementation has none."""
    gathers = context_kind_of(placement.shape, placement.parallel) == "allgather"
    own = tokens // placement.parallel.context
    return OF_QUERY * (own if gathers else tokens) + OF_KEY * tokens


def embedding_bytes(placement: Placement, tokens: int) -> int:
    """Return the bytes the embedding saves: int64 indices, and a one-byte mask of those on other ranks."""
    return (8 + (placement.parallel.tensor > 1)) * tokens // placement.parallel.context


def pack_bytes(placement: Placement, tokens: int) -> int:
    """Return the bytes of a pack's tensors in a rank's memory, every token scored: tokens, positions, layout and rows.

    With context parallelism also this rank's part of it.
    """
    own = tokens // placement.parallel.context
    of_rows = 3 * 8 + 4 + 1
    part = 8 * tokens + (8 + 2 * 8) * own + OF_QUERY * own + OF_KEY * tokens
    pack = (2 * 8 + of_rows + OF_QUERY + OF_KEY) * tokens
    return pack + (part if placement.parallel.context > 1 else 0)
