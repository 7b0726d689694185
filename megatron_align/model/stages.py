"""How the layers of a model lie on pipeline stages and their chunks, even or not."""

from __future__ import annotations

from typing import Any

from megatron_align.config import ParallelConfig
from megatron_align.errors import require


def layers_of_chunks(layers: int, parallel: ParallelConfig) -> list[int]:
    """Return how many layers each model chunk has, in the order in which the model runs through them.

    With virtual stages a pipeline stage has every ``parallel.pipeline``-th of them.

    Args:
        layers: of the model.
        parallel: the layout.

    Raises:
        InputError: if the layers do not divide over the chunks, or would leave one without any.
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
    of_stages = [left // others if others else 0] * stages
    of_stages[0] = of_stages[0] if first is None else first
    of_stages[-1] = of_stages[-1] if last is None else last
    require(
        all(count % chunks == 0 for count in of_stages),
        f"parallel.virtual_pipeline must divide the layers of every stage, got {chunks} for {of_stages}",
    )
    return [count // chunks for count in of_stages] * chunks


def _even(layers: int, parallel: ParallelConfig) -> list[int]:
    """Return equal chunks; embedding and loss count as a layer of the first and of the last one if asked for."""
    counted = layers + parallel.count_embedding + parallel.count_loss
    chunks = parallel.pipeline * parallel.chunks
    extra = f" and {counted - layers} counted beside them" if counted > layers else ""
    require(
        counted % chunks == 0,
        f"parallel.pipeline x virtual_pipeline must divide the model's {layers} layers{extra}, "
        f"got {parallel.pipeline} x {parallel.chunks} = {chunks}",
    )
    found = [counted // chunks] * chunks
    found[0] -= parallel.count_embedding
    found[-1] -= parallel.count_loss
    require(
        min(found) > 0,
        f"parallel.count_embedding and count_loss must leave every chunk a layer, got {found} of {layers} layers",
    )
    return found


def split_options(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the split as options of megatron-core's TransformerConfig."""
    last = parallel.last_stage_layers
    if parallel.pipeline == 2 and parallel.first_stage_layers is not None:
        last = None  # the first says it all; with both, megatron-core divides by the 0 stages in between
    return {
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers,
        "num_layers_in_last_pipeline_stage": last,
        "account_for_embedding_in_pipeline_split": parallel.count_embedding,
        "account_for_loss_in_pipeline_split": parallel.count_loss,
    }
