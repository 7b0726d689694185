"""The one call of megatron-core's pipeline schedules: forward (and backward) over the micro-batches of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from megatron_align.model.transfer import packs_on_device
from megatron_align.records import PackedBatch


def run_schedule(
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[PackedBatch],
    forward_step: Callable[..., tuple[Any, Any]],
    *,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Run the schedule of the current layout: no pipeline, 1F1B, or interleaved for several chunks.

    Args:
        chunks: this rank's model chunks.
        micro_batches: packs of the host; ``forward_step`` takes each on the device, with its number from 0, from an
            iterator of its chunk.
        forward_step: megatron-core's ``forward_step_func(iterator, chunk)``.
        forward_only: no backward.
        collect_non_loss_data: ``forward_step`` returns values to collect instead of a loss.

    Returns:
        what ``forward_step`` gives for each micro-batch on the last stage, nothing on the others.
    """
    iterators = [enumerate(packs_on_device(micro_batches)) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0].tokens_T.shape[0],  # stages exchange activations of this length
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
