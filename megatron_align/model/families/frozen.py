"""Parameters that are not trained: patterns of Hugging Face tensor names -> names of Megatron tensors."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_align.errors import InputError, nearest
from megatron_align.model.families.adapter import matches, module_name
from megatron_align.model.families.shape import ModelShape
from megatron_align.model.families.table import Row, rows
from megatron_align.model.tied_embedding import EMBEDDING, HEAD

HF_HEAD = "lm_head"


def frozen_tensors(shape: ModelShape, patterns: Sequence[str]) -> frozenset[str]:
    """Return the Megatron tensors that ``model.freeze`` names; a copy of a tied embedding is frozen with it.

    A pattern matches the name of a tensor or of its module, or the end of either after a dot.

    Raises:
        InputError: a pattern matches nothing, cuts a Megatron tensor in two, or everything is frozen.
    """
    table = list(rows(shape))
    names = [name for row in table for name in row.hf]
    frozen: set[str] = set()
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            known = sorted({module_name(name).rpartition(".")[2] for name in names})
            tied = (
                "; lm_head is embed_tokens here (tie_word_embeddings)" if pattern.startswith(HF_HEAD) else ""
            )
            raise InputError(
                f"model.freeze: '{pattern}' matches no tensor of {shape.architecture}{nearest(pattern, known)}{tied}"
            )
    for row in table:
        matched = [name for name in row.hf if any(_matches(name, pattern) for pattern in patterns)]
        if matched and len(matched) < len(row.hf):
            others = [name for name in row.hf if name not in matched]
            raise InputError(
                f"model.freeze must name all or none of the tensors that are one matrix here: {', '.join(matched)} "
                f"would be frozen, {', '.join(others)} trained"
            )
        if matched:
            frozen.add(row.megatron)
    _require_trained_biases(table, frozen)
    if len(frozen) == len(table):
        raise InputError(f"model.freeze must leave something to train, got {', '.join(patterns)}")
    if EMBEDDING in frozen and shape.tied_embeddings:
        frozen.add(HEAD)
    return frozenset(frozen)


def _matches(name: str, pattern: str) -> bool:
    return matches(name, pattern) or matches(module_name(name), pattern)


def _require_trained_biases(table: Sequence[Row], frozen: set[str]) -> None:
    """Refuse a trained bias of a frozen weight: megatron-core computes no gradient for it then."""
    for row in table:
        weight = row.megatron.removesuffix("bias") + "weight"
        if row.megatron.endswith(".bias") and row.megatron not in frozen and weight in frozen:
            raise InputError(
                f"model.freeze must name {', '.join(row.hf)} with the weights, as a bias cannot be trained alone"
            )
