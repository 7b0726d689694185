"""Distribution of a model's layers over pipeline stages and their chunks, even or uneven."""

from __future__ import annotations

from typing import Any

from megatron_align.config import ParallelConfig
from megatron_align.errors import listed, require


def layers_of_chunks(layers: int, parallel: ParallelConfig) -> list[int]:
    """Return the number of layers of each model chunk, in the order of execution.

    With virtual stages a pipeline stage has every ``parallel.pipeline``-th chunk.

    Args:
        layers: number of layers of the model.
        parallel: the layout.

    Raises:
        InputError: if the layers do not divide over the chunks, or a chunk would get none.
    """
    stages, chunks = parallel.pipeline, parallel.chunks
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    if first is None and last is None:
        return _even(layers, parallel)
    others = stages - (first is not None) - (last is not None)
    left = layers - (first or 0) - (last or 0)
    given = f"parallel.first_stage_layers {first} and last_stage_layers {last}"
    if others == 0:
        require(
            left == 0, f"{given} must add up to the model's {layers} layers on 2 stages, they leave {left}"
        )
    else:
        require(
            left > 0 and left % others == 0,
            f"{given} must leave the other {others} stages of parallel.pipeline equal layers, at least one each; "
            f"they leave {left} of {layers}",
        )
    stage_layers = [left // others if others else 0] * stages
    stage_layers[0] = stage_layers[0] if first is None else first
    stage_layers[-1] = stage_layers[-1] if last is None else last
    require(
        all(count % chunks == 0 for count in stage_layers),
        f"parallel.virtual_pipeline must divide the layers of every stage, got {chunks} for {stage_layers}",
    )
    return [count // chunks for count in stage_layers] * chunks


def _even(layers: int, parallel: ParallelConfig) -> list[int]:
    """Return equal chunks; if configured, embedding and loss count as a layer of the first and the last one."""
    counted = layers + parallel.count_embedding + parallel.count_loss
    chunks = parallel.pipeline * parallel.chunks
    extra = f" and the {counted - layers} counted in addition" if counted > layers else ""
    require(
        counted % chunks == 0,
        f"parallel.pipeline x virtual_pipeline must divide the model's {layers} layers{extra}, "
        f"got {parallel.pipeline} x {parallel.chunks} = {chunks}{_way_out(layers, parallel)}",
    )
    sizes = [counted // chunks] * chunks
    sizes[0] -= parallel.count_embedding
    sizes[-1] -= parallel.count_loss
    require(
        min(sizes) > 0,
        f"parallel.count_embedding and count_loss must leave every chunk a layer, got {sizes} of {layers} layers",
    )
    return sizes


def _way_out(layers: int, parallel: ParallelConfig) -> str:
    """Return options that distribute layers which the stages do not divide."""
    stages, chunks = parallel.pipeline, parallel.chunks
    if parallel.count_embedding or parallel.count_loss:
        return ""
    fewest = layers // (stages * chunks) * chunks
    for each in (fewest + chunks, fewest):
        first = layers - each * (stages - 1)
        if first > 0 and each > 0 and first % chunks == 0:
            return f": set parallel.first_stage_layers (or last_stage_layers) {first}, the others then have {each}"
    sizes = [size for size in range(2, layers + 1) if layers % (size * chunks) == 0]
    uneven = ", or parallel.first_stage_layers and last_stage_layers" if layers >= stages * chunks else ""
    return f": use parallel.pipeline {listed(sizes)}{uneven}" if sizes or uneven else ""


def split_options(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the distribution as options of megatron-core's TransformerConfig."""
    last = parallel.last_stage_layers
    if parallel.pipeline == 2 and parallel.first_stage_layers is not None:
        last = None  # implied by the first; given both, megatron-core divides by the 0 stages in between
    return {
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": last,
        "account_for_embedding_in_pipeline_split": parallel.count_embedding,
        "account_for_loss_in_pipeline_split": parallel.count_loss,
    }
