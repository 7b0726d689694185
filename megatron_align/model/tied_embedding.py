"""Tied embeddings: one weight is both the embedding and the output projection (``tie_word_embeddings`` of HF).

- On one pipeline stage the head has no weight and multiplies by the embedding's (:func:`head_weight`).
- On several stages the first and the last each hold a copy (:func:`has_two_copies`). megatron-core sums their gradients
  over ``groups.embd``, loading fills both from the embedding (``hf/load.py``), and the self-check compares them.
- The weight table has one row for both (:func:`has_row`), so a checkpoint or HF folder stores the weight once.
- A reward model has no output projection, so its embedding is never tied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from megatron_align.model.trained_copy import weight_in_use

if TYPE_CHECKING:
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from megatron_align.model.families.shape import ModelShape

# megatron-core's names of the two weights.
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def is_tied(shape: ModelShape) -> bool:
    """Return whether embedding and output projection are one weight."""
    return shape.tied_embeddings and not shape.is_reward


def has_two_copies(shape: ModelShape, pipeline: int) -> bool:
    """Return whether the first and the last of ``pipeline`` stages each hold a copy of the tied weight."""
    return pipeline > 1 and is_tied(shape)


def has_row(megatron_name: str, shape: ModelShape) -> bool:
    """Return whether the weight table of this model has a row for a tensor: not for a tied output projection."""
    return not (megatron_name == HEAD and shape.tied_embeddings)


def head_weight(output_layer: ColumnParallelLinear, embedding: LanguageModelEmbedding | None) -> Tensor:
    """Return the output projection ``[V, H]`` of this stage: the head's weight, or the embedding's if tied on it.

    An adapter's trained copy of either is returned in its place, unless it is off.
    """
    if output_layer.weight is None and embedding is not None:
        return weight_in_use(embedding.word_embeddings)
    return weight_in_use(output_layer)
