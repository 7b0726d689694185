"""Memory of one rank per pipeline stage: the training state, and the peak of a step."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron_align.cost.activations import (
    boundary_bytes,
    layer_bytes,
    layer_workspace,
    pack_bytes,
    stage_bytes,
    tables_bytes,
)
from megatron_align.cost.head import column_bytes, head_bytes, hidden_bytes, stand_in_bytes
from megatron_align.cost.placement import Placement
from megatron_align.cost.state import parameter_bytes, state_bytes
from megatron_align.model.families import padded_vocab
from megatron_align.model.families.adapter import EMBED_TOKENS
from megatron_align.model.tied_embedding import EMBEDDING

GIB = 2**30
# Assumptions that we have not measured: CUDA context, cuBLAS and NCCL buffers; and the caching allocator's
# fragmentation, as a share of all bytes in use.
CONTEXT = 2 * GIB
FRAGMENTATION = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage at the peak of a step.

    Args:
        parameters: weights.
        gradients: fp32 main gradients.
        optimizer: this rank's shard of fp32 master weights and moments.
        reference: weights of a live reference model.
        activations: saved by the micro-batches in flight, with the tensors of their packs.
        temporary: the largest of a layer's backward pass (with the layers recomputed for it), the head's slab of
            logits, the start of backward with a gradient of the head's weight, and its end with the embedding's.
        communication: buffers that collectives gather into.
        rewards: weights of reward models.
        engine: the copy of the model that a generation engine in this process holds, and its keys and values at most.
        critic: weights, gradients and optimizer shard of a critic; its activations come after the policy's are freed.
    """

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    temporary: int
    communication: int
    rewards: int = 0
    engine: int = 0
    critic: int = 0

    @property
    def tensors(self) -> int:
        """Sum of all fields."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def working(self) -> int:
        """Sum of what is freed when the model's pass over a step ends."""
        return self.activations + self.temporary + self.communication

    def with_work_of(self, other: StageMemory) -> StageMemory:
        """Return this memory with the working tensors of another model's pass, if that needs more: not at once."""
        if other.working <= self.working:
            return self
        return replace(
            self,
            activations=other.activations,
            temporary=other.temporary,
            communication=other.communication,
        )

    @property
    def total(self) -> int:
        """GPU memory required: all tensors, plus the assumed context and fragmentation."""
        return CONTEXT + round(self.tensors * (1 + FRAGMENTATION))


def stage_memory(
    placement: Placement,
    stage: int,
    tokens: int,
    micro_batches: int,
    *,
    live_reference: bool = False,
    top_k: int = 0,
) -> StageMemory:
    """Return the memory of each rank of a pipeline stage.

    Args:
        placement: model and layout.
        stage: 0-based pipeline stage.
        tokens: padded length of a pack; every token is assumed to be scored, an upper bound.
        micro_batches: per step and data-parallel rank.
        live_reference: whether ``reference.mode`` is ``live``.
        top_k: the reference's likeliest tokens that the loss reads of each scored row.
    """
    state = state_bytes(placement, stage)
    activations = stage_bytes(placement, stage, tokens, micro_batches)
    layer = activations.recomputed + layer_workspace(placement, tokens)
    ends = placement.chunks(stage)[-1].ends
    head = 0
    if ends:
        head = head_bytes(placement, tokens, tokens) + column_bytes(placement, tokens, top_k)
        head += boundary_bytes(placement, tokens)  # the final norm's output
        head += _previous_bytes(placement, tokens)
    packs = placement.in_flight(stage, micro_batches) + 1  # the next one is copied ahead
    stand_in = stand_in_bytes(placement) if ends else 0
    alone = 0  # a peak without activations
    if stand_in and placement.tied_on_one_stage:
        layer += stand_in  # it waits for the embedding's gradient, the last one, to which it is added
        alone = 3 * stand_in + boundary_bytes(placement, tokens)  # both gradients, their sum, and its input's
    embedding = _embedding_backward(placement, tokens) if placement.chunks(stage)[0].embeds else 0
    backward = hidden_bytes(placement, tokens, tokens) + boundary_bytes(placement, tokens)  # its start
    largest = max(layer, head, stand_in + backward if stand_in else 0)
    gathered = placement.sequence_ranks > 1
    return StageMemory(
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        reference=parameter_bytes(placement.as_reference(), stage) if live_reference else 0,
        activations=activations.held + packs * pack_bytes(placement, tokens),
        temporary=max(largest, alone - activations.held, embedding),
        communication=boundary_bytes(placement, tokens) * placement.sequence_ranks if gathered else 0,
    )


def _embedding_backward(placement: Placement, tokens: int) -> int:
    """Return the bytes of the embedding's gradient, less those of its micro-batch's layers, which are gone by then.

    Other micro-batches in flight still hold theirs. The gradient of hidden states, which it is made of, exists twice,
    and on several stages the next one may have been received.
    """
    if EMBEDDING in placement.frozen or (
        placement.adapter is not None and EMBED_TOKENS not in placement.adapter.saved
    ):
        return 0
    shape, tensor, k = placement.shape, placement.parallel.tensor, placement.recompute_layers
    rows = padded_vocab(shape.vocab_size, tensor) // tensor
    boundary, layers = boundary_bytes(placement, tokens), placement.chunks(0)[0].layers
    own = -(-layers // k) * boundary if k else layers * layer_bytes(placement, tokens)
    gradients = 3 if placement.parallel.pipeline > 1 else 2
    return rows * shape.hidden_size * placement.itemsize + gradients * boundary - own


def _previous_bytes(placement: Placement, tokens: int) -> int:
    """Return the bytes of the micro-batch before that the schedule drops only when the next one's loss is there.

    They are what the last stage received for it and the gradient of that, and what its recompute checkpoints took.
    """
    received = 2 * boundary_bytes(placement, tokens) if placement.parallel.pipeline > 1 else 0
    again = placement.recompute_layers > 0
    return received + (tables_bytes(placement, tokens) + pack_bytes(placement, tokens) if again else 0)


def pass_memory(placement: Placement, stage: int, tokens: int, top_k: int = 0) -> StageMemory:
    """Return the memory of a forward pass without gradients by a model that is not trained.

    All that a layer makes is counted at once, an upper bound.

    Args:
        placement: of the model, see :meth:`.Placement.as_reference`.
        stage: 0-based pipeline stage.
        tokens: padded length of a pack; every token is assumed to be scored.
        top_k: its likeliest tokens of each scored row, which it gives with their logits; 0: it gives log-probs.
    """
    boundary = boundary_bytes(placement, tokens)
    ends = placement.chunks(stage)[-1].ends
    head = head_bytes(placement, tokens, tokens) + column_bytes(placement, tokens, top_k) if ends else 0
    gathered = placement.sequence_ranks > 1
    return StageMemory(
        parameters=parameter_bytes(placement, stage),
        gradients=0,
        optimizer=0,
        reference=0,
        activations=2 * boundary + tables_bytes(placement, tokens) + 2 * pack_bytes(placement, tokens),
        temporary=max(layer_bytes(placement, tokens), head),
        communication=boundary * placement.sequence_ranks if gathered else 0,
    )
