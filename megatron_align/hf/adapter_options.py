"""The adapter that a run's options describe, checked against the model."""

from __future__ import annotations

from dataclasses import replace

from megatron_align.config import AdapterConfig
from megatron_align.errors import require, shown
from megatron_align.hf.adapter import ALPHA, RANK, read_adapter, require_linear
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import (
    EMBED_TOKENS,
    Adapter,
    adaptable_rows,
    module_name,
    select_modules,
)


def resolve_adapter(options: AdapterConfig | None, shape: ModelShape) -> Adapter | None:
    """Return the adapter that ``model.adapter`` describes; None: the run trains the model's weights.

    Raises:
        InputError: a target that does not exist, or options that contradict the adapter at ``path``.
    """
    if options is None:
        return None
    _require_saved_modules(options.modules_to_save or [], shape)
    if options.path is None:
        adapter = Adapter(
            rank=options.rank or RANK,
            alpha=options.alpha or ALPHA,
            rslora=bool(options.rslora),
            modules=select_modules(shape, options.targets or "all-linear"),
            dropout=options.dropout,
            dora=bool(options.dora),
            init=options.init,
        )
        require_linear(adapter, "model.adapter.dora")
        _require_decomposable(adapter, shape)
        return adapter
    found = read_adapter(options.path, shape)
    modules = None if options.targets is None else select_modules(shape, options.targets)
    for name, given, stored in (
        ("rank", options.rank, found.rank),
        ("alpha", options.alpha, found.alpha),
        ("rslora", options.rslora, found.rslora),
        ("dora", options.dora, found.dora),
        ("targets", modules and sorted(modules), sorted(found.modules)),
    ):
        require(
            given is None or given == stored,
            f"model.adapter.{name} must be left out or be that of the adapter to start from, {shown(stored)}, "
            f"got {shown(given)} (adapter {options.path})",
        )
    require(
        not (found.dora and options.dropout),
        f"model.adapter.dropout must be 0 with DoRA, which the adapter has, got {options.dropout} ({options.path})",
    )
    return replace(found, dropout=options.dropout)


def _require_saved_modules(modules: list[str], shape: ModelShape) -> None:
    """Refuse modules that would be trained with the adapter, but for the head of a reward model."""
    if shape.is_reward and set(modules) <= {"score"}:
        return
    others = [name for name in modules if name != "score"]
    require(
        not modules,
        f"model.adapter.modules_to_save must be left out, or [score] for a reward model, got {shown(modules)}: "
        + (
            f"complete training of {', '.join(others)} with an adapter is not built; model.adapter.targets may name "
            "linear layers, embed_tokens and lm_head"
            if others
            else "this model has no score"
        ),
    )


def _require_decomposable(adapter: Adapter, shape: ModelShape) -> None:
    """Refuse an adapter that starts with singular values that the weights do not have."""
    if not adapter.holds_start:
        return
    what = f"model.adapter.init {adapter.init}"
    require(
        EMBED_TOKENS not in adapter.modules,
        f"{what} is of linear layers, as in PEFT, got embed_tokens among the targets",
    )
    for row in adaptable_rows(shape):
        for name, size in zip(row.hf, row.hf_shapes(shape), strict=True):
            require(
                module_name(name) not in adapter.modules or adapter.rank <= min(size),
                f"model.adapter.rank must be at most {min(size)} with {what}, the smaller side of "
                f"{module_name(name)}, got {adapter.rank}",
            )
