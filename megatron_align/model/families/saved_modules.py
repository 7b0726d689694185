"""Modules of which a complete copy is trained with an adapter: PEFT's ``modules_to_save``.

They are the embedding, the output head and norms. PEFT's names of the tensors are those of the base's with a prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from megatron_align.errors import InputError, nearest, require
from megatron_align.model.families.adapter import (
    EMBED_TOKENS,
    LM_HEAD,
    PEFT,
    Adapter,
    linear_modules,
    matches,
    module_name,
)
from megatron_align.model.families.shape import ModelShape
from megatron_align.model.families.table import Row, rows
from megatron_align.model.tied_embedding import EMBEDDING, HEAD, is_tied

SCORE = "score"  # the head of a reward model, which is always trained
_NORM = "norm.weight"  # at the end of Megatron's names
_TIED = {EMBED_TOKENS, LM_HEAD}
_COPY = "adapter.weight"  # in place of ``weight``: the name of a copy
Value = TypeVar("Value")


def saveable_modules(shape: ModelShape) -> list[str]:
    """Return the Hugging Face names of all modules that a copy can be trained of; a tied head is not among them."""
    return [module_name(name) for row in rows(shape) if _is_saveable(row) for name in row.hf]


def _is_saveable(row: Row) -> bool:
    return row.megatron in (EMBEDDING, HEAD) or row.megatron.endswith(_NORM)


def select_saved(
    shape: ModelShape, names: Sequence[str], *, tied: bool, option: str, linear: bool = False
) -> frozenset[str]:
    """Return the modules that ``modules_to_save`` names: as in PEFT, all whose names end with one of these.

    So ``norm`` names every norm, and ``model.norm`` the last one. A name may be a pattern too (``layers.3.*norm``), and
    that of a reward model's score is left out: it is always trained.

    Args:
        shape: of the model.
        names: or patterns.
        tied: PEFT's ``ensure_weight_tying``: the copies of a tied embedding and head are one weight.
        option: what error lines call the list, and where it stands.
        linear: the copies are merged, not trained: linear layers have them too.

    Raises:
        InputError: a name matches nothing, a module of another kind, or a head whose rows the model normalises; or
            embedding and head are tied and ``tied`` is not set.
    """
    saveable = saveable_modules(shape) + ([LM_HEAD] if is_tied(shape) else [])
    saveable += linear_modules(shape) if linear else []
    others = _other_modules(shape, saveable)
    selected: set[str] = set()
    for name in names:
        found = {module for module in saveable if is_named(module, name)}
        if refused := [module for module in others if is_named(module, name)]:
            raise InputError(
                f"{option} must name the embedding, the output head or norms, '{name}' matches {refused[0]}: complete "
                "training of others with an adapter is not built; model.adapter.targets may name linear layers"
            )
        if not found and not (shape.is_reward and name in (SCORE, "classifier")):
            known = sorted({module.rpartition(".")[2] for module in saveable})
            raise InputError(
                f"{option}: '{name}' matches no embedding, output head or norm of {shape.architecture}, which has "
                f"{', '.join(known)}{nearest(name, known)}"
            )
        selected |= found
    require(
        not (LM_HEAD in selected and shape.norm_head),
        f"{option} must not name lm_head of {shape.architecture}, which normalises its rows",
    )
    if selected & _TIED and is_tied(shape):
        require(
            tied,
            f"{option} must not name {' or '.join(sorted(selected & _TIED))} without ensure_weight_tying: true, as "
            "embed_tokens and lm_head are one weight of this model: PEFT then trains copies that are no longer tied, "
            "and the merged model would be another architecture",
        )
        selected = selected - {LM_HEAD} | {EMBED_TOKENS}
    return frozenset(selected)


def is_named(module: str, name: str) -> bool:
    """Return whether a name of ``modules_to_save`` is that of a module: of its end, as in PEFT, or a pattern."""
    return module.endswith(name) or matches(module, name)


def _other_modules(shape: ModelShape, saveable: Sequence[str]) -> list[str]:
    """Return the names of the model's other modules, those that contain modules too."""
    found: set[str] = set()
    for row in rows(shape):
        for name in row.hf:
            parts = module_name(name).split(".")
            found |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return sorted(found - {*saveable, SCORE})


def saved_names(shape: ModelShape, saved: frozenset[str]) -> list[str]:
    """Return the shortest names that PEFT finds exactly these modules by: ``norm``, or complete names."""
    every = saveable_modules(shape) + linear_modules(shape)
    names = set()
    for module in saved:
        short = module.rpartition(".")[2]
        is_exact = {other for other in every if other.endswith(short)} <= saved
        names.add(short if is_exact else module)
    return sorted(names)


def is_tied_copy(shape: ModelShape, adapter: Adapter) -> bool:
    """Return whether the adapter's copy of the embedding is the head's too: PEFT's ``ensure_weight_tying``."""
    return is_tied(shape) and EMBED_TOKENS in adapter.saved


def with_tied_head(tensors: Mapping[str, Value], shape: ModelShape, adapter: Adapter) -> dict[str, Value]:
    """Return what there is of each tensor, by PEFT's names, with that of a tied copy under the head's name too."""
    embedding = f"{PEFT}{EMBED_TOKENS}.weight"
    if not is_tied_copy(shape, adapter) or embedding not in tensors:
        return dict(tensors)
    return {**tensors, f"{PEFT}{LM_HEAD}.weight": tensors[embedding]}


def copy_name(megatron: str) -> str:
    """Return the Megatron name of the copy of a weight."""
    return megatron.removesuffix("weight") + _COPY


def saved_rows(shape: ModelShape, adapter: Adapter) -> Iterator[Row]:
    """Yield the rows of the copies that an adapter trains, in the order of the model; a tied copy has one row."""
    for row in rows(shape) if adapter.saved else ():
        if _is_saveable(row) and module_name(row.hf[0]) in adapter.saved:
            yield replace(row, megatron=copy_name(row.megatron), hf=(f"{PEFT}{row.hf[0]}",))


def copies_of(row: Row, shape: ModelShape) -> tuple[str, ...]:
    """Return the names of this rank's parameters that may hold a row: of a tied copy the last stage's too."""
    if row.megatron == copy_name(EMBEDDING) and is_tied(shape):
        return row.megatron, copy_name(HEAD)
    return (row.megatron,)
