"""Checks of an adapter's options and tensors that need nothing but the model's shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_align.errors import InputError, listed, require
from megatron_align.model.families import ModelShape
from megatron_align.model.families.adapter import EMBED_TOKENS, LM_HEAD, PEFT, Adapter, adaptable_modules
from megatron_align.model.families.saved_modules import is_tied_copy
from megatron_align.model.tied_embedding import is_tied


def require_linear(adapter: Adapter, what: str) -> None:
    """Refuse a DoRA adapter of other modules than the transformer's linear layers."""
    ends = sorted(adapter.modules & {EMBED_TOKENS, LM_HEAD})
    require(
        not (adapter.dora and ends),
        f"{what} is built for linear layers of the transformer, got {', '.join(ends)} among the targets",
    )


def require_one_use(adapter: Adapter, what: str) -> None:
    """Refuse modules that have A and B, and are trained completely too."""
    twice = sorted(adapter.modules & adapter.saved)
    require(
        not twice,
        f"{what} must not name {', '.join(twice)}, which the low-rank adapter changes too: train it in one way",
    )


def require_targets(config: Mapping[str, Any], adapter: Adapter, shape: ModelShape, source: Path) -> None:
    """Refuse an adapter without tensors for modules that PEFT would adapt by its ``target_modules``.

    It is of a model with fewer layers, whose names this model has too. Lists are compared, where nothing excludes
    modules from them; PEFT's other ways to choose modules are not.
    """
    targets = config.get("target_modules")
    if (
        not isinstance(targets, list)
        or config.get("exclude_modules")
        or config.get("layers_to_transform") is not None
    ):
        return
    named = [
        module
        for module in adaptable_modules(shape)
        if any(module == target or module.endswith(f".{target}") for target in targets)
    ]
    missing = [module for module in named if module not in adapter.modules | adapter.saved]
    require(
        not missing,
        f"the adapter does not match {shape.architecture}: target_modules name {listed(missing)}, of which it has no "
        f"tensors: it is of another model, in {source}",
    )


def require_no_tied(adapter: Adapter, shape: ModelShape, source: Path) -> None:
    """Refuse an adapter of an embedding that is tied to the output head."""
    if EMBED_TOKENS in adapter.modules and is_tied(shape):
        raise InputError(
            f"an adapter of embed_tokens that is tied to lm_head is not built, found in {source}"
        )


def without_base(sizes: Mapping[str, tuple[int, ...]], adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the tensors without the base's embedding and head, which PEFT stores with an adapter of either."""
    ends = [f"{PEFT}{module}." for module in (EMBED_TOKENS, LM_HEAD) if module not in adapter.saved]
    if not adapter.modules & {EMBED_TOKENS, LM_HEAD}:
        return dict(sizes)
    base = [f"{end}{name}" for end in ends for name in ("weight", "base_layer.weight")]
    return {name: size for name, size in sizes.items() if name not in base}


def require_equal_copies(file: safe_open, adapter: Adapter, shape: ModelShape, source: Path) -> None:
    """Refuse copies of a tied embedding and head that are not equal."""
    if not is_tied_copy(shape, adapter):
        return
    embedding, head = (file.get_tensor(f"{PEFT}{module}.weight") for module in (EMBED_TOKENS, LM_HEAD))
    require(
        embedding.equal(head),
        "the copies of embed_tokens and lm_head, which are one weight of this model, must be equal; they differ in "
        f"{source}",
    )
