"""The adapter that a run's options describe, checked against the model."""

from __future__ import annotations

from dataclasses import replace

from megatron_align.config import AdapterConfig
from megatron_align.errors import require, shown
from megatron_align.hf.adapter import ALPHA, RANK, read_adapter
from megatron_align.hf.adapter_checks import require_linear, require_one_use
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import (
    EMBED_TOKENS,
    Adapter,
    adaptable_rows,
    module_name,
    select_modules,
)
from megatron_align.model.families.saved_modules import saved_names, select_saved
from megatron_align.model.tied_embedding import is_tied


def resolve_adapter(options: AdapterConfig | None, shape: ModelShape) -> Adapter | None:
    """Return the adapter that ``model.adapter`` describes; None: the run trains the model's weights.

    Raises:
        InputError: a target that does not exist, or options that contradict the adapter at ``path``.
    """
    if options is None:
        return None
    saved = _saved_modules(options, shape)
    if options.path is None:
        adapter = Adapter(
            rank=options.rank or RANK,
            alpha=options.alpha or ALPHA,
            rslora=bool(options.rslora),
            modules=select_modules(shape, options.targets or "all-linear"),
            dropout=options.dropout,
            dora=bool(options.dora),
            init=options.init,
            saved=saved or frozenset(),
        )
        require_one_use(adapter, "model.adapter.modules_to_save")
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
        (
            "modules_to_save",
            None if saved is None else saved_names(shape, saved),
            saved_names(shape, found.saved),
        ),
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


def _saved_modules(options: AdapterConfig, shape: ModelShape) -> frozenset[str] | None:
    """Return the modules that ``model.adapter.modules_to_save`` names; None: it is left out."""
    tied = options.ensure_weight_tying
    require(
        not tied or is_tied(shape),
        f"model.adapter.ensure_weight_tying must be false, as {shape.architecture} has separate weights for "
        "embed_tokens and lm_head here, got true",
    )
    names = options.modules_to_save
    if names is None:
        return None
    saved = select_saved(shape, names, tied=tied, option="model.adapter.modules_to_save")
    require(
        not tied or EMBED_TOKENS in saved,
        "model.adapter.ensure_weight_tying is of embed_tokens or lm_head among model.adapter.modules_to_save, got "
        f"{shown(names)}",
    )
    return saved


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
