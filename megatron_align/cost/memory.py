"""The memory of a rank, stage by stage: what it holds from the first step to the last, and what a step adds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_align.cost.activations import boundary_bytes, layer_workspace, stage_bytes
from megatron_align.cost.head import head_bytes
from megatron_align.cost.placement import Placement
from megatron_align.cost.state import parameter_bytes, state_bytes

GIB = 2**30
# Ours to assume, as no run of ours measured it: CUDA context, cuBLAS and NCCL buffers; and what the caching allocator
# cannot give out again because it lies in pieces, as a share of all that is in use.
CONTEXT = 2 * GIB
FRAGMENTATION = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage at the peak of a step.

    Args:
        parameters: weights.
        gradients: fp32 main gradients.
        optimizer: fp32 masters and moments, this rank's share.
        reference: weights of a live reference.
        activations: kept by the micro-batches in flight.
        temporary: the wider of two moments: a layer's backward (and the layers made again for it), or the head's
            slab of logits.
        communication: buffers that collectives gather into.
    """

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    temporary: int
    communication: int

    @property
    def tensors(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def total(self) -> int:
        """What the GPU needs: all tensors, and what is assumed besides."""
        return CONTEXT + round(self.tensors * (1 + FRAGMENTATION))


def stage_memory(
    placement: Placement, stage: int, tokens: int, micro_batches: int, *, live_reference: bool = False
) -> StageMemory:
    """Return the memory of each rank of a stage.

    Args:
        placement: of the model.
        stage: 0-based pipeline stage.
        tokens: padded length of a pack; every token is taken as scored, which is never too little.
        micro_batches: of a step, per data-parallel rank.
        live_reference: ``reference.mode: live``.
    """
    state = state_bytes(placement, stage)
    activations = stage_bytes(placement, stage, tokens, micro_batches)
    of_layer = activations.recomputed + layer_workspace(placement, tokens)
    ends = placement.chunks(stage)[-1].ends
    of_head = head_bytes(placement, tokens, tokens) if ends else 0
    gathered = placement.sequence_ranks > 1
    return StageMemory(
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        reference=parameter_bytes(placement, stage) if live_reference else 0,
        activations=activations.held,
        temporary=max(of_layer, of_head),
        communication=boundary_bytes(placement, tokens) * placement.sequence_ranks if gathered else 0,
    )
