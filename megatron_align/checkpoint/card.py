"""A checkpoint's metadata, in ``card.json``: step, model shape, dtype, layout, versions, configuration."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from megatron_align.checkpoint.folder import ASSETS, CARD
from megatron_align.errors import InputError
from megatron_align.model.families import ModelShape, read_json, read_shape
from megatron_align.model.rope import RopeScaling
from megatron_align.version import __version__

FORMAT = 2  # 1 had no checksums
_VERSIONS = ("torch", "megatron-core", "transformers")


def read_checkpoint_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint.

    Raises:
        InputError: they are missing or unreadable, or of a format that this version does not know.
    """
    if not (folder / CARD).is_file():
        raise InputError(f"checkpoint is incomplete: no file {folder / CARD}")
    metadata = read_json(folder / CARD)
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"checkpoint format must be {FORMAT}, found {metadata.get('format')!r} in {folder / CARD}"
        )
    if missing := [key for key in ("step", "dtype", "shape", "optimizer") if key not in metadata]:
        raise InputError(f"checkpoint metadata lack {', '.join(missing)} in {folder / CARD}")
    return metadata


def is_of_training(folder: Path) -> bool:
    """Return whether a checkpoint was written by training; one that was imported has no configuration."""
    return isinstance(read_checkpoint_metadata(folder).get("config"), dict)


def make_checkpoint_metadata(
    step: int, shape: ModelShape, dtype: torch.dtype, **entries: Any
) -> dict[str, Any]:
    """Return the metadata of a new checkpoint; ``entries`` are further ones (layout, config, data)."""
    return {
        "format": FORMAT,
        "step": step,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": dataclasses.asdict(shape),
        "versions": {
            "megatron_align": __version__,
            **{name: importlib.metadata.version(name) for name in _VERSIONS},
            "python": platform.python_version(),
        },
        **entries,
    }


def checkpoint_shape(folder: Path) -> ModelShape:
    """Return the model shape of a checkpoint, read from its config.json."""
    return read_shape(folder / ASSETS)


def require_all_weights(folder: Path) -> None:
    """Refuse a checkpoint that holds an adapter without the weights of its base.

    Raises:
        InputError: naming the base, and what holds the merged model.
    """
    if adapter := read_checkpoint_metadata(folder).get("adapter"):
        raise InputError(
            f"the checkpoint holds an adapter only, of {adapter['base']}, not a complete model: {folder}; its run's "
            "folder hf/ holds the merged model, adapter/ the adapter for model.adapter.path; generate, chat and "
            "evaluate take the base with --adapter"
        )


def metadata_of_critic(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a checkpoint's critic as those of a model by itself.

    Raises:
        InputError: the checkpoint has no critic.
    """
    critic = metadata.get("critic")
    if not critic:
        raise InputError("the checkpoint has no critic: its run's objective was not ppo")
    config = metadata["config"]
    model = {**config["model"], "path": critic["start"]}
    return {**metadata, "config": {**config, "model": model}, "shape": critic["shape"]}


def critic_shape(metadata: dict[str, Any], policy: ModelShape) -> ModelShape:
    """Return the shape of a checkpoint's critic; ``policy``: that of its model."""
    stored = metadata["critic"]["shape"]
    if not shape_differences(dataclasses.asdict(policy.as_reward()), stored):
        return policy.as_reward()
    scaling = stored["rope_scaling"]
    return ModelShape(**{**stored, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def require_same_model(metadata: dict[str, Any], shape: ModelShape, folder: Path) -> None:
    """Check that a checkpoint holds a model of this shape.

    Raises:
        InputError: naming each size that differs.
    """
    differences = shape_differences(dataclasses.asdict(shape), metadata["shape"])
    if differences:
        listed = ", ".join(
            f"{key} {theirs!r} instead of {ours!r}" for key, (ours, theirs) in differences.items()
        )
        raise InputError(f"checkpoint does not match model.path: {listed} in {folder}")


def shape_differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the differences of two shapes, given as dictionaries: ``{key: (value of one, value of other)}``."""
    other = {"qk_norm": False, "norm_head": False, **other}  # older checkpoints lack these
    return {key: (value, other.get(key)) for key, value in one.items() if value != other.get(key)}


def describe_differences(ours: ModelShape, theirs: ModelShape) -> str:
    """Return the differences of two shapes as text, ``hidden_size 128 for 64``; empty if they are equal."""
    differences = shape_differences(dataclasses.asdict(ours), dataclasses.asdict(theirs))
    return ", ".join(f"{key} {other!r} for {own!r}" for key, (own, other) in differences.items())
