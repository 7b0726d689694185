"""The adapters that a model on disk generates with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_align.convert.open_adapter import StoredAdapter, open_adapter
from megatron_align.errors import require
from megatron_align.model.families import read_shape
from megatron_align.rollout.adapters import EngineAdapters
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.training.setup import locate


def open_adapter_of(model: str | Path, path: str | Path, *, check_base: bool = True) -> StoredAdapter:
    """Return an adapter, a PEFT folder or a checkpoint of ours, that fits a model.

    Args:
        model: Hugging Face folder, checkpoint or run folder of the base.
        path: of the adapter.
        check_base: compare the hash of the base's weights, all of whose files are then read.

    Raises:
        InputError: it is of another base, architecture, size or kind.
    """
    weights, assets = locate(str(model))
    require(assets.is_dir(), f"model must be a Hugging Face folder or a checkpoint, found nothing at {model}")
    found = open_adapter(path, read_shape(assets))
    if check_base:
        found.require_base(weights)
    return found


def attach_adapters(
    engine: TransformersEngine, model: str | Path, paths: Mapping[str, str]
) -> EngineAdapters:
    """Give an engine adapters by name; the first is in use.

    Raises:
        InputError: one does not fit the model.
    """
    opened = {name: open_adapter_of(model, path) for name, path in paths.items()}
    attached = EngineAdapters(engine.model, {name: (a.adapter, a.tensors) for name, a in opened.items()})
    attached.use(next(iter(paths), None))
    return attached
