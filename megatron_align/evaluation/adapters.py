"""The adapters that a model on disk generates with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from megatron_align.convert.open_adapter import StoredAdapter, open_adapter
from megatron_align.errors import require
from megatron_align.hf.load import weights_hash
from megatron_align.model.families import read_shape
from megatron_align.rollout.adapters import EngineAdapters
from megatron_align.rollout.transformers_engine import TransformersEngine
from megatron_align.storage.journal import fingerprint
from megatron_align.training.setup import locate


def open_adapter_of(model: str | Path, path: str | Path) -> StoredAdapter:
    """Return an adapter, a PEFT folder or a checkpoint of ours, of a model's architecture and size.

    :func:`open_adapters_of` also compares the base's weights.

    Args:
        model: Hugging Face folder, checkpoint or run folder of the base.
        path: of the adapter.

    Raises:
        InputError: it is of another architecture, size or kind.
    """
    assets = locate(str(model))[1]
    require(assets.is_dir(), f"model must be a Hugging Face folder or a checkpoint, found nothing at {model}")
    return open_adapter(path, read_shape(assets))


def open_adapters_of(model: str | Path, paths: Mapping[str, str]) -> dict[str, StoredAdapter]:
    """Return adapters that fit a model, by name; its weights are read and hashed once.

    Raises:
        InputError: one is of another base, architecture, size or kind.
    """
    opened = {name: open_adapter_of(model, path) for name, path in paths.items()}
    for adapter in opened.values():
        if adapter.weights is not None:
            weights = locate(str(model))[0]
            adapter.require_hash(_hash_of(weights, json.dumps(fingerprint(weights))), weights)
    return opened


@lru_cache(maxsize=1)
def _hash_of(weights: Path, state: str) -> str:
    """Return the hash of a model's weights; ``state``: of their files, for which it is kept in this process."""
    return weights_hash(weights)


def attach_adapters(
    engine: TransformersEngine, model: str | Path, paths: Mapping[str, str]
) -> EngineAdapters:
    """Give an engine adapters by name; the first is in use.

    Raises:
        InputError: one does not fit the model.
    """
    opened = open_adapters_of(model, paths)
    attached = EngineAdapters(engine.model, {name: (a.adapter, a.tensors) for name, a in opened.items()})
    attached.use(next(iter(paths), None))
    return attached
